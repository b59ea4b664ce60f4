"""The attention maps of one head: map_pos, λ·map_neg and their difference, on one scale about zero."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffattn.errors import DataError
from diffattn.report import charts
from diffattn.results.maps import AttentionMaps, MapSet

if TYPE_CHECKING:
    import altair as alt

PANELS = {"map_pos": "map_pos", "lam_map_neg": "λ·map_neg", "map_diff": "map_diff = map_pos − λ·map_neg"}
FUTURE = "#d9dce1"
LONGEST_LABEL = 11
# More cells than this on a side are smaller than what a screen shows; more labels than that lie on each other.
MOST_CELLS, MOST_LABELS = 128, 64
# About what a page gives one of three maps, in pixels.
MAP_SIDE = 290


def token_label(token: str) -> str:
    """A token as an axis shows it: never empty, never long, no character that an SVG refuses.

    >>> [token_label(t) for t in ("the", " ", "internationalisation", "a\\nb")]
    ['the', '␣', 'internatio…', 'a↵b']
    """
    shown = "".join("↵" if c == "\n" else "␣" if c.isspace() else c if c.isprintable() else "·" for c in token)
    return shown if len(shown) <= LONGEST_LABEL else shown[: LONGEST_LABEL - 1] + "…"


def panels(entry: AttentionMaps, tokens: Sequence[str], *, causal: bool = True) -> dict[str, np.ma.MaskedArray]:
    """The maps that a variant has, with everything after the query masked where it is causal."""
    length = len(tokens)
    future = np.triu(np.full((length, length), causal), 1)
    found: dict[str, np.ma.MaskedArray] = {}
    for key, rows in entry.maps.items():
        weights = np.asarray(rows, dtype=float)
        if weights.shape != (length, length):
            raise DataError(
                f"{key} of shape {weights.shape}",
                f"({length}, {length}), a row and a column for each of the {length} tokens",
                "give the tokens that the map was made from",
            )
        found[key] = np.ma.masked_array(weights, mask=future)
    return found


def scale(maps: MapSet) -> tuple[float, float]:
    """The end of the common scale, and the largest weight: the few that lie beyond it saturate.

    The first queries see few keys, so their weights are near 1 whatever the head does; a scale that reached them would
    leave nothing of the rest. It ends at the 97th percentile of the weights from the fourth query on.
    """
    every, late = [np.zeros(1)], [np.zeros(1)]
    for entry in maps.variants.values():
        for weights in panels(entry, maps.tokens, causal=maps.causal).values():
            every.append(np.abs(weights).compressed())
            late.append(np.abs(weights[3:] if len(weights) > 6 else weights).compressed())
    largest = float(np.nanmax(np.concatenate(every)))
    end = max(float(np.nanpercentile(np.concatenate(late), 97)), 0.01)
    step = 10.0 ** math.floor(math.log10(end)) / 2
    return round(math.ceil(end / step) * step, 6), largest


def lambda_text(entry: AttentionMaps) -> str:
    """λ as a title says it: one number, or its range over the tokens; empty without a λ.

    >>> lambda_text(AttentionMaps(map_pos=[], lam=0.3556)), lambda_text(AttentionMaps(map_pos=[], lam=[0.2, 0.58]))
    ('λ = 0.356', 'λ from 0.200 to 0.580 over the tokens')
    """
    if entry.lam is None:
        return ""
    if isinstance(entry.lam, int | float):
        return f"λ = {_short(entry.lam)}"
    return f"λ from {_short(min(entry.lam))} to {_short(max(entry.lam))} over the tokens"


def _short(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def block_of(tokens: Sequence[str]) -> int:
    """The tokens of a square's side: 1, and of a long text as many as leave no more than ``MOST_CELLS`` squares.

    >>> block_of(["a"] * 128), block_of(["a"] * 242)
    (1, 2)
    """
    return -(-len(tokens) // MOST_CELLS)


def cells(weights: np.ma.MaskedArray, tokens: Sequence[str]) -> list[dict[str, object]]:
    """A row of data per weight that a query has; of a long text one per block, its largest by magnitude."""
    block = block_of(tokens)
    found: list[dict[str, object]] = []
    for query in range(0, len(tokens), block):
        for key in range(0, len(tokens), block):
            inside = weights[query : query + block, key : key + block].compressed()
            if len(inside):
                weight = float(inside[np.argmax(np.abs(inside))])
                asks, asked = token_label(tokens[query]), token_label(tokens[key])
                words = {"query token": asks, "key token": asked, "in digits": _short(weight)}
                found.append({"query": query, "key": key, "weight": round(weight, 6), **words})
    return found


def map_chart(
    weights: np.ma.MaskedArray,
    tokens: Sequence[str],
    title: str,
    limits: tuple[float, float],
    words: str = "",
    *,
    side: int | None = None,
    legend: bool = True,
) -> alt.Chart:
    """One map: a square per weight, red above zero, blue below, grey what a query cannot see.

    Args:
        weights: (T, T), as of ``panels``.
        tokens: the T tokens.
        title: the line above the map.
        limits: the end of the scale and the largest weight, as of ``scale``.
        words: the map for those who cannot see it. Default: empty.
        side: of the map in pixels. Default: None, what the page has room for.
        legend: whether the scale is drawn below the map. Default: True.
    """
    import altair as alt

    limit, largest = limits
    block = block_of(tokens)
    step = block * -(-len(tokens) // (block * MOST_LABELS))
    squares = f", {block} × {block} tokens a square" if block > 1 else ""
    shown = [token_label(token) for token in tokens]
    label = alt.Axis(
        labelExpr=f"{json.dumps(shown, ensure_ascii=False)}[datum.value]",
        values=list(range(0, len(tokens), step)),
        labelFontSize=max(4, min(11, 0.92 * (side or MAP_SIDE) / len(shown[::step]))),
        labelOverlap=False,
        ticks=False,
        domain=False,
        grid=False,
    )
    number = "replace(format(datum.value, '.3~g'), '-', '−')"
    ends = f"(datum.value === {-limit} ? '≤ ' : datum.value === {limit} ? '≥ ' : '') + " if largest > limit else ""
    colour = alt.Color(
        "weight:Q",
        scale=alt.Scale(scheme="redblue", reverse=True, domain=[-limit, limit], clamp=True),
        legend=alt.Legend(
            title="attention weight",
            orient="bottom",
            direction="horizontal",
            gradientLength=190,
            gradientThickness=10,
            labelOffset=5,
            values=[-limit, 0, limit],
            labelExpr=ends + number,
        )
        if legend
        else None,
    )
    room = {"width": "container", "height": "container"} if side is None else {"width": side, "height": side}
    return (
        alt.Chart(charts.data_of(cells(weights, tokens)))
        # A little more than its own room, so that no light line is left between two squares.
        .mark_rect(width=alt.RelativeBandSize(band=1.04), height=alt.RelativeBandSize(band=1.04))
        .encode(
            x=alt.X("key:O", title=f"key (attended token){squares}", axis=label.copy()),
            y=alt.Y("query:O", title="query", axis=label),
            color=colour,
            tooltip=charts.tooltips(**{"query token": "query", "key token": "key", "in digits": "weight"}),
        )
        .properties(title=title, description=words, view=alt.ViewConfig(fill=FUTURE), **room)
    )


def map_alt(maps: MapSet, name: str, key: str) -> str:
    """A map in words: where it is largest and what its smallest weight is."""
    tokens = maps.tokens
    weights = panels(maps.variants[name], tokens)[key]
    row, column = divmod(int(np.ma.argmax(weights[1:])), len(tokens)) if len(tokens) > 1 else (-1, 0)
    largest = f"{weights[row + 1, column]:.3f} from “{tokens[row + 1]}” to “{tokens[column]}”"
    return (
        f"{name}: heat map of {PANELS[key].split(' = ')[0]} over {len(tokens)} tokens. After the first query, it is "
        f"largest at {largest}; its smallest weight is {_short(float(weights.min()))}."
    )
