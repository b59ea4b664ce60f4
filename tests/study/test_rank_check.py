"""The planner's bytes of one rank against real ranks, and against the rows of the benchmark."""

from pathlib import Path

import pytest
from support import measured_ranks
from support.ranks import run_ranks

from benchmarks import plan_ranks
from diffattn.errors import ConfigError
from diffattn.plan.setting import Setting
from diffattn.plan.shape import ModelShape
from diffattn.study.rank_check import measure_ranks

ROWS = Path(plan_ranks.__file__).with_name("results") / "plan_ranks.jsonl"
PAGE = Path(plan_ranks.__file__).parents[1] / "docs" / "plan.md"


def test_real_ranks_hold_what_is_predicted() -> None:
    cases = [
        ("diff_v1", {"ranks": 2, "shard": "full"}),
        ("diff_v2", {"ranks": 2, "precision": "fp32"}),
        ("softmax", {"ranks": 2, "tp": 2, "checkpointing": True}),
    ]
    for rank in run_ranks(measured_ranks.measured, 2, cases):
        for rows in rank:
            *exact, peak = rows
            assert [row.predicted for row in exact] == [row.measured for row in exact]
            assert all(row.exact and row.measured > 0 for row in exact)
            assert 0.9 < peak.ratio < 1.1, peak


def test_another_number_of_ranks_is_refused() -> None:
    setting = Setting(context=8, batch=2, precision="fp32", ranks=2)
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2 -m diffattn plan"):
        measure_ranks(ModelShape.preset("300K"), "softmax", setting)


def test_a_precision_that_train_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    setting = Setting(context=8, batch=2, precision="bf16", ranks=2)
    with pytest.raises(ConfigError, match="float32 or autocast"):
        measure_ranks(ModelShape.preset("300K"), "softmax", setting)


def test_the_command_measures_on_the_ranks_that_there_are() -> None:
    words = ("plan", "--model", "softmax:300K", "--context", "32", "--batch", "2", "--dtype", "float32", "--measure")
    assert run_ranks(measured_ranks.command, 2, *words) == [0, 0]


def test_the_measured_rows_are_predicted() -> None:
    rows = plan_ranks.read(ROWS)
    assert set(plan_ranks.design()) == rows.keys()
    for case, measured in rows.items():
        assert 0.95 < case.predicted() / measured < 1.05, case


def test_the_page_has_the_table_of_the_rows() -> None:
    table = plan_ranks.table(plan_ranks.read(ROWS))
    assert table in PAGE.read_text(encoding="utf-8"), table
