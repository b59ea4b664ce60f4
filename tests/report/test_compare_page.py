import html
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.browser import charts_of, fits, measure, needs_chromium, opened, without_scripts
from support.synthetic_comparison import comparison, head_maps, loss_curves

from diffattn.errors import DataError
from diffattn.humanize import loss, signed
from diffattn.report.compare_page import render_compare, render_picture
from diffattn.report.compare_table import compare_rows
from diffattn.report.curve_chart import loss_range, smooth
from diffattn.report.map_chart import panels, scale
from diffattn.results.comparison import CurvePoint
from diffattn.results.interval import Interval

VOID = {"meta", "source", "img", "br", "hr", "link", "input"}
MAPS = ["map-0-map_pos", *(f"map-{place}-{key}" for place in (1, 2) for key in ("map_pos", "lam_map_neg", "map_diff"))]


class Page(HTMLParser):
    """Every tag is closed in its turn; addresses and texts are kept."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(without_scripts(text))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def rows_of(chart: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows of data that a chart draws, each list once."""
    found = [chart, *chart.get("layer", [])]
    lists = {str(part["data"]["values"]): part["data"]["values"] for part in found if "data" in part}
    return [row for rows in lists.values() for row in rows]


@pytest.fixture(scope="module")
def page() -> str:
    return render_compare(comparison(), loss_curves(), head_maps())


def test_page_holds_nothing_that_asks_the_network_and_one_bundle(page: str) -> None:
    rest = without_scripts(page)
    assert re.search(r"https?://", rest) is None
    assert Page(page).addresses == []
    assert "@import" not in rest
    assert "url(" not in rest
    assert page.count("<script") == 3
    assert page.count("window.vegaEmbed") == 1
    policy = html.unescape(re.findall(r'Content-Security-Policy" content="([^"]+)"', page)[0])
    # Only the two scripts that the page holds may run, and none of them makes code of text.
    assert re.fullmatch(
        r"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src( 'sha256-[\w+/]+=*'){2}", policy
    )
    assert len(page.encode()) < 1_700_000


def test_page_holds_every_verdict_every_number_and_the_command(page: str) -> None:
    text, result = Page(page).text, comparison()
    for pair in result.pairs.values():
        assert pair.verdict in text
    for row in compare_rows(result)[1:]:
        for words in row[1:]:
            for part in re.split(r"[(),]+ ?", words):
                assert part.strip() in text
    titles = html.unescape(page)
    for variant in result.variants.values():
        assert f'title="{variant.parameters:,}"' in titles
        assert repr(variant.val_loss[1]) in titles
    assert result.command in text
    assert "optimizer.betas" in text
    assert "95% interval over 2 seeds" in text
    assert head_maps().text in text


def test_every_chart_is_there_with_words_for_it(page: str) -> None:
    charts = charts_of(page)
    assert list(charts) == ["differences-chart", "train-chart", "validation-chart", *MAPS]
    assert all(f'id="{name}"' in page for name in charts)
    assert all(len(chart["description"]) > 60 for chart in charts.values())
    assert all(chart["width"] == "container" for chart in charts.values())
    words = charts["validation-chart"]["description"]
    assert all(f"{name} ends at" in words for name in comparison().variants)


def test_data_of_the_curves_is_every_seed_of_every_run(page: str) -> None:
    charts = charts_of(page)
    rows = rows_of(charts["validation-chart"])
    for curve in loss_curves():
        own = [row for row in rows if (row["variant"], row["seed"]) == (curve.attention, f"seed {curve.seed}")]
        assert [(row["tokens"], row["loss"]) for row in own] == [
            (point.tokens, point.loss) for point in curve.validation
        ]
        assert own[-1]["loss in digits"] == loss(curve.validation[-1].loss)
    for name in ("train-chart", "validation-chart"):
        x, y = charts[name]["layer"][0]["encoding"]["x"], charts[name]["layer"][0]["encoding"]["y"]
        assert (x["title"], y["title"]) == ("training tokens", "loss (nats per token)")


def test_data_of_the_differences_is_that_of_the_pairs(page: str) -> None:
    result = comparison()
    rows = {row["variant"]: row for row in rows_of(charts_of(page)["differences-chart"]) if "mean" in row}
    for name, pair in result.pairs.items():
        assert {end: rows[name][end] for end in ("mean", "low", "high")} == pair.val_loss_difference.to_json()
        seeds = [row for row in rows_of(charts_of(page)["differences-chart"]) if row.get("variant") == name]
        ours, theirs = result.variants[name].val_loss, result.variants["softmax"].val_loss
        drawn = [row["difference"] for row in seeds if "seed" in row]
        assert drawn == [a - b for a, b in zip(ours, theirs, strict=True)]


