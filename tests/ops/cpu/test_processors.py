"""The kernel as it is compiled for, and runs on, processors with fewer instructions than this one may have."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.fused_cases import needs_the_kernel

from diffattn.ops.cpu import build

PROGRAM = """
import torch
from support.comparison import compare_forward_and_gradients, make_inputs
from support.fused_cases import nearly_equal_maps
from support.known_wrong import assert_rejects_known_wrong
from diffattn.ops.cpu import build
from support.backends import fused_cpu_diff_attention
from diffattn.ops.reference import diff_attention_reference

print(torch.backends.cpu.get_cpu_capability(), build.status().capability)
for dtype in build.DTYPES:
    print(dtype, build.unavailable(dtype))
    for T, S in ((3, 70), (17, 17), (40, 150), (200, 200)):
        for one_key in (False, True):
            x = make_inputs(1, T, S, 4, 2, 24, 40, dtype=dtype, one_key=one_key)
            compare_forward_and_gradients(fused_cpu_diff_attention, diff_attention_reference, x)
            assert_rejects_known_wrong(x)
    compare_forward_and_gradients(fused_cpu_diff_attention, diff_attention_reference, nearly_equal_maps(x))
# Gradients that are summed span by span, and widths that are odd.
compare_forward_and_gradients(
    fused_cpu_diff_attention, diff_attention_reference, make_inputs(1, 70, 1100, 2, 1, 255, 256, dtype=torch.bfloat16)
)
print(build.status().bf16_products, "done")
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel serves Linux")
@pytest.mark.parametrize(("capability", "instructions"), [("avx2", "AVX2"), ("default", "SSE41")])
def test_older_processors(capability: str, instructions: str, tmp_path: Path) -> None:
    """PyTorch and oneDNN pretend to run on one: every dtype is as right as ever, with products of float32."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ
        | {
            "ATEN_CPU_CAPABILITY": capability,
            "ONEDNN_MAX_CPU_ISA": instructions,
            "DIFFATTN_CACHE": str(tmp_path),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    if "could not be compiled" in run.stdout:
        pytest.skip(run.stdout.splitlines()[-1])
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(capability.upper())
    assert all(f"torch.{dtype} None" in run.stdout for dtype in ("float32", "bfloat16", "float16"))
    assert run.stdout.endswith("False done\n")
    (library,) = (tmp_path / "kernels").glob("*/fused_cpu.so")
    assert_compares_vectors(library)


@needs_the_kernel
def test_this_processor() -> None:
    path = build.status().path
    assert path is not None
    assert_compares_vectors(Path(path))


def assert_compares_vectors(library: Path) -> None:
    """No function compares numbers one by one: a vector wider than the registers would make that of each comparison.

    Where vectors of sixteen were split for AVX2, the loop of exponentials alone had hundreds. What is left are maxima
    of single rows, and numbers that are rounded one by one.
    """
    if shutil.which("objdump") is None:
        pytest.skip("objdump not found, which lists the instructions")
    command = ["objdump", "-d", "--no-show-raw-insn", library]
    listing = subprocess.run(command, capture_output=True, text=True, check=True)
    counts: Counter[str] = Counter()
    name = ""
    for line in listing.stdout.splitlines():
        if line.endswith(">:"):
            name = line
        elif re.search(r"\s(v?u?comiss|v?cmp\w*ss|fcmpe?\s+s\d)", line):
            counts[name] += 1
    print(counts.most_common(5))
    assert listing.stdout.count(">:") > 50
    assert not {name: count for name, count in counts.items() if count > 16}
