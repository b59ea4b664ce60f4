"""The kernel through other compilers and on other processors than this machine's: `make portable`.

Each case is a compiler and a processor. The kernel is compiled for the processor's instruction set as on first use, and
its reference cases (`tests/ops/cpu/test_operator.py`) run on it: on this processor, which PyTorch takes for an older
one, or under qemu, where the processor of the case is all there is. One JSON line per case; a case whose compiler or
emulator is absent is a line too, with what is absent. Exported models in onnxruntime are cases too
(`portability_onnx.py`).

    apt-get install g++-11 g++-12 clang-14 g++-aarch64-linux-gnu qemu-user debootstrap
    tools/aarch64_root.sh build/aarch64
    python -m tools.portability --aarch64 build/aarch64 --out benchmarks/results/portability.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from benchmarks.rows import Writer, provenance
from diffattn.errors import UnsupportedError
from diffattn.ops.cpu import compiling
from tools import portability_onnx

ROOT = Path(__file__).parents[1]
TESTS = ["tests/ops/cpu/test_operator.py", "-k", "test_forward_and_gradients"]
# The last line that pytest prints.
COUNTS = re.compile(r"^[0-9]+ (?:passed|failed|skipped|deselected|error).* in [0-9.:]+s", re.MULTILINE)


@dataclass(frozen=True)
class Case:
    """``instructions`` is what PyTorch shall see; ``qemu`` the processor that it emulates, none for this machine's."""

    compiler: str
    instructions: str
    machine: str = "x86_64"
    qemu: str | None = None

    @property
    def name(self) -> str:
        where = f"qemu {self.qemu}" if self.qemu else "this processor"
        return f"{self.compiler}, {self.machine} {self.instructions}, {where}"

    @property
    def absent(self) -> str | None:
        programs = [self.compiler, *([f"qemu-{self.machine}"] if self.qemu else [])]
        if self.machine == platform.machine() == "x86_64" and not self.qemu:
            order = list(compiling.INSTRUCTION_SETS["x86_64"])
            here = torch.backends.cpu.get_cpu_capability()
            if order.index(self.instructions) > order.index(here):
                return f"{self.instructions} on this processor, which has {here}"
        return next((program for program in programs if shutil.which(program) is None), None)


CASES = [
    *(
        Case(compiler, instructions)
        for compiler in ("g++-11", "g++-12", "clang++-14")
        for instructions in compiling.INSTRUCTION_SETS["x86_64"]
    ),
    # AVX2 and no AVX512 at all, where PyTorch's and oneDNN's own choice is not imitated; no AVX.
    Case("g++-12", "AVX2", qemu="Haswell"),
    Case("g++-12", "DEFAULT", qemu="Nehalem"),
    # NEON alone, and SVE of 256 bits.
    Case("aarch64-linux-gnu-g++", "DEFAULT", "aarch64", "neoverse-n1"),
    Case("aarch64-linux-gnu-g++", "DEFAULT", "aarch64", "max,sve-max-vq=2"),
]


