"""Merges a LoRA adapter of PEFT into the weights of its base, to the bit as PEFT's ``merge_and_unload`` does on a CPU.

An adapter changes a matrix W (rows out, columns in) into ``W + s · B A``, with A (r, in), B (out, r) and s = alpha / r,
or alpha / √r (rsLoRA). The sum is made in float32, or float64 where the base is float64, and rounded once to the base's
dtype. Modules that were trained whole (``modules_to_save``) take the place of the base's. PEFT itself is not needed.

Source: ``tuners/lora/layer.py`` of PEFT 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffattn.checkpoint_files import TOKENIZERS, check_finite, check_safetensors, companions, printable
from diffattn.config_fields import Config, dtype_name, is_number, is_whole, shown
from diffattn.convert.folder import Checkpoint, mapped, read_folder
from diffattn.convert.layout import EMBEDDING, HEAD, Tensors, same_sizes
from diffattn.errors import CheckpointError, UnsupportedError
from diffattn.files import read_object

ADAPTER = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Fields that change nothing in the sum above, and those that are read here.
_READ = (
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "target_modules",
    "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "loftq_config", "runtime_config",
    "peft_version", "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save",
    "bias", "init_lora_weights", "ensure_weight_tying", "megatron_core", "qalora_group_size",
    # Only layers that hold their weight transposed read it, and no base that can be converted has one.
    "fan_in_fan_out",
)  # fmt: skip
# Other ways to start change the base itself, which is not in the adapter's folder.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_adapter(folder: Path) -> Checkpoint:
    """Reads an adapter and its base, and merges the two.

    Raises:
        UnsupportedError: another kind of adapter, or a base that is no folder of this machine.
        CheckpointError: files that are missing or damaged, or that do not fit the base.
    """
    config = read_object(folder / ADAPTER, way_out="copy or download it again")
    _check_kind(config)
    base = _base(config)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds no {WEIGHTS}",
            f"the adapter's weights in safetensors beside {ADAPTER}",
            "save it again with save_pretrained of a recent peft",
        )
    file = folder / WEIGHTS
    check_finite({name: {**entry, "file": file} for name, entry in check_safetensors(file).items()})
    adapter = mapped([file])
    tensors, changed = merged(config, adapter, base.tensors)
    # A tokenizer that was saved with the adapter may have tokens that the base's has not.
    own = tuple(companions(folder))
    copied = own if any(path.name in TOKENIZERS for path in own) else base.copied
    what = "one tensor" if changed == 1 else f"{changed} tensors"
    note = f"the adapter was merged into {str(base.folder)!r}: {what} changed, each rounded once to its dtype"
    return Checkpoint(base.folder, base.config, tensors, copied, (note,), merged=True)


def merged(config: Config, adapter: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> tuple[Tensors, int]:
    """Returns the base's tensors with the adapter merged into them, and how many changed.

    Args:
        config: the content of ``adapter_config.json``.
        adapter: its tensors by name, such as ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``.
        base: the base's tensors by name.

    Raises:
        CheckpointError: a tensor that does not fit the base.
        UnsupportedError: a part of the adapter that is neither A, B nor a whole module.
    """
    tensors, changed = dict(base), set()
    saved = config.get("modules_to_save") or []
    for name, tensor in adapter.items():
        target = name.removeprefix(_PREFIX)
        if target.endswith(".lora_A.weight"):
            module = target.removesuffix(".lora_A.weight")
            second = adapter.get(name.replace(".lora_A.", ".lora_B."))
            weight = _weight(tensors, f"{module}.weight", second is not None)
            assert second is not None
            tensors[f"{module}.weight"] = _sum(config, module, weight, tensor, second)
            changed.add(f"{module}.weight")
        elif target.endswith(".lora_B.weight"):
            _weight(tensors, f"{target.removesuffix('.lora_B.weight')}.weight", name.replace("_B.", "_A.") in adapter)
        elif _is_saved(target, saved):
            if target in (HEAD, EMBEDDING) and HEAD not in base:
                raise UnsupportedError(
                    f"the adapter holds a {target} of its own, for a base whose two embeddings are one matrix",
                    "an adapter that leaves them as they are",
                    "merge it with PEFT, and convert the result",
                )
            weight = _weight(tensors, target, True)
            same_sizes(target, tensor.shape, weight.shape)
            tensors[target] = tensor.to(weight.dtype)
            changed.add(target)
        else:
            raise UnsupportedError(
                f"the adapter holds {printable(name)}",
                "matrices A and B of linear layers, and modules of modules_to_save",
                "merge it with PEFT, and convert the result",
            )
    return tensors, len(changed)


def _sum(config: Config, module: str, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    rank = _of_module(config, "rank_pattern", module, config["r"])
    alpha = _of_module(config, "alpha_pattern", module, config["lora_alpha"])
    same_sizes(f"lora_A of {module}", a.shape, (rank, *weight.shape[1:]))
    same_sizes(f"lora_B of {module}", b.shape, (*weight.shape[:1], rank))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    delta = (b.to(wide) @ a.to(wide)) * scale
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise UnsupportedError(
            f"{module}.weight is {dtype_name(weight.dtype)}",
            "a base with floating-point weights of at least 16 bits",
            "take the base before it is quantised",
        )
    return weight.clone().add_(delta)


def _of_module(config: Config, pattern: str, module: str, otherwise: Any) -> Any:
    """The rank or alpha of a module: of the first pattern that fits its name, as PEFT reads them."""
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise


def _weight(tensors: Mapping[str, Tensor], name: str, whole: bool) -> Tensor:
    if not whole or name not in tensors:
        what = "lacks a matrix A or B" if not whole else "is for a tensor that the base has not"
        raise CheckpointError(
            f"the adapter {what}: {printable(name)}",
            "an adapter of that base, whole",
            "check base_model_name_or_path, or copy the adapter again",
        )
    return tensors[name]


def _is_saved(target: str, modules: list[str]) -> bool:
    """Returns whether a tensor lies in a module whose name ends with one of the names, as PEFT finds the modules."""
    parts = target.split(".")
    places = [".".join(parts[:end]) for end in range(1, len(parts))]
    return any(place.endswith(module) for place in places for module in modules)


def _check_kind(config: Config) -> None:
    """Raises unless the adapter is LoRA as its first paper has it, with numbers that can be."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"peft_type of {ADAPTER} is {shown(kind)}",
            "'LORA', whose matrices can be added to those of the base",
            "merge it with PEFT, if PEFT can, and convert the result",
        )
    other: dict[str, object] = {
        name: value for name, value in config.items() if name not in _READ and value not in (None, False, {}, [])
    }
    for name, plain in (("bias", ("none", None)), ("init_lora_weights", _STARTS)):
        if config.get(name) not in plain:
            other[name] = config[name]
    if other:
        name, value = next(iter(other.items()))
        raise UnsupportedError(
            f"{name} of {ADAPTER} is {shown(value)}",
            "plain LoRA, whose matrices alone are added to those of the base",
            "merge it with PEFT, and convert the result",
        )
    ranks = [config.get("r"), *_values(config, "rank_pattern")]
    alphas = [config.get("lora_alpha"), *_values(config, "alpha_pattern")]
    names = config.get("modules_to_save")
    sound = all(is_whole(rank) and rank > 0 for rank in ranks) and all(is_number(alpha) for alpha in alphas)
    if not sound or not (names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))):
        raise CheckpointError(
            f"{ADAPTER} has r {shown(config.get('r'))} and lora_alpha {shown(config.get('lora_alpha'))}, or patterns "
            "or modules_to_save that cannot be",
            "the file that PEFT wrote",
            "copy or download it again",
        )


def _values(config: Config, name: str) -> list[Any]:
    pattern = config.get(name) or {}
    return list(pattern.values()) if isinstance(pattern, dict) else [None]


def _base(config: Config) -> Checkpoint:
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not Path(name).is_dir():
        raise UnsupportedError(
            f"base_model_name_or_path of {ADAPTER} is {shown(name)}, which is no folder here",
            "the folder of the adapter's base",
            "download the base, and write the path of its folder there",
        )
    return read_folder(name)
