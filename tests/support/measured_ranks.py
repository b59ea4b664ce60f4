"""Functions that tests/study/test_rank_check.py runs on ranks."""

from __future__ import annotations

from typing import Any

from diffattn.cli.main import main
from diffattn.plan.setting import Setting
from diffattn.plan.shape import ModelShape
from diffattn.study.plan_check import MeasuredRow
from diffattn.study.rank_check import measure_ranks

# A number of symbols and a width that no rank divides.
SHAPE = ModelShape(
    hidden_size=96, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=16, intermediate_size=257, vocab_size=301
)


def measured(cases: list[tuple[str, dict[str, Any]]]) -> list[list[MeasuredRow]]:
    """Measures models of SHAPE, one after another, each with its own changes of the setting."""
    common = {"context": 96, "batch": 4, "precision": "autocast", "backend": "standard"}
    return [measure_ranks(SHAPE, attention, Setting(**common | changes)) for attention, changes in cases]


def command(*words: str) -> int:
    """Runs the command line on this rank and returns its exit status."""
    return main(list(words))
