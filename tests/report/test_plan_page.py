"""The page of `diffattn plan`: what it says at once, and what its script makes of moved sliders."""

import html
import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from report.test_page_layout import measure
from support.browser import CHROMIUM, needs_chromium

from diffattn import humanize as written
from diffattn.plan.activations import resolve
from diffattn.plan.answer import plan
from diffattn.plan.result import Plan
from diffattn.plan.setting import Precision, Setting
from diffattn.report.page import HERE
from diffattn.report.plan_page import BACKEND_CELLS, POINTS, render_plan, solve

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="no node on this machine to run the page's script")


def in_node(expression: str, given: Any) -> Any:
    """The value of a JavaScript expression after the page's script, with `given` in its scope."""
    code = f"{(HERE / 'plan.js').read_text()}\nconst given = JSON.parse(require('fs').readFileSync(0, 'utf8'));\n"
    code += f"process.stdout.write(JSON.stringify({expression}));"
    done = subprocess.run(
        [str(NODE), "-e", code], input=json.dumps(given), check=True, capture_output=True, text=True, timeout=60
    )
    return json.loads(done.stdout)


SETTING: dict[str, Any] = {"context": 4096, "batch": 4, "precision": "bf16"}
PAIRS = [("diff_v1:6.8B", "softmax:11B"), ("diff_v2:1.4B", "softmax:1.4B")]


def at_points(quantity: Callable[[int, int], Any]) -> tuple[Any, ...]:
    return tuple(quantity(*point) for point in POINTS)


def test_coefficients_are_exact() -> None:
    def quantity(batch: int, context: int) -> int:
        return 7 + 3 * batch + 5 * context + 11 * batch * context + batch * context * (context + 1) // 2

    assert solve("x", at_points(quantity)) == (2, 14, 6, 10, 23, 1)
    assert solve("x", at_points(lambda batch, context: Fraction(context, 3))) == (3, 0, 0, 1, 0, 0)


