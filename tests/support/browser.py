"""The browser that pages are looked at in."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the page in")


# Not for the whole session: the loop that drives it would run on under every later test of the process.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        running = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


def charts_of(page: str) -> dict[str, Any]:
    """The specifications of a page's charts, by the id of their element."""
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def without_scripts(page: str) -> str:
    """The page as a reader has it who runs no script: what lies in script elements is left out."""
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


@contextmanager
def opened(
    browser: Any, text: str, folder: Path, *, width: int = 1400, scheme: str = "light", address: str = ""
) -> Iterator[Any]:
    """A page of Chromium that shows this text; nothing may go wrong in it, and it may ask nothing of the network."""
    file = folder / "page.html"
    file.write_text(text, encoding="utf-8")
    with opened_file(browser, file, width=width, scheme=scheme, address=address) as page:
        if 'id="charts"' in text:
            page.wait_for_selector("html[data-charts]", state="attached")
        yield page


@contextmanager
def opened_file(
    browser: Any, file: Path, *, width: int = 1400, scheme: str = "light", address: str = "", before: str = ""
) -> Iterator[Any]:
    """The same of a file; the text ``before`` is a script that runs before those of the page."""
    page = browser.new_page(viewport={"width": width, "height": 1200}, color_scheme=scheme)
    if before:
        page.add_init_script(before)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on(
        "request",
        lambda request: (
            problems.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None
        ),
    )
    page.goto(file.as_uri() + address)
    yield page
    page.close()
    assert problems == []


def measure(browser: Any, text: str, folder: Path, widths: list[int]) -> list[dict[str, Any]]:
    """What Chromium lays out as its window becomes wider: what sticks out of the page, a table's box or a chart's."""
    script = """() => ({
        window: innerWidth,
        scroll: document.documentElement.scrollWidth,
        tables: [...document.querySelectorAll(".scroll")].map(box => box.scrollWidth - box.clientWidth),
        charts: [...document.querySelectorAll(".chart svg")].map(svg => {
            const box = svg.getBoundingClientRect(), room = svg.closest(".chart").getBoundingClientRect();
            return {
                left: box.left - room.left,
                right: box.right - room.right,
                share: box.width / room.width,
                words: [...svg.querySelectorAll("text")].map(text => text.getBoundingClientRect().right),
            };
        }),
    })"""
    sizes = []
    with opened(browser, text, folder, width=widths[0]) as page:
        for width in widths:
            page.set_viewport_size({"width": width, "height": 1200})
            # A chart follows its room a moment later; the page forbids code made of text, so it is asked repeatedly.
            for _ in range(100):
                size = page.evaluate(script)
                if all(abs(chart["right"]) <= 1 for chart in size["charts"]):
                    break
                page.wait_for_timeout(50)
            sizes.append(size)
    assert [size["window"] for size in sizes] == widths
    return sizes


def fits(size: dict[str, Any]) -> None:
    """Nothing of a laid out page sticks out, and each chart takes the width that it has."""
    assert size["scroll"] <= size["window"]
    for chart in size["charts"]:
        assert chart["left"] >= -1
        assert chart["right"] <= 1
        assert chart["share"] > 0.95
        assert all(right <= size["window"] for right in chart["words"])
