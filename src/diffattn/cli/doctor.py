"""``diffattn doctor``."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any


def doctor(*, build: bool = False, json: bool = False) -> Callable[[], int]:
    """Say what this machine runs and why: versions, processor, the fused kernel, which attention is used, the cache.

    Args:
        build: Compile the fused kernel now, also where it was compiled before; exit status 1 where that fails.
        json: Print the facts as one JSON object on stdout instead.
    """

    def call() -> int:
        from diffattn.cli.console import print_json
        from diffattn.errors import UnsupportedError
        from diffattn.ops.build import compile_kernel

        failure = None
        if build:
            try:
                compile_kernel(force=True)
            except UnsupportedError as error:
                failure = str(error)
        facts = examine() | ({"build_failure": failure} if build else {})
        if json:
            print_json(facts)
        else:
            print("\n".join(lines(facts)), file=sys.stderr)
        if failure is not None:
            print(f"diffattn: {failure}", file=sys.stderr)
        return 0 if failure is None else 1

    return call


def examine() -> dict[str, Any]:
    """What `diffattn doctor --json` prints. Loads a kernel that was compiled before, but compiles none."""
    import torch

    from diffattn.model.configuration import DiffTransformerConfig
    from diffattn.model.modeling import DiffTransformerForCausalLM
    from diffattn.ops.build import status
    from diffattn.ops.dispatch import BACKENDS

    kernel = status()
    config = DiffTransformerConfig(vocab_size=8, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    with torch.device("meta"):
        implementation = DiffTransformerForCausalLM(config).config._attn_implementation
    serves = {name: name in kernel.active or kernel.pending for name in ("float32", "bfloat16")}
    # The first of the table, asked without compiling what is not compiled yet.
    backends = {fused: next(name for name in BACKENDS if fused or name != "fused_cpu") for fused in (False, True)}
    packages = ("torch", "transformers", "diffattn")
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "processor": _processor(),
        "fused_cpu": asdict(kernel),
        "diff_attention": {dtype: backends[fused] for dtype, fused in serves.items()},
        "model_attention": {dtype: _model_attention(implementation, fused) for dtype, fused in serves.items()},
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cache": {"path": kernel.cache, "bytes": _bytes(Path(kernel.cache))},
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The same for a person."""
    kernel = facts["fused_cpu"]
    dtypes = dict.fromkeys(kernel["active"], "active") | kernel["reasons"]
    seconds = f", compiled in {kernel['compile_seconds']:.0f} s" if kernel["compile_seconds"] is not None else ""
    return [
        "  ".join(f"{name} {number}" for name, number in facts["versions"].items()),
        f"processor: {facts['processor']}, {kernel['capability']}, {kernel['threads']} threads",
        f"compiler: {kernel['compiler'] or 'none found'}",
        *(f"fused kernel, {name}: {state.removeprefix('fused_cpu: ')}" for name, state in dtypes.items()),
        f"fused kernel's file: {kernel['path'] or 'none'}{seconds}",
        *(f"diff_attention on CPU, {dtype}: {used}" for dtype, used in facts["diff_attention"].items()),
        *(f"the model's attention on CPU, {dtype}: {used}" for dtype, used in facts["model_attention"].items()),
        f"CUDA: {', '.join(facts['cuda']) or 'none'}",
        f"cache folder: {facts['cache']['path']}, {facts['cache']['bytes'] / 1e6:.1f} MB",
    ]


def _model_attention(implementation: str, fused: bool) -> str:
    # diff_fused is total: a call that the kernel does not serve is the standard one.
    return f"{implementation}, by the standard call" if implementation == "diff_fused" and not fused else implementation


def _processor() -> str:
    try:
        rows = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        return next(value.strip() for key, _, value in rows if key.strip() == "model name")
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))
