"""The kernels that a wheel carries: one for each instruction set and each release of PyTorch; a checkout has none.

    ops/cpu/shipped/<release>-<commit of PyTorch>/<instruction set>/    fused_cpu.so and build.json, as in the cache

The kernel calls C++ functions of PyTorch that the stable interface (`torch/csrc/stable`) does not have, so a library
belongs to one commit of PyTorch. The project's own builds of a commit differ in what accelerators they serve, not in
what the kernel includes and links (docs/kernel.md has the check), so ``+cpu`` and ``+cu130`` are one here.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch

from diffattn.ops.cpu.compiling import BuildKey, Built, read

FOLDER = Path(__file__).parent / "shipped"


def torch_build() -> str | None:
    """Release and commit of the PyTorch project's own builds; None for others, whose libraries may differ."""
    release = re.fullmatch(r"(\d+\.\d+\.\d+)\+(?:cpu|cu\d+)", torch.__version__)
    return f"{release[1]}-{torch.version.git_version[:12]}" if release and torch.version.git_version else None


def find(build_key: BuildKey) -> Built | None:
    """The library for this processor, this PyTorch and these sources."""
    return _look(build_key)[0]


def refused(build_key: BuildKey) -> str | None:
    """Why none of the shipped libraries is used; None where one is, and where none is shipped."""
    return _look(build_key)[1]


def _look(build_key: BuildKey) -> tuple[Built | None, str | None]:
    builds = sorted(path.name for path in FOLDER.glob("*"))
    if not builds:
        return None, None
    folder = FOLDER / str(torch_build()) / build_key.instructions
    if not folder.parent.is_dir():
        commit = str(torch.version.git_version)[:12]
        return None, f"it is for torch {', '.join(builds)}, not for {torch.__version__} of commit {commit}"
    if not folder.is_dir():
        return None, f"none is for {build_key.instructions}"
    built = read(folder)
    if built is None:
        return None, "it is damaged; install diffattn again"
    if built.digest != build_key.digest:
        return None, "the sources or flags have changed since"
    return replace(built, shipped=True), None
