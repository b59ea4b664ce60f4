"""Models under `diff_fused` whose attention the Triton kernels serve: their tests run in Triton's interpreter."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from support.interpreter import run_in_interpreter

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: its interpreter runs the kernels"
)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_in_the_interpreter() -> None:
    # The CPU kernel would serve before the Triton kernels.
    run_in_interpreter(Path(__file__).with_name("interpreted_fused.py"), at_least=19, DIFFATTN_FUSED="0")
