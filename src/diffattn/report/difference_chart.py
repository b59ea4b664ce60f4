"""The paired differences in validation loss, each with its interval, about a line at zero."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffattn.humanize import signed
from diffattn.report import charts
from diffattn.report.format import BASELINE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE, ROW = 620, 58


def interval_text(difference: Mapping[str, Any], seeds: int) -> str:
    """The interval as it is read, or why there is none.

    >>> interval_text({"low": -0.02, "high": 0.01}, 2)
    '−0.0200 to +0.0100'
    >>> interval_text({"low": None, "high": None}, 1)
    'one seed: no interval'
    """
    low, high = difference["low"], difference["high"]
    if low is not None and high is not None:
        return f"{signed(low)} to {signed(high)}"
    return "one seed: no interval" if seeds == 1 else "no interval"


def interval_heading(seeds: int) -> str:
    """What the interval is, with the number of seeds that it rests on."""
    return "95% interval" if seeds == 1 else f"95% interval over {seeds} seeds"


def baseline_of(result: Mapping[str, Any], name: str) -> str:
    """What a variant is compared with: softmax, unless its pair says otherwise."""
    return result["pairs"].get(name, {}).get("baseline", BASELINE)


def seed_differences(result: Mapping[str, Any], name: str) -> list[float]:
    """Each seed's own difference, where both losses are known."""
    ours = result["variants"].get(name, {}).get("val_loss") or []
    theirs = result["variants"].get(baseline_of(result, name), {}).get("val_loss") or []
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if a is not None and b is not None]
    return [a - b for a, b in pairs if math.isfinite(a - b)]


def difference_figure(result: Mapping[str, Any], wide: bool) -> "Figure":
    """One row per pair: the mean, the interval, each seed, and the numbers above them."""
    pairs, names = result["pairs"], list(result["variants"])
    width = WIDE if wide else charts.NARROW
    fig = charts.figure(width, ROW * len(pairs) + 66)
    ax = charts.axes(fig, 14, 22, width - 28, ROW * len(pairs))
    reach = 0.0
    baselines = {baseline_of(result, name) for name in pairs}
    common = next(iter(baselines)) if len(baselines) == 1 else None
    for place, (name, pair) in enumerate(pairs.items()):
        difference, colour = pair["val_loss_difference"], charts.look(name, names).colour
        mean, low, high = (difference[key] for key in ("mean", "low", "high"))
        each = seed_differences(result, name)
        row = place + 0.64
        title = name if baseline_of(result, name) == common else f"{name} − {baseline_of(result, name)}"
        ax.text(0.0, place + 0.22, title, transform=ax.get_yaxis_transform(), weight="bold", va="center", color=colour)
        text = f"{signed(mean)}   ({interval_text(difference, len(result['seeds']))})"
        # The zero line must not strike a number through.
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        at_right: dict[str, Any] = {
            "transform": ax.get_yaxis_transform(),
            "ha": "right",
            "va": "center",
            "fontsize": 11,
        }
        ax.text(1.0, place + 0.22, text, bbox=clear, **at_right)
        if low is not None and high is not None:
            ax.plot([low, high], [row, row], color=colour, linewidth=3, solid_capstyle="butt")
            ax.plot([low, high], [row, row], color=colour, linestyle="", marker="|", markersize=13, markeredgewidth=2)
        ax.plot(each, [row] * len(each), linestyle="", marker="o", markersize=5, color="white", markeredgecolor=colour)
        if mean is not None:
            ax.plot([mean], [row], linestyle="", marker="D", markersize=8, color=colour, zorder=3)
        known = [value for value in (mean, low, high, *each) if value is not None and math.isfinite(value)]
        reach = max([reach, *map(abs, known)])
        if place:
            ax.axhline(place, color=charts.GRID, linewidth=0.8)
    reach = 1.12 * reach or 0.01
    ax.set_xlim(-reach, reach)
    ax.set_ylim(len(pairs), 0)
    _frame(ax, common)
    return fig


def _frame(ax: Any, baseline: str | None) -> None:
    """The zero line, the direction of better, and an axis that is named."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.axvline(0, color=charts.INK, linewidth=1.2, zorder=1)
    for word, place, side in (
        (f"← better than {baseline}" if baseline else "← better", -8, "right"),
        ("worse →", 8, "left"),
    ):
        shown = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": side, "va": "bottom", "fontsize": 11}
        ax.annotate(word, (0.5, 1.0), (place, 2), **shown)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, symmetric=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.3g}".replace("-", "−") if value else "0"))
    of = f"{baseline}'s" if baseline else "that of the other"
    ax.set_xlabel(f"validation loss − {of} (nats per token)")


def difference_alt(result: Mapping[str, Any]) -> str:
    """The chart in words."""
    seeds = len(result["seeds"])
    parts = []
    for name, pair in result["pairs"].items():
        difference = pair["val_loss_difference"]
        parts.append(f"{name} {signed(difference['mean'])} ({interval_text(difference, seeds)})")
    return f"Paired difference in validation loss from {BASELINE}, about a zero line: {'; '.join(parts)}."
