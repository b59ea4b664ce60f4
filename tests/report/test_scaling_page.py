"""The page of a scaling fit."""

import re
from pathlib import Path

import pytest
from report.test_page_layout import measure
from support.browser import needs_chromium

from diffattn.report.scaling_page import equivalence_rows, number_rows, render_scaling
from diffattn.scaling.fit import fit_scaling


@pytest.fixture(scope="module")
def result() -> dict:
    return fit_scaling("figure3a", at=(6.8e9, 13.1e9), bootstrap=200, command="diffattn scale fit <figure3a>").to_json()


def test_the_page_has_both_forms_side_by_side_and_needs_no_network(result: dict) -> None:
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
    assert page.count("<img ") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "diff_v1 of 6.8 B equals softmax of 10.9 B" in page


def test_an_equal_that_no_size_reaches_is_words_not_a_number(result: dict) -> None:
    row = result["forms"]["floor"]["equivalences"][0]
    changed = row | {"equal": {"value": None, "low": None, "high": None}, "words": "no size reaches this loss"}
    forms = {"floor": result["forms"]["floor"] | {"equivalences": [changed]}}
    assert equivalence_rows(result | {"forms": forms})[1] == ["diff_v1 6.8 B", "no size reaches this loss"]
    assert "equals softmax of –" in render_scaling(result | {"forms": forms})


@needs_chromium
def test_the_page_fits_a_telephone_and_a_desk(result: dict, tmp_path: Path) -> None:
    for size in measure(render_scaling(result), [400, 1400], tmp_path):
        assert size["scroll"] <= size["window"]
        assert size["tables"] == [0, 0]
        assert all(loaded and right <= size["window"] for loaded, right in size["drawn"])
