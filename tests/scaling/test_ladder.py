"""The ladder: its rows, what is skipped, and what is refused."""

import json
from pathlib import Path

import pytest
from support.small_comparison import write_text
from support.small_ladder import small

from diffattn.cli.main import main
from diffattn.errors import ConfigError, DataError
from diffattn.intervals import paired_difference
from diffattn.plan.cost import count_parameters
from diffattn.scaling.ladder import run_ladder
from diffattn.scaling.options import LadderOptions, learning_rate_for
from diffattn.scaling.rows import read_rows
from diffattn.scaling.runs import LadderProgress

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "benchmarks" / "results" / "ladder.jsonl"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_text(tmp_path)
    return tmp_path


def test_rows_pair_variants_at_every_size_and_are_not_trained_twice(text: Path) -> None:
    seen: list[LadderProgress] = []
    rows = run_ladder(small(text), out=text / "out", on_progress=seen.append)
    assert [(row.hidden_size, row.seed, row.arm) for row in rows] == [
        (width, seed, attention)
        for width in (16, 32)
        for seed in (0, 1)
        for attention in ("softmax", "diff_v1", "diff_v2")
    ]
    for row in rows:
        # 100 tokens are 3.1 steps of 2 × 16.
        assert row.tokens == 128
        assert row.parameters == row.non_embedding_parameters + 300 * row.hidden_size
        assert 0 < row.val_loss < 10
        assert row.learning_rate == 1e-2
    for soft, v1, v2 in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert 0 < v1.parameters - soft.parameters < 0.02 * soft.parameters
        assert v2.parameters == pytest.approx(soft.parameters, rel=0.005)
    assert len({row.val_loss for row in rows}) == len(rows)
    assert [progress.done for progress in seen if progress.step is None] == list(range(12))
    assert seen[0].seconds_left is None
    assert all(progress.seconds_left is not None for progress in seen[1:])
    assert seen[1].seconds_left > 0
    assert seen[-1].seconds_left == 0

    again: list[LadderProgress] = []
    assert run_ladder(small(text), out=text / "out", on_progress=again.append) == rows
    assert not again
    # Rows alone are enough to go on; a third seed adds its own.
    moved = text / "moved"
    moved.mkdir()
    (moved / "rows.jsonl").write_text((text / "out/rows.jsonl").read_text())
    more = run_ladder(small(text, seeds=3, sizes=("7k",)), out=moved, on_progress=again.append)
    assert more[:6] == rows[:6]
    assert [row.seed for row in more[6:]] == [2, 2, 2]


def test_a_run_that_was_cut_ends_at_the_loss_of_an_uninterrupted_one(text: Path) -> None:
    options = {"sizes": ("38k",), "seeds": 1, "variants": ("diff_v1",)}
    whole = run_ladder(small(text, **options), out=text / "whole")

    def cut(progress: LadderProgress) -> None:
        if progress.step is not None and progress.step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ladder(small(text, **options), out=text / "cut", on_progress=cut)
    assert not read_rows(text / "cut/rows.jsonl")
    rows = run_ladder(small(text, **options), out=text / "cut")
    assert [row.val_loss for row in rows] == [row.val_loss for row in whole]


def test_json_prints_the_rows_as_one_object(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = f"scale run --sizes 7k --tokens 64 --seeds 1 --variants softmax --vocab-size 300 --context 16 \
        --text {text / 'text'} --out {text / 'out'} --json"
    assert main(arguments.split()) == 0
    (row,) = read_rows(text / "out/rows.jsonl")
    assert json.loads(capsys.readouterr().out) == {"rows": [row.to_json()], "missing": []}
    assert (text / "out/rows.jsonl").read_text() == json.dumps(row.to_json()) + "\n"


def test_the_learning_rate_falls_with_the_cube_root_of_the_size(text: Path) -> None:
    assert learning_rate_for(10**6) / learning_rate_for(8 * 10**6) == 2
    assert learning_rate_for(100) == 1e-2
    options = small(text, learning_rate=1e-3)
    rates = [options.recipe(shape, 0).learning_rate for shape in options.shapes()]
    assert rates == [1e-3, 1e-3]


def test_the_default_sizes_are_those_that_they_say() -> None:
    wanted = (200e3, 550e3, 1.2e6, 1.9e6, 4.2e6)
    counts = [count_parameters(shape, "softmax").non_embedding for shape in LadderOptions().shapes()]
    assert counts == [pytest.approx(size, rel=0.03) for size in wanted]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sizes": ()}, "sizes is empty"),
        ({"sizes": ("200k", "210k")}, "the same nearest shape"),
        ({"sizes": ("many",)}, "'many' given as a count; wanted a whole number from 1"),
        ({"sizes": ("1",)}, "1 non-embedding parameters .*; wanted from"),
        ({"tokens": "0"}, "'0' given as a count; wanted a whole number from 1"),
        ({"variants": ("soft",)}, "wanted names of softmax, softmax.wide_heads"),
        ({"variants": ("softmax", "softmax")}, "wanted at least one, each once"),
        ({"seeds": 0}, "seeds is 0; wanted a number from 1"),
        ({"match": "size"}, "match is 'size'.*parameters, shape"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
    ],
)
def test_bad_options_are_one_line(text: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        run_ladder(small(text, **changes), out=text / "out")
    assert "\n" not in str(caught.value)
    assert not (text / "out").exists()


def test_a_damaged_row_is_named_and_nothing_is_trained(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = text / "out"
    out.mkdir()
    (out / "rows.jsonl").write_text('{"attention": "softmax"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl line 1 is damaged .it has no seed.; wanted a row of a ladder"):
        run_ladder(small(text), out=out)
    arguments = f"scale run --sizes 7k --vocab-size 300 --text {text / 'text'} --out {out}"
    assert main(arguments.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in out.iterdir() if path.is_dir()] == []


def test_the_committed_rows_are_of_the_default_ladder() -> None:
    rows = read_rows(MEASURED)
    sizes = {shape.hidden_size: count_parameters(shape, "softmax").non_embedding for shape in LadderOptions().shapes()}
    assert rows
    for row in rows:
        assert row.command.startswith("diffattn scale run --text ")
        assert row.non_embedding_parameters == pytest.approx(sizes[row.hidden_size], rel=0.01)
        assert row.learning_rate == learning_rate_for(sizes[row.hidden_size])
        assert row.tokens >= 8e6


def test_the_page_has_the_table_of_the_committed_rows() -> None:
    kinds = ("softmax", "diff_v1", "diff_v2")
    found: dict[int, dict[str, list[float]]] = {}
    for row in sorted(read_rows(MEASURED), key=lambda row: (row.hidden_size, row.seed)):
        found.setdefault(row.hidden_size, {}).setdefault(row.arm, []).append(row.val_loss)
    sizes = {row.hidden_size: row.non_embedding_parameters for row in read_rows(MEASURED) if row.arm == "softmax"}
    found[0] = {
        kind: [sum(found[width][kind][seed] for width in sizes) / len(sizes) for seed in range(3)] for kind in kinds
    }
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for width, losses in found.items():
        cells = [f"{sizes[width] / 1e6:.2f} M" if width else "mean of the five, by seed"]
        cells += [f"{sum(losses[kind]) / 3:.3f}" for kind in kinds]
        for kind in kinds[1:]:
            gap = paired_difference(losses[kind], losses["softmax"])
            cells.append(f"{gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})".replace("-", "−"))
        assert f"| {' | '.join(cells)} |" in page
