"""The findings: every study of a ladder's models, by variant and seed, and nothing twice."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from scaling.test_ladder import small, write_text

from benchmarks import findings
from diffattn.probes.options import LongContextOptions, LowBitOptions
from diffattn.probes.run import evaluate
from diffattn.scaling.ladder import ROWS, read_rows, run_ladder

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "findings.md"
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
    losses, low_bit, long_context = findings.together(rows)
    trained = read_rows(folder / "runs" / ROWS)
    of_v1 = [row["val_loss"] for row in trained if row["attention"] == "diff_v1"]
    assert losses["points"][0]["models"]["diff_v1"]["mean"] == pytest.approx(sum(of_v1) / 2, rel=1e-5)
    words = [
        f"{kind}={','.join(str(next(folder.glob(f'runs/{kind}-*seed{seed}-*/model'))) for seed in (0, 1))}"
        for kind in ("softmax", "diff_v1")
    ]
    for case, study in zip(CASES, (low_bit, long_context), strict=True):
        assert study["models"] == {"softmax": [0, 1], "diff_v1": [0, 1]}
        at_once = evaluate(case.study, words, case.options, text=str(folder / "text"))
        assert len(study["points"]) == len(at_once["points"])
        for mine, theirs in zip(study["points"], at_once["points"], strict=True):
            assert (mine["panel"], mine["x"], mine["by"]) == (theirs["panel"], theirs["x"], theirs["by"])
            for key in ("mean", "low", "high"):
                wanted = theirs["models"]["diff_v1"]["difference"][key]
                assert mine["models"]["diff_v1"]["difference"][key] == pytest.approx(wanted, rel=1e-3, abs=1e-4)
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
        findings.main()


@pytest.fixture(scope="module")
def tables() -> dict[str, str]:
    return findings.tables(read(RESULTS / "findings.jsonl"), read_rows(RESULTS / findings.ABLATION))


def test_the_page_has_the_tables_of_the_rows(tables):
    page = PAGE.read_text(encoding="utf-8")
    assert list(tables)[-1] == "ablation"
    for name, table in tables.items():
        assert table in page, name


def test_what_the_pages_cite_is_in_the_tables(tables):
    known = " ".join(tables.values())
    text = PAGE.read_text(encoding="utf-8") + (ROOT / "README.md").read_text(encoding="utf-8")
    cited = {number.replace("−", "-") for number in re.findall(r"[+−-]?\d+\.\d{3} ±\d+\.\d{3}", text)}
    assert len(cited) > 100
    assert [number for number in cited if number not in known] == []


def test_every_model_of_the_study_has_every_case():
    trained, rows = read_rows(RESULTS / "study.jsonl"), read(RESULTS / "findings.jsonl")
    assert len(trained) == 12
    wanted = {
        (case.name, row["attention"], row["seed"], findings.rounded(row["val_loss"]))
        for row in trained
        for case in findings.cases(1024)
    }
    measured = [
        (row["name"], row["model"]["attention"], row["model"]["seed"], row["model"]["val_loss"]) for row in rows
    ]
    assert sorted(measured) == sorted(wanted)


def row_of(study: str, points: list[list], **axes: str) -> dict:
    return {"study": study, "points": points, "axes": {"x": "depth", "y": "", "by": "", "logarithmic": False} | axes}


def test_brief_rows_average_over_depths():
    tasks = ("2 needles", "2 needles", "4 needles", "4 needles")
    values = {512: (0.0, 1.0, 0.5, 0.7), 1024: (0.2, 0.2, 0.0, 0.0)}
    points = [
        [task, index % 2, length, value]
        for length, row in values.items()
        for index, (task, value) in enumerate(zip(tasks, row, strict=True))
    ]
    (row,) = findings.brief([row_of("retrieval", points, by="tokens")])
    assert [point[:3] for point in row["points"]] == [
        ["all of these", 512, None],
        *([panel, 1024, None] for panel in ("2 needles", "4 needles", "all of these")),
    ]
    assert [point[3] for point in row["points"]] == pytest.approx([0.55, 0.2, 0.0, 0.1])
    assert row["axes"]["x"] == "tokens"
    (row,) = findings.brief([row_of("noise", [["answer", 0.0, None, 0.1], ["answer", 0.5, None, 0.3]])])
    assert row["points"] == [["answer", 0, None, pytest.approx(0.2)]]


def test_brief_rows_have_the_heads_that_see_the_answer():
    points = [["map_pos: answer", 0, 0, 0.1], ["map_neg: answer", 0, 0, 0.6], ["map_neg: answer", 1, 0, 0.2],
              ["map_neg: noise", 0, 0, 0.9], ["answer", 0, 0, -70.0], ["answer", 1, 0, 3.0]]  # fmt: skip
    (row,) = findings.brief([row_of("noise_by_head", points)])
    assert {point[0]: point[3] for point in row["points"]} == {
        "largest share, map_pos": 0.1,
        "largest share, map_neg": 0.6,
        "heads above 0.1, map_pos": 0,
        "heads above 0.1, map_neg": 2,
    }
    (row,) = findings.brief([row_of("noise_by_head", [["answer", 0, 0, 0.2], ["answer", 1, 0, 0.4]])])
    assert {point[0]: point[3] for point in row["points"]} == {
        "largest share, map_pos": 0.4,
        "heads above 0.1, map_pos": 2,
    }


def test_brief_rows_have_what_fewer_bits_change():
    points = [["loss, nats per token", 16, None, 4.0], ["loss, nats per token", 4, None, 4.5]]
    (row,) = findings.brief([row_of("low_bit", points)])
    assert row["points"] == [points[0], ["change of loss, in 0.001", 4, None, 500.0]]


def test_training_loss_is_by_stage_of_the_mixture():
    metrics = [{"step": step, "tokens": 100 * step, "loss": float(step <= 30)} for step in range(1, 101)]
    points = findings.training_loss([*metrics, {"step": 100, "tokens": 10_000, "val_loss": 9.0}], 100)["points"]
    assert [point["x"] for point in points] == [16, 32, 64, 128, 256, 512, 100]
    assert [point["models"]["model"]["mean"] for point in points] == [1.0] + [0.0] * 6


def test_cases_have_names_of_their_own():
    assert len({case.name for case in findings.cases(1024)}) == len(findings.cases(1024))
