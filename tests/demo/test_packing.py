"""Bytes that a page of UTF-16 carries, and that a real browser unpacks again."""

import hashlib

import numpy as np
import pytest
from support.browser import needs_chromium, opened_file

from diffattn.demo.packing import pack
from diffattn.demo.page import render_demo

# Ends at every place of a character, and bytes that gzip cannot shorten.
NOISE = np.random.default_rng(5).integers(0, 256, 40_000, dtype=np.uint8).tobytes()
CONTENTS = {f"noise-{size}": NOISE[:size] for size in (0, 1, 2, 3, 5, 8, 13, 14, 15, 16, 29, 31, 40_000)} | {
    "zeros": bytes(100_000), "ones": b"\xff" * 9_973, "markup": b"</script><!-- &amp; \r\n\0" * 99,
}  # fmt: skip


def test_characters_are_none_that_html_changes_and_hold_15_bits_each():
    text = pack(NOISE).text
    assert {ord(character) for character in text} <= set(range(0x100, 0x8100))
    assert len(text) == -(-8 * pack(NOISE).packed // 15)


def test_the_same_bytes_give_the_same_text():
    assert pack(NOISE) == pack(NOISE)


@needs_chromium
@pytest.mark.parametrize("wrong", ["", "charset"])
def test_a_browser_unpacks_what_was_packed(wrong, browser, tmp_path):
    page = render_demo({"models": [], "prompts": [], "plan": None, "packages": []}, CONTENTS)
    if wrong:
        # A mark at the beginning wins over what the page says of itself.
        head = "<head>".encode("utf-16-le")
        page = page.replace(head, head + '<meta charset="windows-1252">'.encode("utf-16-le"), 1)
    file = tmp_path / "page.html"
    file.write_bytes(page)
    script = """async (names) => Object.fromEntries(await Promise.all(names.map(async (name) => {
        const bytes = await unpack(name);
        return [name, Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")];
    })))"""
    with opened_file(browser, file) as shown:
        assert shown.evaluate("document.characterSet") == "UTF-16LE"
        found = shown.evaluate(script, list(CONTENTS))
    digests = {name: hashlib.sha256(bytes.fromhex(digits)).hexdigest() for name, digits in found.items()}
    assert digests == {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()}
