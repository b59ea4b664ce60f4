"""The parts that every chart of a report shares: one look per variant, one theme, the specification and the PNG.

A chart is declared once, as data and encodings of Altair. A page draws its specification at the width that there is,
and a PNG is the same specification drawn by vl-convert. What is neither a variant nor a shade has the colour of the
text around it (``currentColor``), so that one specification serves light pages and dark ones. Numbers that a person
reads are written by ``diffattn.humanize`` and lie in the data; only the round numbers of an axis are written by Vega,
by the rules in ``COUNT_TICKS`` and ``BYTE_TICKS``. altair is imported when a chart is made, vl-convert for a PNG or a
page.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from diffattn.files import GENERATOR, write_bytes
from diffattn.variants import ATTENTIONS, Look

if TYPE_CHECKING:
    import altair as alt

    AnyChart: TypeAlias = alt.Chart | alt.LayerChart | alt.HConcatChart | alt.VConcatChart | alt.ConcatChart

Row: TypeAlias = Mapping[str, object]

INK, PAPER = "currentColor", "#ffffff"
SOLID = [1, 0]
# The colour that currentColor has in a PNG.
PNG_INK = "#1b1f24"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
# 20000000 is 20M and 2000000000 is 2B, as everywhere here; Vega's own letter for 10^9 is G.
COUNT_TICKS = "replace(format(datum.value, '~s'), 'G', 'B')"
# A minus sign is as wide as a plus.
SIGNED_TICKS = "datum.value === 0 ? '0' : replace(format(datum.value, '+.3~g'), '-', '−')"
# A power of 1024 for the unit, and what is left of the number before it.
_POWER = "max(0, min(5, floor(log(max(datum.value, 1)) / log(1024) + 1e-9)))"
BYTE_TICKS = (
    f"format(datum.value / pow(1024, {_POWER}), '.3~g') + ' ' + ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'][{_POWER}]"
)

_QUIET = {"labelColor": INK, "titleColor": INK, "labelFontSize": 12, "titleFontSize": 12.5, "titleFontWeight": "normal"}
CONFIG = {
    # The page's own paper; a PNG is given a white one.
    "background": None,
    "font": FONT,
    "view": {"stroke": None},
    "axis": _QUIET
    | {"labelOpacity": 0.8, "gridColor": INK, "gridOpacity": 0.12, "domainColor": INK, "domainOpacity": 0.5}
    | {"tickColor": INK, "tickOpacity": 0.5, "labelSeparation": 6},
    "legend": _QUIET
    | {"title": None, "symbolStrokeWidth": 2, "symbolBaseFillColor": INK, "symbolBaseStrokeColor": INK},
    "title": {"color": INK, "subtitleColor": INK, "anchor": "start", "fontSize": 14, "subtitleFontSize": 12},
    "text": {"color": INK, "fontSize": 12.5},
    "rule": {"color": INK},
    "range": {"category": [INK]},
}


# Looks of what is no variant.
MORE_LOOKS = (
    Look("#B0548A", "#e08dbd", (10, 3), "diamond"),
    Look("#8A6A00", "#d9b43a", (3, 1, 1, 1, 1, 1), "cross"),
    Look("#4B6A9B", "#8fb0e3", (1, 1, 5, 1), "triangle-right"),
)


def look(name: str, names: Sequence[str]) -> Look:
    """The look of a variant; what is none, such as an ablation's arm, takes one by its place in ``names``."""
    if name in ATTENTIONS:
        return ATTENTIONS[name].look
    others = [other for other in names if other not in ATTENTIONS]
    return MORE_LOOKS[others.index(name) % len(MORE_LOOKS)]


def colour_of(field: str, names: Sequence[str], legend: alt.Legend | None = None) -> alt.Color:
    """The encoding of a variant as its colour."""
    import altair as alt

    scale = alt.Scale(domain=list(names), range=[look(name, names).colour for name in names])
    return alt.Color(field, type="nominal", scale=scale, legend=legend)


