"""The attention maps of one head, side by side: map_pos, λ·map_neg and their difference, on one scale about zero."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffattn.errors import DataError
from diffattn.report import charts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {"map_pos": "map_pos", "lam_map_neg": "λ·map_neg", "map_diff": "map_diff = map_pos − λ·map_neg"}
COLOURS = "RdBu_r"
FUTURE = "#d9dce1"
LONGEST_LABEL = 11


def token_label(token: str) -> str:
    """A token as an axis shows it: never empty, never long, no character that an SVG refuses.

    >>> [token_label(t) for t in ("the", " ", "internationalisation", "a\\nb")]
    ['the', '␣', 'internatio…', 'a↵b']
    """
    shown = "".join("↵" if c == "\n" else "␣" if c.isspace() else c if c.isprintable() else "·" for c in token)
    return shown if len(shown) <= LONGEST_LABEL else shown[: LONGEST_LABEL - 1] + "…"


def panels(entry: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, "np.ndarray"]:
    """The maps that a variant has, with everything after the query masked."""
    length = len(tokens)
    future = np.triu(np.ones((length, length), dtype=bool), 1)
    found: dict[str, np.ndarray] = {}
    for key in PANELS:
        if key in entry:
            weights = np.asarray(entry[key], dtype=float)
            if weights.shape != (length, length):
                raise DataError(f"{key} has the shape {weights.shape}; {length} tokens want ({length}, {length})")
            found[key] = np.ma.masked_array(weights, mask=future)
    return found


def scale(maps: Mapping[str, Any]) -> tuple[float, float]:
    """The end of the common scale, and the largest weight: the few that lie beyond it saturate.

    The first queries see few keys, so their weights are near 1 whatever the head does; a scale that reached them would
    leave nothing of the rest. It ends at the 97th percentile of the weights from the fourth query on.
    """
    every, late = [np.zeros(1)], [np.zeros(1)]
    for entry in maps["variants"].values():
        for weights in panels(entry, maps["tokens"]).values():
            every.append(np.abs(weights).compressed())
            late.append(np.abs(weights[3:] if len(weights) > 6 else weights).compressed())
    largest = float(np.nanmax(np.concatenate(every)))
    end = max(float(np.nanpercentile(np.concatenate(late), 97)), 0.01)
    step = 10.0 ** math.floor(math.log10(end)) / 2
    return round(math.ceil(end / step) * step, 6), largest


def lambda_text(entry: Mapping[str, Any]) -> str:
    """λ as a title says it: one number, or its range over the tokens.

    >>> lambda_text({"lam": 0.3556}), lambda_text({"lam": [0.2, 0.58]}), lambda_text({})
    ('λ = 0.356', 'λ from 0.200 to 0.580 over the tokens', '')
    """
    lam = entry.get("lam")
    if lam is None:
        return ""
    if isinstance(lam, list | tuple):
        return f"λ from {_short(min(lam))} to {_short(max(lam))} over the tokens"
    return f"λ = {_short(lam)}"


def _short(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def draw_map(ax: "Axes", weights: "np.ndarray", limit: float) -> Any:
    """One map; what a query cannot see is grey."""
    from matplotlib import colormaps

    image = ax.imshow(
        weights, cmap=colormaps[COLOURS].with_extremes(bad=FUTURE), vmin=-limit, vmax=limit, interpolation="none"
    )
    for spine in ax.spines.values():
        spine.set_visible(True)
        spine.set_color(charts.MUTED)
    return image


def label_tokens(ax: "Axes", tokens: Sequence[str], font: float, rows: bool = True, columns: bool = True) -> None:
    """Queries on the left, keys below."""
    places, labels = range(len(tokens)), [token_label(token) for token in tokens]
    shared: dict[str, Any] = {"fontsize": font, "rotation_mode": "anchor", "color": charts.INK}
    ax.set_xticks(places, labels if columns else [""] * len(labels), rotation=90, ha="right", va="center", **shared)
    ax.set_yticks(places, labels if rows else [""] * len(labels), ha="right", va="center", **shared)
    ax.tick_params(length=0, pad=3)


def label_room(tokens: Sequence[str], font: float) -> float:
    """The width in CSS pixels of the longest label; browsers' fonts are narrower than this."""
    return 0.64 * font * max((len(token_label(token)) for token in tokens), default=1) + 6


def colour_bar(ax: "Axes", image: Any, limit: float, largest: float, across: bool) -> None:
    """The scale beside or below the maps, with arrows where weights lie beyond it."""
    bar = ax.figure.colorbar(
        image,
        cax=ax,
        orientation="horizontal" if across else "vertical",
        extend="both" if largest > limit else "neither",
        ticks=[-limit, -limit / 2, 0, limit / 2, limit],
        format=lambda value, _: f"{value:.3g}".replace("-", "−"),
    )
    bar.set_label("attention weight", fontsize=11, labelpad=2)
    bar.outline.set_edgecolor(charts.MUTED)


def map_figure(maps: Mapping[str, Any], name: str, limit: float, largest: float, wide: bool) -> "Figure":
    """One variant's maps: in a row on a wide screen, in a column on a narrow one."""
    tokens = maps["tokens"]
    found = panels(maps["variants"][name], tokens)
    total = charts.WIDE if wide else charts.NARROW
    # The labels' room depends on their size and theirs on the cells; a guess of the side settles it.
    font = min(11.0, (310 if wide else 300) / len(tokens) * 0.9)
    room, axis_name, gap, bar = label_room(tokens, font), 21, 16, 92
    left, below, title = room + axis_name, room + axis_name, 24
    side = (total - left - 2 * gap - bar) / 3 if wide else total - left - 4
    if wide:
        across = [left + place * (side + gap) for place in range(len(found))]
        down = [float(title)] * len(found)
        fig = charts.figure(across[-1] + side + bar, title + side + below)
        bar_axes = charts.axes(fig, across[-1] + side + 14, title, 12, side)
    else:
        across = [left] * len(found)
        down = [title + place * (title + side + below + 8) for place in range(len(found))]
        fig = charts.figure(total, down[-1] + side + below + 62)
        bar_axes = charts.axes(fig, left, down[-1] + side + below + 14, side, 12)
    for place, (key, weights) in enumerate(found.items()):
        ax = charts.axes(fig, across[place], down[place], side, side)
        image = draw_map(ax, weights, limit)
        label_tokens(ax, tokens, font, rows=not wide or place == 0)
        ax.set_title(PANELS[key], fontsize=13, pad=6)
        ax.set_xlabel("key (attended token)", fontsize=11, labelpad=2)
        if not wide or place == 0:
            ax.set_ylabel("query", fontsize=11, labelpad=5)
    colour_bar(bar_axes, image, limit, largest, across=not wide)
    return fig


def map_alt(maps: Mapping[str, Any], name: str) -> str:
    """The maps in words: where the last one is largest and smallest."""
    tokens = maps["tokens"]
    found = panels(maps["variants"][name], tokens)
    key, weights = list(found.items())[-1]
    row, column = np.unravel_index(int(np.ma.argmax(weights[1:])), weights[1:].shape) if len(tokens) > 1 else (-1, 0)
    largest = f"{weights[row + 1, column]:.3f} from “{tokens[row + 1]}” to “{tokens[column]}”"
    return (
        f"{name}: heat maps of {', '.join(PANELS[k].split(' = ')[0] for k in found)} over {len(tokens)} tokens. After "
        f"the first query, {key} is largest at {largest}; its smallest weight is {_short(float(weights.min()))}."
    )
