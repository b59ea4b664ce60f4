"""Finds out what serves attention on this machine, for the operation and for the models."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diffattn.config_fields import dtype_name
from diffattn.errors import UnsupportedError
from diffattn.files import unwritable
from diffattn.machine import processor_name
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.ops.backend import installed, load, package_of
from diffattn.ops.cpu.build import DTYPES, status
from diffattn.ops.dispatch import BACKENDS


def examine() -> dict[str, Any]:
    """Returns what this machine runs and why, ready for JSON; it loads a kernel that was compiled before, no more."""
    kernel = status()
    config = DiffTransformerConfig(vocab_size=8, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    with torch.device("meta"):
        implementation = DiffTransformerForCausalLM(config).config._attn_implementation
    names = [dtype_name(dtype) for dtype in DTYPES]
    serves = {name: name in kernel.active or kernel.pending for name in names}
    # The first of the table, asked without compiling what is not compiled yet.
    backends = {fused: next(name for name in BACKENDS if fused or name != "fused_cpu") for fused in (False, True)}
    packages = ("torch", "transformers", "diffattn")
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "processor": processor_name(),
        "fused_cpu": asdict(kernel),
        "backends": _backends(),
        "diff_attention": {dtype: backends[fused] for dtype, fused in serves.items()},
        "model_attention": {dtype: _model_attention(implementation, fused) for dtype, fused in serves.items()},
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cache": {
            "path": kernel.cache,
            "bytes": _bytes(Path(kernel.cache)),
            "unwritable": unwritable(Path(kernel.cache)),
        },
    }


def _backends() -> dict[str, dict[str, str | None]]:
    """Returns what each backend runs on, the package that brings it where it is not ours, and why one does not load."""
    found = {name: {"hardware": one.hardware, "package": None, "broken": None} for name, one in BACKENDS.items()}
    for name, entry in installed().items():
        if name in found:
            continue
        hardware, broken = None, None
        try:
            hardware = load(entry).hardware
        except UnsupportedError as error:
            broken = str(error)
        found[name] = {"hardware": hardware, "package": package_of(entry), "broken": broken}
    return found


def _model_attention(implementation: str, fused: bool) -> str:
    # diff_fused is total: a call that the kernel does not serve is the standard one.
    return f"{implementation}, by the standard call" if implementation == "diff_fused" and not fused else implementation


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))
