"""Runs tests in Triton's interpreter, which is switched on before Triton and the kernels are imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def run_in_interpreter(tests: Path, *, at_least: int, **environment: str) -> None:
    """Runs a file of tests in a process of its own, and asserts that so many passed, and none failed or was skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:xdist", tests]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"} | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= at_least
    assert "skipped" not in done.stdout
