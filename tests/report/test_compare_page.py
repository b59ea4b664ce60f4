import base64
import html
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from support.synthetic_comparison import comparison, head_maps, loss_curves

from diffattn.errors import DataError
from diffattn.report.compare_page import render_compare, render_picture
from diffattn.report.curve_chart import loss_range, smooth
from diffattn.report.format import compare_rows
from diffattn.report.map_chart import panels, scale

VOID = {"meta", "source", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Every tag is closed in its turn; addresses, texts and alternatives are kept."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.alts: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag == "img":
            self.alts.append(dict(attrs)["alt"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def drawings(self) -> list[ElementTree.Element]:
        prefix = "data:image/svg+xml;base64,"
        assert all(address.startswith(prefix) for address in self.addresses)
        return [ElementTree.fromstring(base64.b64decode(address[len(prefix) :])) for address in self.addresses]


def svg_text(drawing: ElementTree.Element) -> list[str]:
    return ["".join(node.itertext()) for node in drawing.iter("{http://www.w3.org/2000/svg}text")]


@pytest.fixture(scope="module")
def page() -> str:
    return render_compare(comparison(), loss_curves(), head_maps())


def test_page_asks_nothing_of_the_network_and_is_small(page: str) -> None:
    assert re.search(r"https?://", page) is None
    assert all(address.startswith("data:") for address in Page(page).addresses)
    assert "<script" not in page
    assert "@import" not in page
    assert "url(" not in page
    assert len(page.encode()) < 1_500_000


def test_no_drawing_points_outside_itself(page: str) -> None:
    for drawing in Page(page).drawings():
        for node in drawing.iter():
            links = [value for name, value in node.attrib.items() if name.endswith("href")]
            assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


def test_page_holds_every_verdict_every_number_and_the_command(page: str) -> None:
    text, result = Page(page).text, comparison()
    for pair in result["pairs"].values():
        assert pair["verdict"] in text
    for row in compare_rows(result)[1:]:
        for words in row[1:]:
            for part in re.split(r"[(),]+ ?", words):
                assert part.strip() in text
    titles = html.unescape(page)
    for variant in result["variants"].values():
        assert f'title="{variant["parameters"]:,}"' in titles
        assert repr(variant["val_loss"][1]) in titles
    assert result["command"] in text
    assert "optimizer.betas" in text
    assert "95% interval over 2 seeds" in text
    assert head_maps()["text"] in text


def test_every_figure_is_there_wide_and_narrow_with_words_for_it(page: str) -> None:
    parsed = Page(page)
    # The differences, the curves and one figure of maps for each of three variants.
    assert parsed.tags.count("picture") == parsed.tags.count("source") == parsed.tags.count("img") == 5
    assert all(len(alt) > 60 for alt in parsed.alts)
    widths = [float(drawing.attrib["viewBox"].split()[2]) for drawing in parsed.drawings()]
    narrow, wide = widths[0::2], widths[1::2]
    assert set(narrow) == {376.0}
    assert all(width > 400 for width in wide)


def test_curves_have_both_axes_labelled_and_every_seed(page: str) -> None:
    for drawing in Page(page).drawings()[2:4]:
        words = svg_text(drawing)
        assert words.count("training tokens") == words.count("loss (nats per token)") == 2
        assert {"softmax", "diff_v1", "diff_v2", "seed 0", "seed 1"} <= set(words)


def test_maps_name_every_token_on_both_axes(page: str) -> None:
    narrow, wide = (svg_text(drawing) for drawing in Page(page).drawings()[6:8])
    assert narrow.count("Fellow") == 6
    assert wide.count("Fellow") == 4
    assert {"map_pos", "λ·map_neg", "attention weight", "$x$", "␣", "↵"} <= set(wide)
    assert "layer 2, head 0, λ = 0.355" in Page(page).text
    assert re.search(r"λ from 0\.\d+ to 0\.\d+ over the tokens", Page(page).text)


def test_text_from_outside_is_escaped_everywhere() -> None:
    nasty = '<script>alert("x")</script>'
    maps, result = head_maps(["<script>", "&amp;", "日本", "\x00", "-"]), comparison()
    maps["text"] = result["command"] = result["data"]["tokenizer"] = result["pairs"]["diff_v1"]["verdict"] = nasty
    page = render_compare(result, loss_curves(), maps)
    assert "<script" not in page
    parsed = Page(page)
    assert parsed.text.count(nasty) == 4
    assert "<script>" in svg_text(parsed.drawings()[-1])


def test_one_seed_has_no_interval() -> None:
    page = render_compare(comparison(seeds=1), loss_curves(seeds=1), head_maps())
    text = Page(page).text
    assert "one seed: no interval" in text
    assert "95% interval over" not in text
    assert any("one seed: no interval" in words for words in svg_text(Page(page).drawings()[0])[1:2] + Page(page).alts)


def test_broken_and_tiny_runs_still_make_a_page(tmp_path: Path) -> None:
    result, curves, maps = comparison(), loss_curves(steps=1), head_maps(["a"])
    result["variants"]["diff_v1"]["val_loss"] = [math.nan, None]
    result["pairs"]["diff_v1"]["val_loss_difference"] = {"mean": math.nan, "low": None, "high": None}
    curves[0]["train"][0]["loss"] = math.nan
    curves[1]["train"], curves[1]["validation"] = [], []
    assert "not a number" in Page(render_compare(result, curves, maps)).text
    render_picture(curves, maps, tmp_path / "tiny.png")
    alone = {**result, "pairs": {}, "variants": {"diff_gda": result["variants"]["diff_v2"]}}
    assert "diff_gda" in Page(render_compare(alone, [], {})).text


def test_map_of_another_size_than_the_tokens_is_refused() -> None:
    maps = head_maps()
    maps["tokens"] = maps["tokens"][:-1]
    with pytest.raises(DataError, match="map_pos has the shape"):
        render_compare(comparison(), loss_curves(), maps)


def test_future_is_masked_and_one_scale_holds_all_but_a_few_weights() -> None:
    maps = head_maps()
    limit, largest = scale(maps)
    assert 0 < limit < largest == 1.0
    for entry in maps["variants"].values():
        for weights in panels(entry, maps["tokens"]).values():
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
    assert 500 < height < 1000


def test_matplotlib_waits_until_something_is_drawn_and_keeps_its_settings() -> None:
    code = (
        "import sys, diffattn.report.compare_page, diffattn.report.format\n"
        "assert not {'matplotlib', 'jinja2', 'torch'} & set(sys.modules)\n"
        "from diffattn.report.charts import figure, style, svg\n"
        "import matplotlib\n"
        # A look at the backend would choose one, so it is left out.
        "settings = lambda: {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != 'backend'}\n"
        "before = settings()\n"
        "with style():\n"
        "    assert settings() != before\n"
        "    svg(figure(10, 10))\n"
        "assert settings() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
