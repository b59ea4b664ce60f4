"""One file in which models run: the page of ``diffattn demo``, with all that it needs packed into it."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from pathlib import Path

from diffattn.demo.packing import pack
from diffattn.report.page import render, script

HERE = Path(__file__).parent
SCRIPTS = ("unpack.js", "looks.js", "demo.js", "cost.js")
"""The files that the page runs, in this order."""
WORKER = ("jspi.js", "engine.js")
"""The files that its worker runs: together they are the text of the element ``worker``."""


def render_demo(data: Mapping[str, object], blobs: Mapping[str, bytes]) -> bytes:
    """Returns the whole file.

    It is UTF-16 with a mark at its beginning, which a browser believes whatever a server says.

    Args:
        data: JSON-able values, which the page reads from the element ``data``.
        blobs: bytes that the page unpacks, each from the element ``blob-`` and its name.
    """
    from markupsafe import Markup

    packed = {name: pack(content) for name, content in blobs.items()}
    page = render(
        "demo.html",
        folder=HERE,
        scripts=[script("maps.js"), *(_text(name) for name in SCRIPTS)],
        data={"data": data},
        demo_css=Markup(_text("demo.css")),
        worker=Markup("\n".join(_text(name) for name in WORKER)),
        blobs=packed,
    )
    return codecs.BOM_UTF16_LE + page.encode("utf-16-le")


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
