"""Load a checkpoint folder, to train on, generate, serve or export: exactly the model that it describes, or an error.

Nothing comes from a network, no pickle is opened and no program of the folder's is run. The weights stay where they
are: on the CPU, in the file's dtype, they are mapped from the file and take no memory of the process' own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from diffattn.checkpoint_files import (
    CONFIG,
    TOKENIZERS,
    TensorEntry,
    check_finite,
    checked_config,
    read_config,
    read_tensors,
)
from diffattn.config_fields import check, check_ids, layers_of, shown
from diffattn.errors import CheckpointError, ConfigError, DiffattnError, UnsupportedError, one_line
from diffattn.files import read_object
from diffattn.generation_fields import GENERATION
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.options import Device, Dtype, LoadOptions
from diffattn.model.tensors import EVERY_TENSOR, ONE_CHECKPOINT, check_layers, check_whole

_GENERATION = "generation_config.json"
# These lie beside tokenizer.json; each that is there holds a JSON object.
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")


def load(
    folder: str | Path,
    dtype: Dtype = LoadOptions.dtype,
    device: Device = LoadOptions.device,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model in evaluation mode and its tokenizer from a folder; ours, or any of ``AutoModelForCausalLM``.

    Args:
        folder: with ``config.json``, safetensors (one file, or an index and its files) and a tokenizer.
        dtype: of the weights. ``"auto"``: the file's, which on the CPU are then mapped and not copied.
        device: ``"auto"``: the GPU where there is one.
        attn_implementation: a name that ``transformers`` knows, or ``"diff_fused"``. Default: the model's own choice.

    Raises:
        CheckpointError: files that are missing, damaged, or do not make exactly the model that config.json describes.
        UnsupportedError: an architecture, attention implementation or device that is not here.
        ConfigError: an unknown dtype or device.

    >>> load("absent")
    Traceback (most recent call last):
    diffattn.errors.CheckpointError: there is no folder 'absent'; wanted the folder of a checkpoint: check the path
    """
    _check_folder(Path(folder))
    # The library reads config.json for the tokenizer too, and takes what it says for granted.
    load_config(folder)
    # Before the weights, since it takes no time and fails as often.
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype, device, attn_implementation)
    if isinstance(model.config, DiffTransformerConfig):
        check_tokens(model, tokenizer.get_vocab().values())
    return model, tokenizer


def check_tokens(model: PreTrainedModel, ids: Iterable[int]) -> None:
    """Raise a ``CheckpointError`` where a tokenizer gives ids for which the model has no embedding."""
    rows, highest = model.get_input_embeddings().num_embeddings, max(ids, default=0)
    if highest >= rows:
        raise CheckpointError(
            f"the tokenizer gives the token {highest} and the model knows {rows:,}",
            "the model's own tokenizer",
            "copy it into the model's folder",
        )


