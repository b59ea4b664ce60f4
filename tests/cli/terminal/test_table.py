"""Every table of every verb at 80 columns and fewer: no line is too long, no word is broken, nothing is cut."""

import io
from collections.abc import Sequence

import pytest
import rich.console
from rich.cells import cell_len
from support.synthetic_comparison import comparison

from diffattn.cli.main import main
from diffattn.cli.plan import measured_table
from diffattn.cli.terminal import screen as of_screen
from diffattn.cli.terminal.screen import screen, wrapped
from diffattn.cli.terminal.table import parts, show
from diffattn.plan.answer import plan
from diffattn.plan.search import fits, sweep
from diffattn.plan.setting import Setting
from diffattn.plan.text import backend_table, fits_table, sweep_table, table
from diffattn.report.compare_table import compare_rows
from diffattn.report.scaling_page import equivalence_rows, number_rows
from diffattn.report.study_chart import study_rows
from diffattn.results.interval import Interval
from diffattn.results.study import Axes, ModelPoint, PointResult, StudyTable
from diffattn.scaling.fit import fit_scaling
from diffattn.study.plan_check import MeasuredRow

LONG = "a-checkpoint-with-a-rather-long-name"


def study() -> StudyTable:
    entry = ModelPoint(
        mean=-0.1234, low=-0.2, high=-0.05, values=3, difference=Interval(0.0123, -0.1, 0.12), is_first=False
    )
    names = ["softmax", "diff_v1", "diff_v2", "gated"]
    points = [
        PointResult(panel=panel, by=0.25, x=x, models=dict.fromkeys(names, entry))
        for panel in ("attention to the answer", "attention to the text around it")
        for x in (1024, 2048)
    ]
    axes = Axes(x="tokens", y="share of attention", by="depth", logarithmic=True)
    return StudyTable(study="noise", names=names, points=points, axes=axes)


def ablation() -> list[list[str]]:
    row = [
        "diff_v1+lambda_init_0.8",
        "1.20 M",
        "3.4567",
        "diff_v1",
        "+0.0123",
        "−0.0012 to +0.0234 (3 seeds)",
        "no difference seen",
    ]
    return [["arm", "parameters", "loss", "against", "difference", "95% interval", ""], row, ["softmax", *row[1:]]]


@pytest.fixture(scope="module")
def tables() -> dict[str, Sequence[Sequence[str]]]:
    pair = plan("diff_v1:6.8B", "softmax:11B", Setting(batch=2, ranks=2, shard="full"))
    scaling = fit_scaling("figure3a", at=(6.8e9, 13.1e9), bootstrap=100)
    measured = [
        MeasuredRow(what="peak of training, checkpointing", unit="bytes", predicted=1e9, measured=9e8, exact=False)
    ]
    return {
        "plan": table(pair),
        "plan of one": table(plan("gated:1.4B")),
        "backends": backend_table(pair.backends),
        "backends of a checkpoint": [
            [LONG if ":" in cell else cell for cell in row] for row in backend_table(pair.backends)
        ],
        "sweep": sweep_table(sweep("context=1k:1M")),
        "fits": fits_table(fits("40MiB", "diff_v1:300K", Setting(context=64))),
        "measured": measured_table(measured),
        "equal losses": equivalence_rows(scaling),
        "fitted numbers": number_rows(scaling),
        "compare": compare_rows(comparison(seeds=3)),
        "eval": study_rows(study()),
        "ablation": ablation(),
    }  # fmt: skip


def shown(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    file = io.StringIO()
    show(rows, rich.console.Console(file=file, width=width, highlight=False))
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 60, 40])
def test_every_table_is_readable(tables: dict[str, Sequence[Sequence[str]]], width: int) -> None:
    for name, rows in tables.items():
        lines = shown(rows, width)
        assert max(map(cell_len, lines)) <= width, name
        words = {word for line in lines for word in line.split()}
        for row in rows:
            for cell in row:
                # A title before its value ends in a colon where each row has lines of its own.
                assert all(word in words or f"{word}:" in words for word in cell.split()), (name, cell)
        assert not any("…" in line for line in lines)


