"""Reads a model in a GGUF file as ``transformers`` reads it: values that were quantised are written out in float32.

The library knows some facts of the format and drops others without a word, such as factors of long texts or windows. So
a file with a fact or a tensor that the library does not read is refused here. The package ``gguf`` reads the file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from diffattn.checkpoint_files import INDEX, TOKENIZERS, WEIGHTS, companions, printable
from diffattn.config_fields import Config, shown
from diffattn.convert.folder import Checkpoint
from diffattn.convert.layout import HEAD
from diffattn.convert.sources import LLAMA_LIKE, unknown_architecture
from diffattn.errors import CheckpointError, ConfigError, UnsupportedError, one_line

# Facts that the library reads; then those that it does not, with the values that change nothing.
_READ = {
    "context_length", "block_count", "feed_forward_length", "embedding_length", "rope.freq_base",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "vocab_size",
}  # fmt: skip
_PLAIN: dict[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.type": ("none",),
    "tensor_data_layout": ("Meta AI original pth", "reference"),
    "attention.causal": (True,),
}


def gguf_file(source: Path) -> Path | None:
    """Returns the GGUF file that a source is or holds; None: it is a folder of safetensors, or nothing.

    Raises:
        CheckpointError: several files, of which one has to be chosen.
    """
    if source.is_file():
        return source if source.suffix == ".gguf" else None
    if not source.is_dir() or (source / WEIGHTS).exists() or (source / INDEX).exists():
        return None
    found = sorted(source.glob("*.gguf"))
    if len(found) > 1:
        raise CheckpointError(
            f"{str(source)!r} holds {len(found)} GGUF files", "one model", f"name a file, such as {str(found[0])!r}"
        )
    return found[0] if found else None


def read_gguf(file: Path, scratch: Path) -> Checkpoint:
    """Reads a GGUF file; its tokenizer is written into the folder ``scratch``.

    Raises:
        ConfigError: the package gguf is not installed.
        UnsupportedError: an architecture that is not Llama-like, or a fact or tensor that transformers does not read.
        CheckpointError: a file that is damaged or one part of several.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"{str(file)!r}, while the package gguf is not installed",
            "gguf, which reads it",
            "pip install 'diffattn[gguf]'",
        )
    facts, tensors = _facts(file)
    shown_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        parsed, config = _config(file)
        _check_facts(facts, parsed)
        # The library raises whatever it meets in a file, and draws a bar of its own.
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                model, found = AutoModelForCausalLM.from_pretrained(
                    file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
                )
        except Exception as error:
            raise _damaged(file, one_line(error)) from error
        weights = dict(model.state_dict())
        if parsed.tie_word_embeddings:
            weights.pop(HEAD, None)
        if len(weights) != len(tensors) or any(found[key] for key in ("missing_keys", "mismatched_keys")):
            raise UnsupportedError(
                f"{str(file)!r} holds {len(tensors)} tensors, of which transformers makes the {len(weights)} of a "
                f"{config['model_type']}",
                "a file of which it reads every tensor",
                "convert the safetensors from which the file was made",
            )
        if "tokenizer.ggml.model" in facts:
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(scratch)
    finally:
        if shown_bars:
            transformers_logging.enable_progress_bar()
    kinds = ", ".join(sorted(set(tensors.values())))
    note = f"the values of the file ({kinds}) are written out in float32"
    beside = [path for path in companions(file.parent) if path.name not in TOKENIZERS]
    own = companions(scratch)
    copied = (*own, *(path for path in beside if path.name not in {each.name for each in own}))
    return Checkpoint(file.parent, config, weights, copied, (note,))


def _facts(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The facts in the file's header, and the type of each tensor's numbers."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        facts |= {name: None for name in reader.fields if name.startswith("tokenizer.")}
        tensors = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    except Exception as error:
        raise _damaged(file, one_line(error)) from error
    if facts.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{str(file)!r} is one of {facts['split.count']} parts", "the model in one file", "merge the parts first"
        )
    return facts, tensors


def _config(file: Path) -> tuple[PreTrainedConfig, Config]:
    """The configuration that the library makes of the header, whole and as a ``config.json`` has it."""
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:
        raise UnsupportedError(
            f"transformers cannot read {str(file)!r} ({one_line(error)})",
            f"a model of one of {', '.join(LLAMA_LIKE)}",
            "convert the safetensors from which the file was made",
        ) from error
    values: Config = json.loads(json.dumps(config.to_diff_dict(), default=str))
    values.pop("quantization_config", None)
    values["dtype"] = "float32"
    if values["model_type"] not in LLAMA_LIKE:
        raise unknown_architecture(values)
    return config, values


def _check_facts(facts: dict[str, Any], config: PreTrainedConfig) -> None:
    """Raises unless the library reads every fact about the model, or the fact changes nothing."""
    prefix = f"{facts.get('general.architecture')}."
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain_values = _PLAIN | {
        **dict.fromkeys(("rope.dimension_count", "attention.key_length", "attention.value_length"), (width,)),
        "rope.scaling.original_context_length": (config.max_position_embeddings,),
    }
    for name, value in facts.items():
        if not name.startswith(prefix):
            continue
        fact = name.removeprefix(prefix)
        plain = plain_values.get(fact, ())
        if value not in plain if plain else fact not in _READ:
            raise UnsupportedError(
                f"the file says {printable(name)} = {shown(value)}, which transformers does not read",
                f"{plain[0]}, or a file without it" if plain else "a file without it",
                "convert the safetensors from which the file was made",
            )


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{str(file)!r} cannot be read ({why})", "a GGUF file that transformers can read", "copy or download it again"
    )
