"""The Triton kernels against the definition in float64, in Triton's interpreter, where Triton is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: its interpreter runs the kernels"
)
# Relative errors, ‖x − definition‖ / ‖definition‖: float32 sums in another order, and rounding of p to half precision.
ALLOWED = {"torch.float32": 1e-6, "torch.float16": 1e-3, "torch.bfloat16": 1e-2}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    script = Path(__file__).with_name("interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_outputs_and_gradients_are_the_definition(rows: list[dict]) -> None:
    # Written so that NaN fails.
    wrong = [row for row in rows if not all(error <= ALLOWED[row["dtype"]] for error in row["errors"].values())]
    assert not wrong
    assert len(rows) > 25


def test_swapped_maps_are_told_apart(rows: list[dict]) -> None:
    assert all(row["swapped"] > 10 * ALLOWED[row["dtype"]] for row in rows if "swapped" in row)
