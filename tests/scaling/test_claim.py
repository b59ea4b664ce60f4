"""The simulated ladders of docs/claim.md: their noise, their widths, and the rows that are committed."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import claim
from benchmarks.claim import Case, Noise

ROWS = claim.LADDER.with_name("claim.jsonl")
PAGE = Path(claim.__file__).parents[1] / "docs" / "claim.md"


def test_the_noise_of_planted_seeds_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for size in range(60):
        for seed in range(5):
            shared = rng.normal(0, 0.004)
            for attention in ("softmax", "diff_v1"):
                loss = 3 * np.exp(shared + rng.normal(0, 0.002))
                lines.append(
                    f'{{"hidden_size": {size}, "seed": {seed}, "attention": "{attention}", "val_loss": {loss}}}'
                )
    file = tmp_path / "ladder.jsonl"
    file.write_text("\n".join(lines))
    found = claim.measured_noise(file)
    assert found.shared == pytest.approx(0.004, rel=0.15)
    assert found.alone == pytest.approx(0.002, rel=0.15)


def test_without_noise_every_ladder_gives_the_papers_ratio() -> None:
    for form, ratio in (("floor", 0.626), ("power", 0.744)):
        found = claim.ratios(Case("the paper's five", 1, form), Noise(0, 0), draws=3)
        assert found == pytest.approx(ratio, abs=0.005)


def test_four_times_the_seeds_halve_the_interval() -> None:
    noise = Noise(0.0, 0.002)
    few, many = (
        claim.half_width(claim.ratios(Case("the paper's five", seeds, "power"), noise, draws=500))[2]
        for seeds in (5, 20)
    )
    assert few / many == pytest.approx(2, rel=0.2)


def test_the_rows_are_what_the_simulation_gives() -> None:
    rows = claim.read(ROWS)
    assert list(rows) == claim.design()
    noise = claim.measured_noise()
    for case in (Case("the paper's five", 10, "floor"), Case("and one larger", 5, "power", 0.5)):
        row = rows[case]
        assert (row["noise_shared"], row["noise_alone"]) == pytest.approx(
            (noise.shared * case.noise, noise.alone * case.noise)
        )
        again = claim.half_width(claim.ratios(case, noise, draws=400))[2]
        assert again == pytest.approx(row["half_width"], rel=0.15)


def test_the_cost_is_the_planners() -> None:
    row = claim.read(ROWS)[Case("the paper's five", 3, "floor")]
    assert row["gpu_hours"] == pytest.approx(3 * claim.gpu_hours(claim.PAPER))


def test_the_page_has_the_table_of_the_rows() -> None:
    table = claim.table(claim.read(ROWS))
    assert table in PAGE.read_text(encoding="utf-8"), table
