import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.browser import CHROMIUM, needs_chromium
from support.synthetic_comparison import comparison, head_maps, loss_curves

from diffattn.report.compare_page import render_compare


def measure(page: str, widths: list[int], folder: Path) -> list[dict[str, Any]]:
    """What Chromium lays out at each width: a window cannot be as narrow as a telephone, a frame can."""
    script = """
        const page = PAGE, widths = WIDTHS;
        const frames = widths.map(width => {
            const frame = document.createElement("iframe");
            frame.style.cssText = `border:0;width:${width}px;height:900px`;
            frame.srcdoc = page;
            document.body.append(frame);
            return frame;
        });
        addEventListener("load", () => {
            document.getElementById("out").textContent = JSON.stringify(frames.map(frame => {
                const inner = frame.contentDocument, images = [...inner.images];
                return {
                    window: frame.contentWindow.innerWidth,
                    scroll: inner.documentElement.scrollWidth,
                    tables: [...inner.querySelectorAll(".scroll")].map(box => box.scrollWidth - box.clientWidth),
                    drawn: images.map(image => [image.naturalWidth > 0, image.getBoundingClientRect().right]),
                    narrow: images.map(image => image.currentSrc === image.previousElementSibling.srcset),
                };
            }));
        });"""
    text = json.dumps(page).replace("</", "<\\/")
    script = script.replace("PAGE", text, 1).replace("WIDTHS", json.dumps(widths), 1)
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        f"<!DOCTYPE html><meta charset=utf-8><body><pre id=out></pre><script>{script}</script>", encoding="utf-8"
    )
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--window-size=1500,1000"]
    command += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", wrapper.as_uri()]
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'<pre id="out">(.+?)</pre>', dom, re.DOTALL)
    assert found, dom[-500:]
    return json.loads(html.unescape(found[1]))


@needs_chromium
@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_page_fits_a_telephone_and_a_desk(seeds: int, tmp_path: Path) -> None:
    page = render_compare(comparison(seeds), loss_curves(seeds, steps=150), head_maps())
    sizes = measure(page, [400, 820, 821, 1400], tmp_path)
    assert [size["window"] for size in sizes] == [400, 820, 821, 1400]
    for size in sizes:
        assert size["scroll"] <= size["window"]
        assert size["tables"] == [0, 0]
        assert all(loaded and right <= size["window"] for loaded, right in size["drawn"])
        assert set(size["narrow"]) == {size["window"] <= 820}