def load_model(
    folder: str | Path,
    dtype: Dtype = LoadOptions.dtype,
    device: Device = LoadOptions.device,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The model of :func:`load`, whose arguments and errors it has, where no tokenizer is wanted."""
    if dtype not in (dtypes := get_args(Dtype)):
        raise ConfigError(f"dtype={dtype!r}", f"one of {', '.join(dtypes)}", "correct the name")
    place = resolve_device(device)
    config = check_weights(folder)
    with _quiet():
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                attn_implementation=attn_implementation,
                # A CPU's weights are mapped; naming the device would copy them.
                device_map=None if place == "cpu" else place,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                # Reported below, in one line.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except DiffattnError:
            raise
        # A file may ask for something that fails anywhere in the library, with any kind of error.
        except Exception as error:
            raise UnsupportedError(
                f"{str(folder)!r} cannot be loaded here ({_line(error)})",
                "a model that this transformers loads",
                "act on what it says, or take another model",
            ) from error
    _check_report(folder, found)
    return model.eval()


def check_weights(folder: str | Path) -> Any:
    """The configuration of a folder whose weights are known to be its own, and finite; nothing is built of ours.

    The files are read once, from begin to end, which takes 0.1 s for a gigabyte in the system's cache of files.

    Raises:
        CheckpointError, ConfigError, UnsupportedError: as :func:`load`.
    """
    with _quiet():
        entries = _check_folder(Path(folder))
        config = load_config(folder)
        if isinstance(config, DiffTransformerConfig):
            check_whole(folder, config, entries)
        else:
            _check_foreign_size(folder, config, entries)
    check_finite(entries)
    return config


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: no file of a tokenizer, or one that cannot be read.
        UnsupportedError: one whose program is not installed, or is to come from the folder.
    """
    if not any((Path(folder) / name).is_file() for name in TOKENIZERS):
        raise CheckpointError(
            f"{str(folder)!r} holds no tokenizer",
            f"{TOKENIZERS[0]} beside the weights",
            "save the tokenizer there with save_pretrained",
        )
    for name in _TOKENIZER_FILES:
        if (Path(folder) / name).is_file():
            read_object(Path(folder) / name, way_out="copy or download it again")
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            # Some of what cannot be is met only here.
            tokenizer("a")
            return tokenizer
        except ImportError as error:
            raise UnsupportedError(
                f"the tokenizer of {str(folder)!r} cannot be loaded here ({_line(error)})",
                "one whose program is installed",
                "install what it names",
            ) from error
        # The parser of tokenizer.json has no type for what it cannot read.
        except Exception as error:
            raise CheckpointError(
                f"the tokenizer of {str(folder)!r} cannot be read ({_line(error)})",
                "whole files of a tokenizer",
                "copy or download them again",
            ) from error


def resolve_device(device: str) -> str:
    """``"cpu"`` or ``"cuda"`` for ``"auto"`` or one of them.

    Raises:
        ConfigError: another name.
        UnsupportedError: cuda without a GPU that this torch can use.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={device!r}", "auto, cpu or cuda", "correct the name")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("device='cuda', and torch sees no GPU here", "a GPU, or cpu", "leave --device out")
    return device


def _check_folder(folder: Path) -> dict[str, TensorEntry]:
    """Everything that can be told without reading the model; gives what ``read_tensors`` does."""
    config = read_config(folder)
    if (folder / "adapter_config.json").exists():
        raise UnsupportedError(
            f"{str(folder)!r} holds an adapter", "whole weights", "merge it into its model with peft first"
        )
    if config.get("transformers_weights"):
        raise UnsupportedError(
            f"{str(folder)!r} names its weights in transformers_weights", "model.safetensors", "rename the file"
        )
    kind = config.get("model_type")
    if kind == DiffTransformerConfig.model_type and config.get("quantization_config"):
        raise UnsupportedError(
            f"{str(folder)!r} has a quantization_config",
            "weights that are not quantised",
            "take the folder as it was before",
        )
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        what = "brings its own program, which is never run" if "auto_map" in config else "is not known here"
        raise UnsupportedError(
            f"model_type is {shown(kind)} in {str(folder / CONFIG)!r}, an architecture that {what}",
            "diff_transformer or one of transformers' own",
            "take another model",
        )
    encoder = kind == DiffTransformerConfig.model_type and config.get("is_causal") is False
    if encoder or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = "is_causal is false" if encoder else f"model_type is {kind!r}"
        raise UnsupportedError(
            f"{what} in {str(folder)!r}, which writes no text",
            "a decoder",
            "take another model",
        )
    _check_generation(folder)
    return read_tensors(folder)


def _check_generation(folder: Path) -> None:
    """Raise unless ``generation_config.json``, where there is one, is an object of values that can be."""
    file = folder / _GENERATION
    if not file.is_file():
        return
    values = read_object(file, way_out="delete it, or copy it again")
    try:
        for name, value in values.items():
            check(GENERATION, name, value)
        config = read_config(folder)
        rows = config.get("vocab_size")
        if config.get("model_type") == DiffTransformerConfig.model_type and isinstance(rows, int):
            check_ids(values, rows)
    except ConfigError as error:
        raise error.at(repr(str(file))) from None


def load_config(folder: str | Path) -> Any:
    """The configuration of a checkpoint folder.

    Raises:
        CheckpointError: a ``config.json`` that is missing, or describes no model.
        ConfigError: a field that cannot be; of ours also fields that do not go together.
    """
    file = Path(folder) / CONFIG
    checked_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ConfigError as error:
        raise error.at(repr(str(file))) from None
    # A file can hold anything, and each configuration class complains in its own way.
    except Exception as error:
        raise CheckpointError(
            f"{str(file)!r} describes no model ({_line(error)})",
            "the config.json of a model",
            "copy or download it again",
        ) from error


def _check_foreign_size(folder: str | Path, config: Any, entries: dict[str, TensorEntry]) -> None:
    """Raise where a configuration of another library's asks for more than its weights hold, before that is built."""
    check_layers(layers_of(read_config(folder)), len(entries))
    # Quantised weights hold several numbers of the model in one number of the file.
    if getattr(config, "quantization_config", None):
        return
    try:
        with torch.device("meta"):
            built = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    # The library builds it once more, and says what is wrong.
    except Exception:
        return
    held = sum(math.prod(entry["shape"]) for entry in entries.values())
    if built > held:
        raise CheckpointError(
            f"the weights in {str(folder)!r} are {held:,} numbers, and the model of config.json has {built:,}",
            *ONE_CHECKPOINT,
        )


def positions_of(config: Any) -> int | None:
    """Returns how many positions a model of this configuration knows; None for any number."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def _check_report(folder: str | Path, found: dict[str, Any]) -> None:
    """Refuse a model of which a part would be made up, left out or put into another shape."""
    where = f"the weights in {str(folder)!r}"
    if mismatched := sorted(found["mismatched_keys"]):
        name, saved, wanted = mismatched[0]
        raise CheckpointError(
            f"{where} do not fit config.json: {name} is {_shape(saved)} there and {_shape(wanted)} by config.json"
            f"{_more(mismatched)}",
            *ONE_CHECKPOINT,
        )
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(f"{where} lack {missing[0]}{_more(missing)}", *EVERY_TENSOR)
    if unexpected := sorted(found["unexpected_keys"]):
        raise CheckpointError(
            f"{where} hold {unexpected[0]}{_more(unexpected)}, which the model of config.json does not have",
            *ONE_CHECKPOINT,
        )
    if errors := found.get("error_msgs"):
        raise CheckpointError(f"{where} cannot be loaded ({_line(next(iter(errors)))})", *ONE_CHECKPOINT)


def _more(names: list[Any]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _shape(sizes: Iterable[int]) -> str:
    return "×".join(map(str, sizes)) or "a number"


def _line(error: object) -> str:
    """Returns what a library says as one line, cut to a length that can be read."""
    text = one_line(error)
    return text if len(text) <= 300 else f"{text[:300]} …"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the library's report of what it loaded, which is said here in one line."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
