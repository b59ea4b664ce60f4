"""The findings: the tables of the committed rows, and what they keep of many points."""

import json
import re
from pathlib import Path

import pytest

from diffattn.results.finding import Finding, MeanPoint, TrainedModel
from diffattn.results.study import Axes
from diffattn.scaling.rows import read_rows
from diffattn.study import findings

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "findings.md"


def committed() -> list[Finding]:
    lines = (RESULTS / "findings.jsonl").read_text(encoding="utf-8").splitlines()
    return [Finding.from_json(json.loads(line)) for line in lines]


def test_the_committed_rows_are_written_back_as_they_were_read():
    for line in (RESULTS / "findings.jsonl").read_text(encoding="utf-8").splitlines():
        assert line.startswith(json.dumps(Finding.from_json(json.loads(line)).to_json()).removesuffix("}"))


@pytest.fixture(scope="module")
def tables() -> dict[str, str]:
    return findings.tables(committed(), read_rows(RESULTS / "ablation.jsonl"))


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
    trained, rows = read_rows(RESULTS / "study.jsonl"), committed()
    assert len(trained) == 12
    wanted = {
        (case.name, row.arm, row.seed, findings.rounded(row.val_loss))
        for row in trained
        for case in findings.cases(1024)
    }
    assert sorted((row.name, row.model.arm, row.model.seed, row.model.val_loss) for row in rows) == sorted(wanted)
    assert {row.model for row in rows} == {findings.facts(row) for row in trained}


def row_of(study: str, points: list[list], **axes: str) -> Finding:
    model = TrainedModel(
        arm="softmax", seed=0, tokens=1, learning_rate=1.0, data_digest="d", val_loss=1.0, parameters=1
    )
    words = {"x": "depth", "y": "", "by": "", "logarithmic": False} | axes
    return Finding(
        name=study, model=model, study=study, asked=None, axes=Axes(**words),
        points=[MeanPoint(*point) for point in points],
    )  # fmt: skip


def brief(row: Finding) -> Finding:
    (found,) = findings.brief([row])
    return found


def means(row: Finding) -> dict[str, float]:
    return {point.panel: point.mean for point in row.points}


def test_brief_rows_average_over_depths():
    tasks = ("2 needles", "2 needles", "4 needles", "4 needles")
    values = {512: (0.0, 1.0, 0.5, 0.7), 1024: (0.2, 0.2, 0.0, 0.0)}
    points = [
        [task, index % 2, length, value]
        for length, row in values.items()
        for index, (task, value) in enumerate(zip(tasks, row, strict=True))
    ]
    row = brief(row_of("retrieval", points, by="tokens"))
    assert [(point.panel, point.x, point.by) for point in row.points] == [
        ("all of these", 512, None),
        *((panel, 1024, None) for panel in ("2 needles", "4 needles", "all of these")),
    ]
    assert [point.mean for point in row.points] == pytest.approx([0.55, 0.2, 0.0, 0.1])
    assert row.axes.x == "tokens"
    row = brief(row_of("noise", [["answer", 0.0, None, 0.1], ["answer", 0.5, None, 0.3]]))
    assert row.points == [MeanPoint("answer", 0, None, pytest.approx(0.2))]


def test_brief_rows_have_the_heads_that_see_the_answer():
    points = [["map_pos: answer", 0, 0, 0.1], ["map_neg: answer", 0, 0, 0.6], ["map_neg: answer", 1, 0, 0.2],
              ["map_neg: noise", 0, 0, 0.9], ["answer", 0, 0, -70.0], ["answer", 1, 0, 3.0]]  # fmt: skip
    assert means(brief(row_of("noise_by_head", points))) == {
        "largest share, map_pos": 0.1,
        "largest share, map_neg": 0.6,
        "heads above 0.1, map_pos": 0,
        "heads above 0.1, map_neg": 2,
    }
    assert means(brief(row_of("noise_by_head", [["answer", 0, 0, 0.2], ["answer", 1, 0, 0.4]]))) == {
        "largest share, map_pos": 0.4,
        "heads above 0.1, map_pos": 2,
    }


def test_brief_rows_have_what_fewer_bits_change():
    points = [["loss, nats per token", 16, None, 4.0], ["loss, nats per token", 4, None, 4.5]]
    row = brief(row_of("low_bit", points))
    assert row.points == [MeanPoint(*points[0]), MeanPoint("change of loss, in 0.001", 4, None, 500.0)]


def test_training_loss_is_by_stage_of_the_mixture():
    metrics = [{"step": step, "tokens": 100 * step, "loss": float(step <= 30)} for step in range(1, 101)]
    points, _ = findings.training_loss([*metrics, {"step": 100, "tokens": 10_000, "val_loss": 9.0}], 100)
    assert [point.x for point in points] == [16, 32, 64, 128, 256, 512, 100]
    assert [point.mean for point in points] == [1.0] + [0.0] * 6


def test_cases_have_names_of_their_own():
    assert len({case.name for case in findings.cases(1024)}) == len(findings.cases(1024))
