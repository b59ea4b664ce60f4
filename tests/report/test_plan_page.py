"""The page of ``diffattn plan``: the numbers that it says at once, and those that its sliders choose."""

import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.browser import charts_of, fits, measure, needs_chromium, opened, without_scripts

from diffattn import humanize
from diffattn.plan.activations import resolve
from diffattn.plan.answer import plan
from diffattn.plan.estimate import estimate
from diffattn.plan.result import Plan
from diffattn.plan.setting import Precision, Setting
from diffattn.report.compare_table import ratio_text
from diffattn.report.plan_chart import Grid
from diffattn.report.plan_page import render_plan

START = Setting(context=4096, batch=4, precision="bf16")
PAIRS = [("diff_v1:6.8B", "softmax:11B"), ("diff_v2:1.4B", "softmax:1.4B")]
Cells = dict[str, tuple[str, str]]


class Table(HTMLParser):
    """The cells of the table of numbers, by row and side: the text and all digits; and every cell's text in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: Cells = {}
        self.words: list[str] = []
        self.given: dict[str, str | None] = {}
        self.feed(without_scripts(text))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "td":
            self.given = dict(attrs)
            self.words.append("")

    def handle_data(self, data: str) -> None:
        if self.given:
            self.words[-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "td" and "data-cell" in self.given:
            self.cells[str(self.given["data-cell"])] = self.words[-1], str(self.given["title"])
        self.given = {} if tag == "td" else self.given


def expected(result: Plan) -> Cells:
    found: Cells = {}
    for row in result.ratios:
        written = getattr(humanize, row.format)
        found[f"{row.key} model"] = written(row.model), humanize.exact(row.model)
        if result.against is not None:
            found[f"{row.key} against"] = written(row.against), humanize.exact(row.against)
            found[f"{row.key} ratio"] = ratio_text(row.model, row.against), humanize.exact(row.ratio)
    return found


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: pair[0])
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="module")
def page(pair: tuple[str, str]) -> str:
    return render_plan(plan(*pair, START, command="diffattn plan --html plan.html"))


def in_browser(browser: Any, page: str, address: str, folder: Path) -> Cells:
    with opened(browser, page, folder, address=address) as shown:
        return Table(shown.content()).cells


def test_first_rendering_needs_no_script(pair: tuple[str, str], page: str) -> None:
    result = plan(*pair, START, command="diffattn plan --html plan.html")
    table = Table(page)
    assert table.cells == expected(result)
    for row in result.backends:
        if resolve(row.attention, row.backend) == row.backend:
            assert f"{row.model}, {row.backend}" in page
            assert humanize.size(row.inference_bytes) in table.words
            assert humanize.flops(row.training_flops_per_token) in table.words
    for words in (*result.sentences, result.command, *pair, "<noscript>"):
        assert words in html.unescape(page)


def test_page_asks_nothing_of_the_network_and_holds_one_bundle(page: str) -> None:
    assert re.search(r"https?://|url\(|@import|\b(src|href)=", without_scripts(page)) is None
    assert page.count("window.vegaEmbed") == 1
    assert page.count("<script") == 4
    assert "unsafe-eval" not in page
    assert len(page.encode()) < 1_700_000


def test_grid_holds_the_planners_numbers_of_every_point(pair: tuple[str, str]) -> None:
    result = plan(*pair, START)
    grid = Grid(result)
    assert (grid.contexts[0], grid.contexts[-1], grid.batches[-1]) == (128, 1_048_576, 1024)
    places = [(context, batch) for context in grid.contexts for batch in grid.batches]
    assert len(places) == len(grid.estimates) == 154
    for place in (0, 61, 153):
        context, batch = places[place]
        setting = replace(START, context=context, batch=batch)
        assert grid.estimates[place] == [estimate(model.shape, model.attention, setting) for model in result.models]


def test_a_context_and_a_batch_between_the_steps_of_the_sliders_are_steps_too() -> None:
    grid = Grid(plan("diff_v1:3M", setting=Setting(context=333, batch=7)))
    assert (grid.contexts[grid.start["context"]], grid.batches[grid.start["batch"]]) == (333, 7)
    assert grid.contexts == sorted(grid.contexts)


def test_data_of_the_charts_is_the_planners(pair: tuple[str, str], page: str) -> None:
    charts = charts_of(page)
    assert list(charts) == [
        "bars-training", "bars-inference", "line-training-memory", "line-inference-memory", "line-training-speed",
        "line-decoding-speed",
    ]  # fmt: skip
    columns = charts["line-training-memory"]["data"]["values"][0]
    for context, batch in ((4096, 4), (131072, 1)):
        result = plan(*pair, replace(START, context=context, batch=batch))
        rows = {row.key: row for row in result.ratios}
        at = [
            place
            for place, tokens in enumerate(columns["tokens"])
            if tokens == context and 2 ** columns["at batch"][place] == batch
        ]
        assert [columns["model"][place] for place in at] == list(pair)
        wanted = rows["training_bytes"]
        assert [columns["value"][place] for place in at] == [wanted.model, wanted.against]
        assert [columns["words"][place] for place in at] == [humanize.size(wanted.model), humanize.size(wanted.against)]
        bars = charts["bars-training"]["data"]["values"][0]
        assert [bars["weights"][place] for place in at] == [
            rows["training_weights"].model, rows["training_weights"].against
        ]  # fmt: skip


def test_text_from_outside_is_escaped() -> None:
    nasty = '</script><script>alert("x")</script><!--'
    result = plan(setting=START, command=nasty)
    assert result.setting.machine is not None
    result = replace(
        result,
        sentences=[nasty, *result.sentences[1:]],
        model=replace(result.model, name=nasty, shape=replace(result.model.shape, name=nasty)),
        setting=replace(result.setting, machine=replace(result.setting.machine, name=nasty)),
        backends=[],
    )
    page = render_plan(result)
    assert page.count("<script") == 4
    assert "<!--" not in page
    assert html.unescape(page).count(nasty) >= 3


@needs_chromium
@pytest.mark.parametrize(("context", "batch"), [(131072, 1), (512, 64)])
def test_moved_sliders_give_what_python_gives(
    pair: tuple[str, str], page: str, context: int, batch: int, browser: Any, tmp_path: Path
) -> None:
    right = plan(*pair, replace(START, context=context, batch=batch))
    with opened(browser, page, tmp_path) as shown:
        grid = Grid(plan(*pair, START))
        for name, place in (("context", grid.contexts.index(context)), ("batch", grid.batches.index(batch))):
            slider = shown.locator(f"#controls input[name={name}]")
            slider.fill(str(place))
            words = f"{(context, batch)[name == 'batch']:,}"
            assert slider.get_attribute("aria-valuetext") == shown.locator(f"#{name}-words").inner_text() == words
        assert Table(shown.content()).cells == expected(right)
        # The charts follow: the sums over the bars and the marks at the line of the context are the planner's.
        row = next(row for row in right.ratios if row.key == "training_bytes")
        texts = shown.locator("#bars-training .mark-text text").all_text_contents()
        assert all(any(text.startswith(humanize.size(value)) for text in texts) for value in (row.model, row.against))
        # What was chosen is in the address.
        assert shown.url.endswith(f"#context={context}&batch={batch}")
    assert in_browser(browser, page, f"#context={context}&batch={batch}", tmp_path) == expected(right)


@needs_chromium
def test_impossible_setting_in_the_address_is_left_out(
    pair: tuple[str, str], page: str, browser: Any, tmp_path: Path
) -> None:
    for address in ("#context=x&batch=-3", "#context=5000&machine=&other=1"):
        assert in_browser(browser, page, address, tmp_path) == expected(plan(*pair, START))


@needs_chromium
def test_what_is_pointed_at_names_its_numbers(pair: tuple[str, str], page: str, browser: Any, tmp_path: Path) -> None:
    result = plan(*pair, START)
    row = next(row for row in result.ratios if row.key == "training_bytes")
    with opened(browser, page, tmp_path) as shown:
        tip = shown.locator("#vg-tooltip-element")
        labels = shown.locator("#line-training-memory .role-legend-label text")
        assert labels.all_text_contents() == list(pair)
        shown.locator("#line-training-memory .mark-symbol path[aria-roledescription=point]").last.hover()
        told = tip.inner_text()
        assert "4,096 tokens" in told
        assert any(humanize.size(value) in told for value in (row.model, row.against))
        shown.locator("#bars-training .mark-rect path[aria-roledescription=bar]").first.hover()
        assert pair[0] in tip.inner_text()
        assert any(word in tip.inner_text() for word in ("weights", "optimizer state", "activations"))


@needs_chromium
def test_integer_weights_no_machine_and_two_of_a_kind_still_make_a_page(browser: Any, tmp_path: Path) -> None:
    precision = Precision("int4", "bf16", "bf16", "bf16", "int4")
    setting = Setting(context=100, machine=None, precision=precision, backend="definition")
    result = plan("softmax:3M", "softmax:30M", setting)
    page = render_plan(result)
    assert list(charts_of(page)) == ["bars-inference", "line-inference-memory"]
    assert "Integer weights are not trained." in page
    assert in_browser(browser, page, "", tmp_path) == expected(result)


@pytest.mark.parametrize("against", ["diff_v1:3M", None])
def test_a_model_whose_training_is_not_planned_still_makes_a_page(against: str | None) -> None:
    result = plan("gpt-2", against, Setting(context=256))
    drawn = render_plan(result)
    assert "bars-training" not in drawn
    assert "Integer weights" not in drawn
    assert {"line-inference-memory", "line-decoding-speed"} <= set(re.findall(r"line-[a-z-]+", drawn))
    assert "Training of gpt-2 is not planned" in html.unescape(drawn)


@needs_chromium
def test_a_page_of_one_model_follows_its_sliders(browser: Any, tmp_path: Path) -> None:
    setting = Setting(context=4096, batch=4, precision="fp32", machine="Apple M2")
    right = plan("diff_v1:3M", setting=replace(setting, context=512, batch=2))
    page = render_plan(plan("diff_v1:3M", setting=setting))
    assert in_browser(browser, page, "#context=512&batch=2", tmp_path) == expected(right)
    assert len(charts_of(page)) == 6


@needs_chromium
def test_page_fits_a_telephone_and_a_desk(page: str, browser: Any, tmp_path: Path) -> None:
    sizes = measure(browser, page, tmp_path, [400, 820, 821, 1400])
    for size in sizes:
        fits(size)
        assert len(size["charts"]) == 6
    assert sizes[-1]["tables"] == [0, 0]
    # What models are compared is read without scrolling; the table of backends scrolls in its own box.
    assert sizes[0]["tables"][0] == 0