def dash_of(field: str, names: Sequence[str], legend: alt.Legend | None = None) -> alt.StrokeDash:
    """The encoding of a variant as the dashes of its line."""
    import altair as alt

    scale = alt.Scale(domain=list(names), range=[list(look(name, names).dash) or SOLID for name in names])
    return alt.StrokeDash(field, type="nominal", scale=scale, legend=legend)


def mark_of(field: str) -> alt.Shape:
    """The encoding of a field that holds shapes by Vega's names: the legend of another encoding keeps its symbols."""
    import altair as alt

    return alt.Shape(field, type="nominal", scale=None, legend=None)


def line_legend(columns: int = 4) -> alt.Legend:
    """A legend above a chart, whose symbols are pieces of the lines."""
    import altair as alt

    return alt.Legend(
        orient="top", symbolType="stroke", symbolSize=500, symbolOpacity=1, columns=columns, columnPadding=14
    )


def tooltips(**titles: str) -> list[alt.Tooltip]:
    """The fields of the data that are shown where one points, each with its title."""
    import altair as alt

    return [alt.Tooltip(field, type="nominal", title=title) for field, title in titles.items()]


def round_numbers(low: float, high: float) -> list[float]:
    """The ticks of a logarithmic axis: 1, 2 and 5 times each power of ten.

    >>> round_numbers(300, 2100)
    [500.0, 1000.0, 2000.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in (1, 2, 5) if low <= step * 10.0**power <= high]


def data_of(rows: Sequence[Row]) -> alt.Data:
    """Rows as data of a chart."""
    import altair as alt

    return alt.Data(values=[dict(row) for row in rows])


def layered(layers: Sequence[alt.Chart], data: alt.Data | None = None) -> alt.LayerChart:
    """Charts on top of each other; ``data`` is what those draw that have no data of their own."""
    import altair as alt

    return alt.LayerChart(data=alt.Undefined if data is None else data, layer=list(layers))


def specification(chart: AnyChart) -> dict[str, object]:
    """The chart as JSON-able data in Vega-Lite's words, with the theme."""
    # Altair checks each part as it is made; a second check of the whole would read every row of the data.
    found: dict[str, object] = chart.to_dict(validate=False)
    return found | {"config": CONFIG}


def png(chart: AnyChart, *, width: int | None = None) -> bytes:
    """The chart as a PNG that says which program made it.

    Args:
        chart: what to draw.
        width: of the picture, in pixels. Default: None, twice the chart's own width.
    """
    import vl_convert

    found = specification(chart) | {"background": PAPER, "padding": 12}
    svg = vl_convert.vegalite_to_svg(found).replace("<svg ", f'<svg color="{PNG_INK}" ', 1)
    own = float(svg.split(' width="', 1)[1].split('"', 1)[0])
    return _signed_and_small(vl_convert.svg_to_png(svg, scale=2 if width is None else width / own))


def _signed_and_small(made: bytes) -> bytes:
    """A PNG with the name of this program in it, and compressed well: its pixels stay as they are."""
    header, pixels, place = b"", b"", 8
    while place < len(made):
        length, kind = struct.unpack(">I4s", made[place : place + 8])
        content = made[place + 8 : place + 8 + length]
        header, pixels = (content, pixels) if kind == b"IHDR" else (header, pixels + content * (kind == b"IDAT"))
        place += length + 12
    chunks = {
        b"IHDR": header,
        b"tEXt": f"Software\0{GENERATOR}".encode("latin-1"),
        b"IDAT": zlib.compress(zlib.decompress(pixels)),
        b"IEND": b"",
    }
    parts = [kind + content for kind, content in chunks.items()]
    return made[:8] + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts
    )


def write_png(chart: AnyChart, path: str | Path, *, width: int | None = None) -> None:
    """Write the chart as a PNG, whole or not at all; arguments as of ``png``."""
    write_bytes(Path(path), png(chart, width=width))