@pytest.mark.parametrize("width", [80, 60])
def test_numbers_and_their_units_stay_together(tables: dict[str, Sequence[Sequence[str]]], width: int) -> None:
    for name in ("plan", "backends", "sweep", "fits", "compare", "eval"):
        text = "\n".join(shown(tables[name], width))
        for row in tables[name][1:]:
            for cell in row[1:]:
                assert len(cell) > 24 or cell in text, (name, cell)


def test_a_table_that_fits_is_one_table(tables: dict[str, Sequence[Sequence[str]]]) -> None:
    assert len(parts(tables["backends"], 100)) == 1
    assert len(parts(tables["backends"], 80)) == 2
    assert len(parts(tables["plan"], 80)) == 1


def test_every_part_says_which_row_is_which() -> None:
    rows = [["model", "backend", *(f"column-{number}" for number in range(9))]]
    rows += [[model, backend, *["12.5 GiB"] * 9] for model in ("one", "two") for backend in ("fused", "standard")]
    found = parts(rows, 60)
    assert len(found) > 1
    assert {tuple(part[0][:2]) for part in found} == {("model", "backend")}
    assert [name for part in found for name in part[0][2:]] == rows[0][2:]
    assert {len(part) for part in found} == {5}


def test_what_looks_like_markup_is_text() -> None:
    assert any("[bold] :smile:" in line for line in shown([["name", "size"], ["[bold] :smile:", "8.00 GiB"]], 80))


def test_a_table_without_rows_is_its_header() -> None:
    assert any("name" in line for line in shown([["name", "size"]], 80))


def test_words_longer_than_the_terminal_are_lines_of_their_own() -> None:
    path = "/home/someone/" + "x" * 90
    lines = shown([["model", "size"], [path, "8.00 GiB"], [path + "y", "9.00 GiB"]], 40)
    assert any(path in line for line in lines)
    assert any("size: 8.00 GiB" in line for line in lines)


def test_a_pipe_has_80_columns_or_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert screen().width == of_screen.WIDTH == 80
    monkeypatch.setenv("COLUMNS", "120")
    assert screen().width == 120
    for odd in ("0", "-3", "wide", ""):
        monkeypatch.setenv("COLUMNS", odd)
        assert screen().width in (80, of_screen.LEAST)


def test_sentences_wrap_between_words_and_keep_a_number_with_its_unit() -> None:
    text = "the weights take 12.7 GiB of 80 GiB, and E 2.81 is where diff_v1:6.8B ends " * 3
    for width in range(20, 60):
        lines = wrapped(text, width).split("\n")
        assert " ".join(lines) == text.strip()
        assert max(map(len, lines)) <= width
        assert not any(line.endswith(("12.7", "80", " E")) for line in lines)


@pytest.mark.parametrize("columns", ["80", "60"])
def test_the_plan_answers_first_and_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    options = ["--sweep", "context=1k:4k", "--fits", "24GB", "--machine", "rtx 3060", "--precision", "BF16"]
    assert main(["plan", "--model", "V1:6.8b", "--against", "11B", *options]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert max(map(cell_len, lines)) <= int(columns)
    text = " ".join(" ".join(lines).split())
    taken = "auto (diff_v1:6.8B: fused_triton, softmax:11B: standard)"
    assert text.startswith(f"machine: RTX 3060 12GB; context: 4,096; batch: 1; precision: bf16; backend: {taken}")
    assert "'V1:6.8b' is planned as diff_v1:6.8B" in text
    assert "The most that 22.4 GiB (24,000,000,000 bytes) hold:" in text
    answers = [text.index(words) for words in ("diff_v1:6.8B has 62%", "From training to inference", "On disk")]
    assert answers == sorted(answers)
    assert answers[-1] < text.index("Training peak memory")
    for sentence in plan("diff_v1:6.8B", "softmax:11B", Setting(machine="RTX 3060 12GB", precision="bf16")).sentences:
        assert sentence in text


def test_the_main_jobs_table_is_one_where_the_seeds_stand_below_their_mean() -> None:
    lines = shown(compare_rows(comparison(seeds=2)), 80)
    assert sum("softmax" in line for line in lines) == 1
    assert all(name in lines[1] for name in ("softmax", "diff_v1", "diff_v2"))
    loss = next(place for place, line in enumerate(lines) if line.startswith("Held-out loss"))
    assert lines[loss].count("(") == 1  # that of the unit
    assert lines[loss + 1].count("(") == 3