def test_maps_hold_every_weight_that_a_query_has_and_name_every_token(page: str) -> None:
    maps, charts = head_maps(), charts_of(page)
    for place, (name, entry) in enumerate(maps.variants.items()):
        for key, weights in entry.maps.items():
            chart = charts[f"map-{place}-{key}"]
            drawn = {(row["query"], row["key"]): row["weight"] for row in rows_of(chart)}
            count = len(maps.tokens)
            assert set(drawn) == {(query, key) for query in range(count) for key in range(query + 1)}
            assert all(drawn[query, key] == pytest.approx(weights[query][key], abs=1e-6) for query, key in drawn), name
            for axis in ("x", "y"):
                labels = chart["encoding"][axis]["axis"]["labelExpr"]
                assert '"Fellow"' in labels
                assert all(shown in labels for shown in ('"$x$"', '"␣"', '"↵"'))
    assert "layer 2, head 0, λ = 0.355" in Page(page).text
    assert re.search(r"λ from 0\.\d+ to 0\.\d+ over the tokens", Page(page).text)


def test_text_from_outside_is_escaped_everywhere() -> None:
    nasty = '<script>alert("x")</script>'
    result = comparison()
    pairs = result.pairs | {"diff_v1": replace(result.pairs["diff_v1"], verdict=nasty)}
    result = replace(result, command=nasty, data={"tokenizer": nasty}, pairs=pairs)
    maps = replace(head_maps(["<script>", "&amp;", "日本", "\x00", "-"]), text=nasty)
    page = render_compare(result, loss_curves(), maps)
    assert page.count("<script") == 3
    assert Page(page).text.count(nasty) == 4
    assert "<script>" in charts_of(page)["map-1-map_diff"]["encoding"]["x"]["axis"]["labelExpr"]


def test_one_seed_has_no_interval() -> None:
    page = render_compare(comparison(seeds=1), loss_curves(seeds=1), head_maps())
    text, chart = Page(page).text, charts_of(page)["differences-chart"]
    assert "one seed: no interval" in text
    assert "95% interval over" not in text
    assert "one seed: no interval" in chart["description"]
    assert all("one seed: no interval" in row["numbers"] for row in rows_of(chart) if "numbers" in row)


def test_broken_and_tiny_runs_still_make_a_page(tmp_path: Path) -> None:
    result, curves, maps = comparison(), loss_curves(steps=1), head_maps(["a"])
    broken = replace(result.variants["diff_v1"], val_loss=[math.nan, None])
    nothing = replace(result.pairs["diff_v1"], val_loss_difference=Interval(math.nan, None, None))
    result = replace(
        result,
        variants=result.variants | {"diff_v1": broken},
        pairs=result.pairs | {"diff_v1": nothing},
    )
    curves[0] = replace(curves[0], train=[CurvePoint(1024, math.nan)])
    curves[1] = replace(curves[1], train=[], validation=[])
    page = render_compare(result, curves, maps)
    assert "not a number" in Page(page).text
    # Neither is a number of JSON.
    assert not re.search(r"\bNaN\b|\bInfinity\b", str(charts_of(page)))
    render_picture(curves, maps, tmp_path / "tiny.png")
    alone = replace(result, pairs={}, variants={"diff_gda": result.variants["diff_v2"]})
    assert "diff_gda" in Page(render_compare(alone, [], None)).text


def test_map_of_another_size_than_the_tokens_is_refused() -> None:
    maps = head_maps()
    with pytest.raises(DataError, match=r"map_pos of shape \(25, 25\); wanted \(24, 24\)"):
        render_compare(comparison(), loss_curves(), replace(maps, tokens=maps.tokens[:-1]))


def test_future_is_masked_and_one_scale_holds_all_but_a_few_weights() -> None:
    maps = head_maps()
    limit, largest = scale(maps)
    assert 0 < limit < largest == 1.0
    for entry in maps.variants.values():
        for weights in panels(entry, maps.tokens).values():
            assert np.ma.getmaskarray(weights)[0, 1:].all()
            assert (np.abs(weights[3:].compressed()) > limit).mean() < 0.12


