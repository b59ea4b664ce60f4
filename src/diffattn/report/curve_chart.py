"""Loss curves: every seed of every variant, training and validation, against the tokens seen."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffattn.humanize import count, loss
from diffattn.report import charts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Sequence[dict[str, Any]]

MARKERS = "os^Dv<>P"
SMOOTH_ABOVE = 100
MOST_POINTS = 300
LEGEND_ROW, SEEDS_IN_A_ROW = 20, 5


def names_of(curves: Curves) -> list[str]:
    """The variants, in the order of their first run."""
    return list(dict.fromkeys(curve["attention"] for curve in curves))


def seeds_of(curves: Curves) -> list[int]:
    """The seeds, in the order of their first run."""
    return list(dict.fromkeys(curve["seed"] for curve in curves))


def smoothing(curves: Curves) -> int:
    """Steps of the moving average: 1 (none) up to 100 points, then a fiftieth of the longest run."""
    longest = max((len(curve["train"]) for curve in curves), default=0)
    return 1 if longest <= SMOOTH_ABOVE else max(5, longest // 50)


def smooth(values: "np.ndarray", window: int) -> "np.ndarray":
    """The centred moving average; at the ends over the points that there are.

    >>> smooth(np.array([1.0, 2.0, 6.0]), 3).tolist()
    [1.5, 3.0, 4.0]
    """
    if window <= 1 or len(values) < window:
        return values
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def points(series: Sequence[dict[str, Any]]) -> tuple["np.ndarray", "np.ndarray"]:
    """Tokens and losses; a loss that was not a number leaves a gap."""
    tokens = np.array([point["tokens"] for point in series], dtype=float)
    losses = np.array([math.nan if point["loss"] is None else point["loss"] for point in series], dtype=float)
    return tokens, losses


def loss_range(drawn: Sequence[tuple["np.ndarray", "np.ndarray"]]) -> tuple[float, float] | None:
    """A range that holds everything after the first quarter of the tokens: the start must not flatten the end."""
    finite = [(tokens[np.isfinite(losses)], losses[np.isfinite(losses)]) for tokens, losses in drawn]
    finite = [pair for pair in finite if len(pair[0])]
    if not finite:
        return None
    start = 0.25 * max(tokens.max() for tokens, _ in finite)
    late = [losses[tokens >= start] for tokens, losses in finite]
    kept = np.concatenate([values for values in late if len(values)])
    low, high = float(kept.min()), float(kept.max())
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def draw_curves(ax: "Axes", curves: Curves, part: str) -> None:
    """One panel: `part` is "train" or "validation"."""
    names, seeds = names_of(curves), seeds_of(curves)
    window = smoothing(curves)
    drawn = []
    for curve in curves:
        tokens, losses = points(curve[part])
        colour, line = charts.look(curve["attention"], names)
        marker = MARKERS[seeds.index(curve["seed"]) % len(MARKERS)]
        if part == "train":
            losses = smooth(losses, window)
            keep = np.unique(np.linspace(0, len(tokens) - 1, min(len(tokens), MOST_POINTS)).astype(int))
            tokens, losses = tokens[keep], losses[keep]
            # A run of one step has no line to show.
            ax.plot(tokens, losses, color=colour, linestyle=line, linewidth=1.1, marker="." if len(tokens) == 1 else "")
        else:
            ax.plot(tokens, losses, color=colour, linestyle=line, linewidth=1.2, marker=marker, markersize=4.5)
        drawn.append((tokens, losses))
    if (limits := loss_range(drawn)) is not None:
        ax.set_ylim(*limits)
    label_axes(ax)


def label_axes(ax: "Axes") -> None:
    """Both axes named, with few and short ticks."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_xlabel("training tokens")
    ax.set_ylabel("loss (nats per token)")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=7))
    ax.grid(True)


def draw_legend(fig: "Figure", curves: Curves, columns: int, left: float = 0.0, top: float = 2.0) -> None:
    """Variants by colour and line, under them seeds by marker; `left` and `top` are in CSS pixels."""
    from matplotlib.lines import Line2D

    names, width, height = names_of(curves), fig.get_figwidth() * 72, fig.get_figheight() * 72
    variants, seeds = [], []
    for name in names:
        colour, line = charts.look(name, names)
        variants.append(Line2D([], [], color=colour, linestyle=line, linewidth=1.8, label=name))
    for place, seed in enumerate(seeds_of(curves)):
        marker = MARKERS[place % len(MARKERS)]
        look: dict[str, Any] = {"color": charts.MUTED, "marker": marker, "markersize": 5, "linestyle": ""}
        seeds.append(Line2D([], [], label=f"seed {seed}", **look))
    for handles, length, ncols in ((variants, 2.6, columns), (seeds, 0.8, max(columns, SEEDS_IN_A_ROW))):
        shape: dict[str, Any] = {"handlelength": length, "columnspacing": 1.4, "handletextpad": 0.6, "borderpad": 0}
        corner = (left / width, 1 - top / height)
        fig.legend(handles=handles, ncols=ncols, loc="upper left", bbox_to_anchor=corner, borderaxespad=0, **shape)
        top += LEGEND_ROW * math.ceil(len(handles) / ncols)


def legend_height(curves: Curves, columns: int) -> int:
    """The room in CSS pixels that the legend takes."""
    seed_rows = math.ceil(len(seeds_of(curves)) / max(columns, SEEDS_IN_A_ROW))
    return LEGEND_ROW * (math.ceil(len(names_of(curves)) / columns) + seed_rows)


def curve_figure(curves: Curves, wide: bool) -> "Figure":
    """Training beside validation on a wide screen, above it on a narrow one."""
    columns = 8 if wide else 3
    top = legend_height(curves, columns) + 36
    panel, gap = (330, 0) if wide else (235, 78)
    left = 58 if wide else 50
    width = (charts.WIDE - 2 * left - 30) / 2 if wide else charts.NARROW - left - 18
    height = top + panel + 48 if wide else top + 2 * panel + gap + 48
    fig = charts.figure(charts.WIDE if wide else charts.NARROW, height)
    for place, (part, title) in enumerate((("train", "Training"), ("validation", "Validation"))):
        across = left + place * (width + left + 14) if wide else left
        down = top if wide else top + place * (panel + gap)
        ax = charts.axes(fig, across, down, width, panel)
        draw_curves(ax, curves, part)
        ax.set_title(title)
    draw_legend(fig, curves, columns, left=4)
    return fig


def curve_caption(curves: Curves) -> str:
    """What was done to the curves, in words."""
    window = smoothing(curves)
    how = f"a moving average over {window} steps" if window > 1 else "every step"
    return (
        f"One line per seed. Training: {how}. Validation: every evaluation. "
        "The loss axis fits what follows the first quarter of the tokens; the start may lie above the frame."
    )


def curve_alt(curves: Curves) -> str:
    """The chart in words: where each variant's validation ends."""
    ends = []
    for name in names_of(curves):
        last = [c["validation"][-1]["loss"] for c in curves if c["attention"] == name and c["validation"]]
        ends.append(f"{name} ends at {', '.join(loss(value) for value in last)}" if last else f"{name} has none")
    seeds = len(seeds_of(curves))
    return f"Training and validation loss against training tokens, {seeds} seed(s). Validation: {'; '.join(ends)}."