def test_what_is_no_polynomial_is_refused() -> None:
    for quantity in (lambda b, t: max(3 * b, t), lambda b, t: t**3, lambda b, t: -(-t // 16) * 16):
        with pytest.raises(ValueError, match="memory of x is no polynomial"):
            solve("memory of x", at_points(quantity))


@needs_node
@pytest.mark.parametrize("name", ["size", "count", "flops", "seconds"])
def test_script_writes_numbers_as_python_does(name: str) -> None:
    chance = random.Random(0)
    values = [chance.uniform(1, 10) * 10 ** chance.randint(-4, 16) for _ in range(400)]
    values += [1024**power * eighths / 8 for power in range(5) for eighths in range(1, 60)]
    values += [999.4, 999.5, 9.995, 99.95, 1023.9, 59.99, 60.0, 3599.6, 0.0]
    # Thirty thousand years are enough for a duration.
    values = [value for value in values if name != "seconds" or value < 1e12]
    assert in_node(f"given.map((value) => WRITE.{name}(value))", values) == [getattr(written, name)(v) for v in values]


MOVED: list[dict[str, Any]] = [
    {"context": 8192, "batch": 4, "precision": "bf16", "machine": "H100 SXM"},
    {"context": 131072, "batch": 1, "precision": "autocast", "backend": "materialised", "checkpointing": "on"},
    {"context": 333, "batch": 7, "precision": "mixed", "machine": "RTX 3060 12GB", "backend": "fused"},
]


class Cells(HTMLParser):
    """The data attributes of every cell of a table: by row, model and key."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.row: dict[str, str | None] = {}
        self.table: dict[tuple[str, str], float | None] = {}
        self.backends: dict[tuple[str, str, str], float] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag == "tr":
            self.row = given
        if tag == "td" and given.get("data-value") is not None:
            value = float(given["data-value"]) if given["data-value"] else None
            if "data-model" in given and "data-row" in self.row:
                self.table[str(self.row["data-row"]), str(given["data-model"])] = value
            else:
                key = str(self.row["data-model"]), str(self.row["data-backend"]), str(given["data-key"])
                self.backends[key] = value or 0.0


def in_browser(page: str, state: dict[str, Any], folder: Path) -> str:
    """The document after the page's script ran with this setting in its address."""
    file = folder / "plan.html"
    file.write_text(page, encoding="utf-8")
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *quiet,
        f"--user-data-dir={folder / 'profile'}",
    ]
    command += ["--dump-dom", f"{file.as_uri()}#{urlencode(state)}"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: pair[0])
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def expected(result: Plan) -> dict[tuple[str, str], float | None]:
    return {(row.key, side): getattr(row, side) for row in result.ratios for side in ("model", "against")}


def expected_backends(result: Plan) -> dict[tuple[str, str, str], float]:
    sides = {result.against.name: "against", result.model.name: "model"}
    rows = [row for row in result.backends if resolve(row.attention, row.backend) == row.backend]
    return {(sides[row.model], row.backend, key): getattr(row, key) for row in rows for key in BACKEND_CELLS}


def test_first_rendering_needs_no_script(pair: tuple[str, str]) -> None:
    result = plan(*pair, Setting(**SETTING), command="diffattn plan --html plan.html")
    page = render_plan(result)
    cells = Cells(page)
    assert cells.table == expected(result)
    assert cells.backends == expected_backends(result)
    for words in (*result.sentences, result.command, *pair, "<noscript>"):
        assert words in html.unescape(page)


def test_page_asks_nothing_of_the_network_and_is_small(pair: tuple[str, str]) -> None:
    page = render_plan(plan(*pair, Setting(**SETTING)))
    assert re.search(r"https?://|url\(|@import|\b(src|href)=", page) is None
    assert len(page.encode()) < 250_000
    assert page == render_plan(plan(*pair, Setting(**SETTING)))


def test_every_input_has_a_label() -> None:
    tags = Cells(render_plan(plan(setting=Setting(**SETTING)))).tags
    labelled = {given["for"] for tag, given in tags if tag == "label"}
    inputs = [given for tag, given in tags if tag in ("input", "select")]
    assert len(inputs) == 8
    assert all(given["id"] in labelled or given.get("aria-label") for given in inputs)


def test_text_from_outside_is_escaped() -> None:
    nasty = '</script><script>alert("x")</script><!--'
    result = plan(setting=Setting(**SETTING), command=nasty)
    model = replace(result.model, name=nasty, shape=replace(result.model.shape, name=nasty))
    setting = replace(result.setting, machine=replace(result.setting.machine, name=nasty))
    result = replace(result, model=model, setting=setting, sentences=[nasty], backends=[])
    page = render_plan(result)
    assert page.count("<script") == 2
    assert "<!--" not in page
    assert html.unescape(page).count(nasty) >= 3


@needs_chromium
@pytest.mark.parametrize("moved", MOVED, ids=lambda moved: f"{moved['context']}-{moved['precision']}")
def test_moved_sliders_give_what_python_gives(pair: tuple[str, str], moved: dict[str, Any], tmp_path: Path) -> None:
    dom = in_browser(render_plan(plan(*pair, Setting(**SETTING))), moved, tmp_path)
    right = plan(*pair, Setting(**SETTING | moved | {"checkpointing": moved.get("checkpointing") == "on"}))
    cells = Cells(dom)
    # Counts are exact; a quotient may differ in its last digit.
    for key, value in expected(right).items():
        assert cells.table.pop(key) == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), key
    assert cells.table == {}
    assert cells.backends == expected_backends(right)
    # A page made for the setting says the same words as the page that was moved to it.
    moved_words, made_words = (re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", text) for text in (dom, render_plan(right)))
    assert moved_words == made_words
    drawn = dom.split('id="data"')[0]
    assert drawn.count("<svg role=") == 6
    assert "NaN" not in drawn


@needs_chromium
@pytest.mark.parametrize("hash", [{"context": "x", "batch": "-3"}, {"precision": "fp7", "machine": "", "other": "1"}])
def test_impossible_setting_in_the_address_is_left_out(hash: dict[str, str], tmp_path: Path) -> None:
    result = plan(setting=Setting(**SETTING))
    assert Cells(in_browser(render_plan(result), hash, tmp_path)).table == pytest.approx(expected(result))


@needs_chromium
def test_integer_weights_no_machine_and_two_of_a_kind_still_make_a_page(tmp_path: Path) -> None:
    precision = Precision("int4", "bf16", "bf16", "bf16", "int4")
    result = plan(
        "softmax:3M",
        "softmax:30M",
        Setting(context=100, machine=None, precision=precision, backend="definition"),
    )
    dom = in_browser(render_plan(result), {}, tmp_path)
    assert Cells(dom).table == pytest.approx(expected(result))
    assert "integer weights are not trained" in dom.split('id="data"')[0]


@needs_chromium
def test_a_page_of_one_model_follows_its_sliders(tmp_path: Path) -> None:
    moved = {"context": 512, "batch": 2, "precision": "fp32", "machine": "Apple M2"}
    dom = in_browser(render_plan(plan("diff_v1:3M", setting=Setting(**SETTING))), moved, tmp_path)
    right = plan("diff_v1:3M", setting=Setting(**moved))
    wanted = {row.key: row.model for row in right.ratios}
    shown = dict(re.findall(r'<tr data-row="(\w+)">.*?data-value="([^"]*)"', dom, flags=re.DOTALL))
    assert set(shown) == set(wanted)
    assert {key: float(value) for key, value in shown.items() if value} == pytest.approx(
        {key: value for key, value in wanted.items() if value is not None}
    )
    drawn = dom.split('id="data"')[0]
    assert drawn.count("<svg role=") == 6
    assert "NaN" not in drawn


@needs_chromium
def test_page_fits_a_telephone_and_a_desk(pair: tuple[str, str], tmp_path: Path) -> None:
    sizes = measure(render_plan(plan(*pair, Setting(**SETTING))), [400, 820, 821, 1400], tmp_path)
    assert [size["window"] for size in sizes] == [400, 820, 821, 1400]
    for size in sizes:
        assert size["scroll"] <= size["window"]
    assert sizes[-1]["tables"] == [0, 0]
    # What models are compared is read without scrolling; the table of backends scrolls in its own box.
    assert sizes[0]["tables"][0] == 0
