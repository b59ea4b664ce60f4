"""The kernel as it is compiled for, and runs on, processors with fewer instructions than this one may have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from comparison import compare_forward_and_gradients, make_inputs
from diffattn.ops import build
from diffattn.ops.fused_cpu import fused_cpu_diff_attention
from diffattn.ops.reference import diff_attention_reference

print(torch.backends.cpu.get_cpu_capability(), build.status().capability)
for dtype in (torch.float32, torch.bfloat16):
    reason = build.unavailable(dtype)
    print(dtype, reason)
    if reason is None:
        for T, S in ((3, 70), (40, 150), (200, 200)):
            x = make_inputs(1, T, S, 4, 2, 24, 40, dtype=dtype)
            compare_forward_and_gradients(fused_cpu_diff_attention, diff_attention_reference, x)
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel serves Linux")
@pytest.mark.parametrize(("capability", "instructions"), [("avx2", "AVX2"), ("default", "SSE41")])
def test_older_processors(capability: str, instructions: str, tmp_path: Path) -> None:
    """PyTorch and oneDNN pretend to run on one: float32 is as right as ever, bfloat16 is refused with a reason."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ
        | {
            "ATEN_CPU_CAPABILITY": capability,
            "ONEDNN_MAX_CPU_ISA": instructions,
            "DIFFATTN_CACHE": str(tmp_path),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    if "could not be compiled" in run.stdout:
        pytest.skip(run.stdout.splitlines()[-1])
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(capability.upper())
    assert "torch.float32 None" in run.stdout
    assert "no working bfloat16 matrix products; cast the inputs to float32" in run.stdout
    assert run.stdout.endswith("done\n")
