"""The command of the findings: every study of a ladder's models, by variant and seed, and nothing twice."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from support.small_comparison import write_text
from support.small_ladder import small

from benchmarks import findings as command
from diffattn.probes.long_context import LongContextOptions
from diffattn.probes.low_bit import LowBitOptions
from diffattn.probes.options import EvaluateOptions
from diffattn.probes.run import evaluate
from diffattn.results.finding import Finding
from diffattn.scaling.ladder import run_ladder
from diffattn.scaling.rows import ROWS, read_rows
from diffattn.study import findings

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
    command.main()
    return read(folder / "rows.jsonl")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_row_a_model_and_study_read_together_over_seeds(folder, monkeypatch, capsys):
    rows = run(folder, monkeypatch, "--charts", str(folder / "charts"))
    assert len(rows) == 4 * len(CASES)
    assert {(row["model"]["attention"], row["model"]["seed"], row["name"]) for row in rows} == {
        (kind, seed, case.name) for kind in ("softmax", "diff_v1") for seed in (0, 1) for case in CASES
    }
    assert all({"command", "versions", "machine"} <= row.keys() for row in rows)
    losses, low_bit, long_context = findings.together([Finding.from_json(row) for row in rows])
    trained = read_rows(folder / "runs" / ROWS)
    of_v1 = [row.val_loss for row in trained if row.arm == "diff_v1"]
    assert losses.points[0].models["diff_v1"].mean == pytest.approx(sum(of_v1) / 2, rel=1e-5)
    words = [
        f"{kind}={','.join(str(next(folder.glob(f'runs/{kind}-*seed{seed}-*/model'))) for seed in (0, 1))}"
        for kind in ("softmax", "diff_v1")
    ]
    for case, study in zip(CASES, (low_bit, long_context), strict=True):
        assert study.seeds == {"softmax": [0, 1], "diff_v1": [0, 1]}
        at_once = evaluate(case.study, words, case.options, EvaluateOptions(text=str(folder / "text")))
        assert len(study.points) == len(at_once.points)
        for mine, theirs in zip(study.points, at_once.points, strict=True):
            assert (mine.panel, mine.x, mine.by) == (theirs.panel, theirs.x, theirs.by)
            wanted = theirs.models["diff_v1"].difference.to_json()
            assert mine.models["diff_v1"].difference.to_json() == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    assert sorted(path.name for path in (folder / "charts").iterdir()) == [
        "held-out-loss.png",
        "long_context-short.png",
        "low_bit.png",
    ]


def test_a_model_that_is_measured_may_be_deleted(folder, monkeypatch, capsys):
    rows = run(folder, monkeypatch)
    for model in (folder / "runs").glob("*/model"):
        shutil.rmtree(model)
    monkeypatch.setattr(findings, "evaluate", lambda *_, **__: pytest.fail("measured again"))
    assert run(folder, monkeypatch) == rows
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    capsys.readouterr()
    assert run(folder, monkeypatch) == rows[1:]
    assert "low_bit: the model of diff_v1, seed 0 is not in" in capsys.readouterr().err
    run(folder, monkeypatch, "--table")
    printed = capsys.readouterr().out
    titles = [line for line in printed.splitlines() if line.startswith("## ")]
    assert titles == ["## held-out loss", "## long_context, short", "## low_bit"]
    assert "| diff_v1 − softmax |" in printed


def test_what_was_not_trained_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["findings", "--runs", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"has no rows; wanted those of `make study`"):
        command.main()
