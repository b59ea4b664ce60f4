"""The kernel's vectors in the eyes of other compilers and machines; `make portable` compiles and runs all of it."""

import platform
import shlex
import shutil
import subprocess

import pytest
from torch.utils.cpp_extension import include_paths

from diffattn.ops.cpu import compiling

# Whatever is a template, as the kernels use it.
PROGRAM = """
using namespace diffattn;
template <typename scalar>
void all(scalar* x, float* y, Words (&words)[kLanes]) {
  const Floats a = load(x), b = load_part(x, 3);
  store(x, exp2<exp_degree<scalar>>(maximum(a, b)));
  store_part(x, a, 3);
  sums_of_4(a, b, a, b, y);
  y[0] = sum(a);
  transpose(words);
}
void every(float* y, c10::BFloat16* bfloat16, c10::Half* half, Words (&words)[kLanes]) {
  all(y, y, words);
  all(bfloat16, y, words);
  all(half, y, words);
  store_pairs(bfloat16, store_as(y, load(half)), store_as(bfloat16, load(half)));
}
"""
COMPILERS = [
    *((name, "x86_64") for name in ("g++", "g++-11", "g++-12", "clang++", "clang++-14")),
    *((name, "aarch64") for name in ("g++", "clang++", "aarch64-linux-gnu-g++")),
]
CASES = [(*case, name) for case in COMPILERS for name in compiling.INSTRUCTION_SETS[case[1]]]


@pytest.mark.parametrize(("compiler", "machine", "instructions"), CASES)
def test_vectors(compiler: str, machine: str, instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each function of the header that needs no more of PyTorch than its numbers of half precision."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    if machine not in (compiler.split("-")[0], platform.machine()):
        pytest.skip(f"{compiler} is not told here to compile for {machine}")
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setenv("CXX", compiler)
    flags = [*shlex.split(compiling.BuildKey.of(instructions).flags), "-Werror", "-Wall", "-Wno-unknown-pragmas"]
    includes = [argument for path in include_paths("cpu") for argument in ("-isystem", path)]
    command = [compiler, *flags, "-fsyntax-only", *includes, "-x", "c++", "-I.", "-include", "vector.h", "-"]
    run = subprocess.run(command, cwd=compiling.SOURCES, input=PROGRAM, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
