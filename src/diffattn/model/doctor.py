"""Finds out what serves attention on this machine, for the operation and for the models."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffattn.config_fields import dtype_name
from diffattn.errors import UnsupportedError
from diffattn.files import unwritable
from diffattn.machine import processor_name
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.fused import serving
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.ops.backend import installed, load, package_of
from diffattn.ops.cpu.build import DTYPES, status
from diffattn.ops.dispatch import BACKENDS
from diffattn.ops.reference import Call

# The calls that a GPU may serve by different backends.
CALLS = {
    "V1 training": ("diff_v1", False),
    "V1 decoding": ("diff_v1", True),
    "V2 training": ("diff_v2", False),
    "V2 decoding": ("diff_v2", True),
}


def examine() -> dict[str, Any]:
    """Returns what this machine runs and why, ready for JSON; it loads a kernel that was compiled before, no more."""
    kernel = status()
    config = DiffTransformerConfig(vocab_size=8, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    with torch.device("meta"):
        implementation = DiffTransformerForCausalLM(config).config._attn_implementation
    names = [dtype_name(dtype) for dtype in DTYPES]
    serves = {name: name in kernel.active or kernel.pending for name in names}
    # Not asked, which would compile what is not compiled yet.
    backends = {True: "fused_cpu", False: "standard"}
    packages = ("torch", "transformers", "diffattn")
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "processor": processor_name(),
        "fused_cpu": asdict(kernel),
        "backends": _backends(),
        "diff_attention": {dtype: backends[fused] for dtype, fused in serves.items()},
        "model_attention": {dtype: _model_attention(implementation, fused) for dtype, fused in serves.items()},
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
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


def _gpu(index: int) -> dict[str, Any]:
    """Returns what serves the calls on a GPU by dtype, and the sentences of those that were asked before and do not."""
    device, serves = f"cuda:{index}", {}
    for dtype in DTYPES:
        answers: dict[str, dict[str, str]] = {"diff_attention": {}, "models": {}}
        reasons: dict[str, None] = {}
        for words, (attention, decoding) in CALLS.items():
            call = _call(attention, device, dtype, decoding)
            for name, backend in BACKENDS.items():
                reason = backend.refuses(call) or backend.passed_over(call)
                if reason is None:
                    answers["diff_attention"][words] = name
                    break
                # It serves no GPU.
                reasons |= {} if name == "fused_cpu" else {reason: None}
            answers["models"][words] = serving(attention, device, dtype, decoding=decoding)[0]
        serves[dtype_name(dtype)] = answers | {"reasons": list(reasons)}
    return {"device": device, "name": torch.cuda.get_device_name(index), "serves": serves}


def _call(attention: str, device: str, dtype: torch.dtype, decoding: bool) -> Call:
    """A causal call as a layer with heads of 64 makes it, in training or decoding, where nothing is padded."""

    def empty(tokens: int, width: int) -> Tensor:
        return torch.empty(1, tokens, 1, width, dtype=dtype, device=device, requires_grad=not decoding)

    q, k = empty(1 if decoding else 16, 64), empty(16, 64)
    k2, values = (empty(16, 64), empty(16, 128)) if attention == "diff_v1" else (k, empty(16, 64))
    return Call(q, k, q, k2, values, 0.5)


def _model_attention(implementation: str, fused: bool) -> str:
    # diff_fused is total: a call that the kernel does not serve is the standard one.
    return f"{implementation}, by the standard call" if implementation == "diff_fused" and not fused else implementation


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))
