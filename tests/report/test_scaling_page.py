"""The page of a scaling fit."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.browser import charts_of, fits, measure, needs_chromium, opened, without_scripts

from diffattn.humanize import loss
from diffattn.report.scaling_page import equivalence_rows, number_rows, render_scaling, write_scaling_png
from diffattn.results.scaling import Bounded, ScalingResult
from diffattn.scaling.fit import fit_scaling


@pytest.fixture(scope="module")
def result() -> ScalingResult:
    return fit_scaling("figure3a", at=(6.8e9, 13.1e9), bootstrap=200, command="diffattn scale fit <figure3a>")


def test_the_page_has_both_forms_side_by_side_and_needs_no_network(result: ScalingResult) -> None:
    page = render_scaling(result)
    rows = equivalence_rows(result)
    assert rows[0] == ["this model", "equals, by E + A·N^−α", "equals, by A·N^−α"]
    assert rows[1][0] == "diff_v1 6.8 B"
    assert rows[1][1].startswith("softmax 10.9 B (")
    assert rows[1][2].startswith("softmax 9.15 B (")
    assert "extrapolated" in rows[2][1]
    assert len(number_rows(result)) == 5
    assert all(cell in page for row in rows[1:] for cell in row)
    assert "diffattn scale fit &lt;figure3a&gt;" in page
    assert list(charts_of(page)) == ["floor-chart", "power-chart"]
    assert not re.search(r"(src|href)=", without_scripts(page))
    assert "diff_v1 of 6.8 B equals softmax of 10.9 B" in charts_of(page)["floor-chart"]["description"]


def test_the_chart_holds_the_points_the_curve_and_the_equal_size(result: ScalingResult) -> None:
    curves, points, arrow, *_ = charts_of(render_scaling(result))["floor-chart"]["layer"]
    drawn = [(row["variant"], row["size"], row["loss"]) for row in points["data"]["values"]]
    assert drawn == [(point.attention, point.size, point.val_loss) for point in result.points]
    fit = result.forms["floor"].variants["diff_v1"]
    own = [(row["size"], row["loss"]) for row in curves["data"]["values"] if row["variant"] == "diff_v1"]
    assert own == list(zip(fit.curve.x, fit.curve.loss, strict=True))
    first = result.forms["floor"].equivalences[0]
    assert [(row["size"], row["equal"]) for row in arrow["data"]["values"]] == [(first.size, first.equal.value)]


def test_an_equal_that_no_size_reaches_is_words_not_a_number(result: ScalingResult) -> None:
    row = result.forms["floor"].equivalences[0]
    nothing = Bounded(value=None, low=None, high=None)
    changed = replace(row, equal=nothing, words="no size reaches this loss")
    forms = {"floor": replace(result.forms["floor"], equivalences=[changed])}
    assert equivalence_rows(replace(result, forms=forms))[1] == ["diff_v1 6.8 B", "no size reaches this loss"]
    page = render_scaling(replace(result, forms=forms))
    assert "equals softmax of –" in charts_of(page)["floor-chart"]["description"]


def test_the_picture_is_small(result: ScalingResult, tmp_path: Path) -> None:
    write_scaling_png(result, tmp_path / "fit.png")
    assert 20_000 < (tmp_path / "fit.png").stat().st_size < 500_000


@needs_chromium
def test_a_point_names_its_numbers(result: ScalingResult, browser: Any, tmp_path: Path) -> None:
    with opened(browser, render_scaling(result), tmp_path) as page:
        page.locator("#floor-chart .mark-symbol path[aria-roledescription=point]").first.hover()
        told = page.locator("#vg-tooltip-element").inner_text()
        assert page.locator("#floor-chart .role-legend-label text").all_text_contents() == ["softmax", "diff_v1"]
    assert result.points[0].attention in told
    assert loss(result.points[0].val_loss) in told


@needs_chromium
def test_the_page_fits_a_telephone_and_a_desk(result: ScalingResult, browser: Any, tmp_path: Path) -> None:
    for size in measure(browser, render_scaling(result), tmp_path, [400, 1400]):
        fits(size)
        assert size["tables"] == [0, 0]
        assert len(size["charts"]) == 2