def test_start_of_a_curve_does_not_flatten_its_end() -> None:
    tokens = np.arange(0.0, 101.0)
    low, high = loss_range([(tokens, 3 + 8 * np.exp(-tokens / 8))]) or (0.0, 0.0)
    assert low < 3.0 + 8 * math.exp(-100 / 8)
    assert high < 3.5
    assert loss_range([(tokens, np.full(101, np.nan))]) is None


def test_smoothing_keeps_a_constant_and_the_length() -> None:
    assert smooth(np.full(211, 3.5), 7) == pytest.approx(np.full(211, 3.5))


def test_same_input_gives_the_same_page(page: str) -> None:
    assert page == render_compare(comparison(), loss_curves(), head_maps())


def test_picture_is_1200_pixels_wide(tmp_path: Path) -> None:
    path = tmp_path / "comparison.png"
    render_picture(loss_curves(), head_maps(), path)
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(header[16:20]), int.from_bytes(header[20:24])
    assert width == 1200
    assert 500 < height < 1100
    assert path.stat().st_size < 500_000


@needs_chromium
def test_what_is_pointed_at_names_its_numbers(page: str, browser: Any, tmp_path: Path) -> None:
    with opened(browser, page, tmp_path) as shown:
        tip = shown.locator("#vg-tooltip-element")
        shown.locator("#validation-chart .mark-symbol path[aria-roledescription=point]").last.hover()
        last = loss_curves()[-1]
        point = last.validation[-1]
        told = tip.inner_text()
        assert all(words in told for words in (last.attention, f"seed {last.seed}", loss(point.loss)))
        shown.locator("#differences-chart .mark-symbol path[aria-roledescription=point]").last.hover()
        assert signed(comparison().pairs["diff_v2"].val_loss_difference.mean) in tip.inner_text()
        shown.locator("#map-1-map_diff .mark-rect path").first.hover()
        assert "Fellow" in tip.inner_text()
        assert f"{head_maps().variants['diff_v1'].maps['map_diff'][0][0]:.3f}" in tip.inner_text()


@needs_chromium
def test_a_name_in_the_legend_is_seen_alone(page: str, browser: Any, tmp_path: Path) -> None:
    with opened(browser, page, tmp_path) as shown:
        legend = shown.locator("#train-chart .role-legend-label text")
        assert legend.all_text_contents() == ["softmax", "diff_v1", "diff_v2"]
        lines = shown.locator("#train-chart .mark-line path")
        assert {line.get_attribute("opacity") for line in lines.all()} == {"1"}
        legend.nth(1).click()
        own = {"#0072B2"}
        opaque = {line.get_attribute("stroke") for line in lines.all() if line.get_attribute("opacity") == "1"}
        assert opaque == own


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_scheme_of_the_reader(page: str, scheme: str, browser: Any, tmp_path: Path) -> None:
    colour = "element => getComputedStyle(element).stroke"
    with opened(browser, page, tmp_path, scheme=scheme) as shown:
        lines = [line.evaluate(colour) for line in shown.locator("#validation-chart .mark-line path").all()]
        paper = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        words = shown.locator("#validation-chart .role-axis-title text").first
        ink = words.evaluate("element => getComputedStyle(element).fill")
    blue = {"light": "rgb(0, 114, 178)", "dark": "rgb(86, 180, 233)"}[scheme]
    assert lines[2:4] == [blue, blue]
    assert (paper, ink) == {
        "light": ("rgb(255, 255, 255)", "rgb(27, 31, 36)"),
        "dark": ("rgb(20, 24, 29)", "rgb(230, 233, 237)"),
    }[scheme]


@needs_chromium
@pytest.mark.parametrize("seeds", [1, 5])
def test_page_fits_a_telephone_and_a_desk(seeds: int, browser: Any, tmp_path: Path) -> None:
    page = render_compare(comparison(seeds), loss_curves(seeds, steps=150), head_maps())
    for size in measure(browser, page, tmp_path, [400, 820, 821, 1400]):
        fits(size)
        assert size["tables"] == [0, 0]
        assert len(size["charts"]) == 3 + len(MAPS)


def test_charts_wait_until_something_is_drawn() -> None:
    code = (
        "import sys, diffattn.report.compare_page, diffattn.report.compare_table, diffattn.report.plan_page\n"
        "assert not {'altair', 'vl_convert', 'jinja2', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
