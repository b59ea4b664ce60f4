"""The findings: every study of a ladder's models, by variant and seed, and nothing twice."""

import json
import sys
from pathlib import Path

import pytest
from study.test_ladder import small, write_text

from benchmarks import findings
from diffattn.study.ladder import run_ladder
from diffattn.study.options import LongContextOptions, LowBitOptions

CASES = [
    findings.Case("low_bit", "low_bit", LowBitOptions(bits=(16, 4), context=16, samples=2)),
    findings.Case("long_context, short", "long_context", LongContextOptions(length=15, samples=2)),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_text(tmp_path)
    run_ladder(small(tmp_path, sizes=("7k",), variants=("diff_v1", "softmax")), out=tmp_path / "runs")
    monkeypatch.setattr(findings, "cases", lambda context: CASES)
    return tmp_path


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> list[dict]:
    arguments = ["--runs", str(folder / "runs"), "--text", str(folder / "text"), "--out", str(folder / "rows.jsonl")]
    monkeypatch.setattr(sys, "argv", ["findings", *arguments, *more])
    findings.main()
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_a_row_a_study_with_every_variant_over_its_seeds(folder, monkeypatch, capsys):
    rows = run(folder, monkeypatch, "--charts", str(folder / "charts"))
    assert [row["name"] for row in rows] == ["held-out loss", "low_bit", "long_context, short"]
    assert list(rows[0]["pairs"]) == ["diff_v1"]
    assert rows[0]["seeds"] == [0, 1]
    for row in rows[1:]:
        assert list(row["models"]) == ["softmax", "diff_v1"]
        assert all(len(model["folders"]) == 2 for model in row["models"].values())
        assert [Path(name).parent.name.split("-")[2] for name in row["models"]["diff_v1"]["folders"]] == [
            "seed0",
            "seed1",
        ]
        for point in row["points"]:
            assert point["models"]["diff_v1"]["values"] == 2
            assert point["models"]["diff_v1"]["difference"] is not None
        assert {"command", "versions", "machine"} <= row.keys()
    assert sorted(path.name for path in (folder / "charts").iterdir()) == ["long_context-short.png", "low_bit.png"]
    monkeypatch.setattr(findings, "evaluate", lambda *_, **__: pytest.fail("measured again"))
    assert run(folder, monkeypatch) == rows
    capsys.readouterr()
    run(folder, monkeypatch, "--table")
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("## ")] == [f"## {row['name']}" for row in rows]
    assert "| diff_v1 − softmax |" in printed


def test_what_was_not_trained_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["findings", "--runs", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"has no rows; wanted those of `make study`"):
        findings.main()


def test_prompts_leave_room_for_their_answers():
    for case in findings.cases(1024):
        if case.study == "retrieval":
            assert max(case.options.lengths) == 1008
    assert len({case.name for case in findings.cases(1024)}) == len(findings.cases(1024))
