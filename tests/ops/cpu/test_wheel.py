"""The wheel with the compiled kernel, installed where no compiler is: `doctor` says that it serves, and it does."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from support.fused_cases import needs_the_kernel

from diffattn.ops.cpu import compiling, shipped
from tools import wheels

PROGRAM = """
import torch
from support.comparison import compare_forward_and_gradients, make_inputs
from diffattn.ops.cpu import build
from support.backends import fused_cpu_diff_attention
from diffattn.ops.reference import diff_attention_reference

print(build.unavailable(torch.float32))
for T, S in ((3, 70), (40, 150), (200, 200)):
    x = make_inputs(1, T, S, 4, 2, 24, 40, dtype=torch.float32)
    compare_forward_and_gradients(fused_cpu_diff_attention, diff_attention_reference, x)
print(build.status().path)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="auditwheel makes wheels for Linux")


@pytest.fixture(scope="module")
def without_compilers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment of a process that finds no program but Python's own, and no kernel of ours."""
    empty = tmp_path_factory.mktemp("empty")
    names = ("CXX", "DIFFATTN_FUSED", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return kept | {"PATH": str(empty), "DIFFATTN_CACHE": str(empty / "cache")}


@needs_the_kernel
@pytest.mark.skipif(shipped.torch_build() is None, reason=f"torch {torch.__version__} is not of the PyTorch project")
def test_it_serves_without_a_compiler(tmp_path: Path, without_compilers: dict[str, str]) -> None:
    # Of this processor's instruction set alone: it is in the cache, where the other tests use it from.
    instructions = compiling.BuildKey.of_this_machine().instructions
    wheel = wheels.build(tmp_path / "dist", [sys.executable], [instructions])
    assert wheel.name.startswith("diffattn-")
    assert "-py3-none-manylinux_2_" in wheel.name
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True, env=without_compilers)
    library = site / f"diffattn/ops/cpu/shipped/{shipped.torch_build()}/{instructions}/fused_cpu.so"

    def run(*arguments: str) -> str:
        environment = without_compilers | {"PYTHONPATH": f"{site}{os.pathsep}{Path(__file__).parents[2]}"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert "compil" not in done.stderr
        return done.stdout

    facts = json.loads(run("-m", "diffattn", "doctor", "--json"))
    kernel = facts["fused_cpu"]
    assert (kernel["compiler"], kernel["shipped"], kernel["path"]) == (None, True, str(library))
    assert "float32" in kernel["active"]
    assert facts["diff_attention"]["float32"] == "fused_cpu"
    reason, *_, path = run("-c", PROGRAM).splitlines()
    assert (reason, path) == ("None", str(library))
    assert not Path(without_compilers["DIFFATTN_CACHE"]).exists()


def test_pip_alone_compiles_nothing(
    tmp_path: Path, without_compilers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", without_compilers["PATH"])
    wheel = wheels.pure_wheel(tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith(".so") or "shipped/" in name]
    assert {f"diffattn/ops/cpu/csrc/{path.name}" for path in compiling.SOURCES.iterdir()} <= set(names)
