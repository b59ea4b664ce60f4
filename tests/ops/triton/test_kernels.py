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


def is_right(row: dict) -> bool:
    # Written so that NaN fails.
    return all(error <= row["allowed"] for error in row["errors"].values())


def interpreted(*arguments: str, timeout: int = 280) -> list[dict]:
    command = [sys.executable, str(Path(__file__).with_name("interpreted.py")), *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return interpreted()


def test_outputs_and_gradients_are_the_definition(rows: list[dict]) -> None:
    right = [row for row in rows if "known_wrong" not in row]
    assert [row for row in right if not is_right(row)] == []
    assert len(right) > 70


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_noise_heads_shared_in_every_way_under_every_mask() -> None:
    swept = interpreted("--sweep", timeout=1200)
    assert [row for row in swept if not is_right(row)] == []
    assert len(swept) == 72


def test_every_mistake_in_a_kernel_is_found(rows: list[dict]) -> None:
    wrong = [row for row in rows if "known_wrong" in row]
    assert [row["case"] for row in wrong if is_right(row)] == []
    assert len(wrong) == 13


def test_two_runs_give_the_same_bits(rows: list[dict]) -> None:
    assert [row["case"] for row in rows if not row.get("same_bits", True)] == []
    assert any("same_bits" in row for row in rows)


def test_what_no_program_writes_stays_poisoned(rows: list[dict]) -> None:
    (row,) = [row for row in rows if row["case"] == "80,000 heads"]
    assert row["unwritten"]


@pytest.mark.full
def test_the_suite_of_a_gpu_runs_in_the_interpreter() -> None:
    """Small, so that what a GPU will run has run before, and has found nothing."""
    suite = Path(__file__).with_name("test_on_gpu.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