def run(case: Case, aarch64: Path | None) -> dict[str, object]:
    """Compile in a folder of its own and run the tests; what came of both."""
    absent = case.absent or ("--aarch64 FOLDER" if case.machine == "aarch64" and aarch64 is None else None)
    if absent:
        return {"absent": absent}
    with tempfile.TemporaryDirectory(prefix="diffattn-portability-") as scratch:
        cache = Path(scratch) / "cache"
        folder = aarch64 if case.machine == "aarch64" else None
        try:
            row = _compile(case, Path(scratch) / "work", cache, folder)
        except UnsupportedError as error:
            return {"compiled": False, "error": str(error)}
        began = time.monotonic()
        done = subprocess.run(_command(case, cache, folder), cwd=ROOT, env=_environment(case, cache, folder),
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
        counts = COUNTS.findall(done.stdout)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
        return row | {
            # All skipped is no success: the library was not loaded.
            "passed": done.returncode == 0 and bool(counts) and " passed" in counts[-1],
            "tests": counts[-1] if counts else "no test ran",
            "test_seconds": round(time.monotonic() - began, 1),
        }


def run_onnx(processor: portability_onnx.Processor, aarch64: Path | None) -> dict[str, object]:
    """Run exported models in onnxruntime on an emulated processor, where both are there; what came of it."""
    if aarch64 is None or shutil.which("qemu-aarch64") is None:
        return {"absent": "--aarch64 FOLDER" if aarch64 is None else "qemu-aarch64"}
    return portability_onnx.run(processor, aarch64)


def _compile(case: Case, work: Path, cache: Path, aarch64: Path | None) -> dict[str, object]:
    """Into `cache`, under the name by which the process that runs the tests looks for it."""
    torch_version = torch.__version__
    if aarch64:
        facts = (aarch64 / "site/torch/version.py").read_text()
        torch_version = re.findall(r"__version__ = '(.*)'", facts)[0]
    with (
        mock.patch.dict(os.environ, {"CXX": case.compiler}),
        mock.patch("platform.machine", return_value=case.machine),
        mock.patch.object(torch, "__version__", torch_version),
    ):
        recipe = compiling.BuildKey.of(case.instructions)
    if aarch64:
        # PyTorch's headers and libraries of that machine.
        site = aarch64 / "site/torch"
        patched = mock.patch.multiple(
            "torch.utils.cpp_extension",
            include_paths=lambda device: [str(site / "include"), str(site / "include/torch/csrc/api/include")],
            library_paths=lambda device: [str(site / "lib")],
        )
        # Those libraries need others, which are of no account here.
        recipe = replace(recipe, compiler=[*recipe.compiler, "-Wl,--unresolved-symbols=ignore-all"])
    else:
        patched = mock.patch.dict(os.environ)
    began = time.monotonic()
    with patched:
        library = compiling._compile(recipe, work, work.parent / "log")
    seconds = round(time.monotonic() - began, 1)
    folder = cache / "kernels" / recipe.folder
    folder.mkdir(parents=True)
    (folder / "build.json").write_text(json.dumps(compiling.facts(recipe, library, seconds)))
    shutil.copy(library, folder)
    sha256 = hashlib.sha256(b"".join(recipe.sources.values())).hexdigest()[:16]
    return {"compiled": True, "version": recipe.version, "compile_seconds": seconds, "sources": sha256,
            "library_bytes": library.stat().st_size, "torch": torch_version}  # fmt: skip


def _command(case: Case, cache: Path, aarch64: Path | None) -> list[str]:
    pytest = ["-m", "pytest", "--quiet", "--tb=short", *TESTS]
    if aarch64:
        # PyTorch's own products, which the reference uses: oneDNN has none of bfloat16 there, and says so once.
        pytest += ["-W", "ignore:mkldnn_matmul failed:UserWarning"]
    if not case.qemu:
        return [sys.executable, *pytest]
    emulator = [f"qemu-{case.machine}", "-cpu", case.qemu]
    if aarch64 is None:
        return [*emulator, sys.executable, *pytest]
    return [*emulator, "-L", str(aarch64 / "root"), str(aarch64 / "root/usr/bin/python3.11"), *pytest]


def _environment(case: Case, cache: Path, aarch64: Path | None) -> dict[str, str]:
    path = [str(ROOT / "src"), *([str(aarch64 / "site")] if aarch64 else [])]
    environment = os.environ | {
        "DIFFATTN_CACHE": str(cache),
        # No program of the other machine's runs here: any compiler's library of the cache is taken.
        "CXX": "/absent" if aarch64 else case.compiler,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "2",
    }
    if not case.qemu:
        # What PyTorch, oneDNN and MKL make of a processor that has more.
        isa = {"DEFAULT": ("default", "SSE41"), "AVX2": ("avx2", "AVX2")}.get(case.instructions)
        if isa:
            environment |= {"ATEN_CPU_CAPABILITY": isa[0], "ONEDNN_MAX_CPU_ISA": isa[1]}
    return environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--aarch64", type=Path, help="the folder that tools/aarch64_root.sh made")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    writer = Writer(options.out, keep=bool(options.only))
    aarch64 = options.aarch64.resolve() if options.aarch64 else None
    cases = {case.name: partial(run, case, aarch64) for case in CASES}
    for board, processor in portability_onnx.BOARDS.items():
        cases[f"onnxruntime, {board}, qemu {processor.qemu}"] = partial(run_onnx, processor, aarch64)
    failed = []
    for name, measured in cases.items():
        if options.only in name:
            row = measured()
            writer({"benchmark": "portability", "case": name, **row, **provenance("tools.portability")})
            failed += [name] if not row.get("passed", "absent" in row) else []
    if failed:
        sys.exit(f"tools.portability: failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
