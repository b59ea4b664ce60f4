"""What a fit of scaling laws shows: tables for a terminal, a chart, and one page with both."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffattn.humanize import MISSING, count
from diffattn.report import charts
from diffattn.report.format import BASELINE
from diffattn.report.page import render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {BASELINE: "o", "diff_v1": "s", "diff_v2": "^", "gated": "v"}


def number_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The fitted numbers: a header, then a row per form and variant."""
    rows = [["form", "variant", "fitted, with 95% interval", "AIC", "AICc", "largest residual"]]
    for form in result["forms"].values():
        for name, fit in form["variants"].items():
            numbers = ", ".join(f"{key} {_between(entry, _short)}" for key, entry in fit["parameters"].items())
            largest = max(fit["residuals"], key=abs)
            rows.append([form["formula"], name, numbers, _plain(fit["aic"]), _plain(fit["aicc"]), f"{largest:+.2%}"])
    return rows


def equivalence_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Which models have the same loss, the forms side by side: a header, then a row per direction and size."""
    forms = list(result["forms"].values())
    rows = [["this model", *(f"equals, by {form['formula']}" for form in forms)]]
    for same in zip(*(form["equivalences"] for form in forms), strict=True):
        rows.append([f"{same[0]['given']} {count(same[0]['size'])}", *map(_equal, same)])
    return rows


def _equal(row: Mapping[str, Any]) -> str:
    if row["equal"]["value"] is None:
        return row["words"]
    ratio = _between(row["ratio"], lambda value: f"{value:.3f}")
    return f"{row['other']} {_between(row['equal'], count)}; DIFF / softmax {ratio}: {row['words']}"


def render_scaling(result: Mapping[str, Any]) -> str:
    """The page, as HTML that needs no network."""
    numbers, equal = number_rows(result), equivalence_rows(result)
    return render(
        "scaling.html",
        source=result["source"],
        axis=_unit(result),
        points=len(result["points"]),
        bootstrap=result["bootstrap"],
        command=result["command"],
        tables=[("Equal losses", equal), ("Fitted numbers", numbers)],
        figures=[
            (form["formula"], charts.picture(functools.partial(scaling_figure, result, name), _alt(result)))
            for name, form in result["forms"].items()
        ],
    )


def write_scaling_png(result: Mapping[str, Any], path: str | Path) -> None:
    """The charts of all forms, side by side, as one PNG."""
    with charts.style():
        names = list(result["forms"])
        fig = charts.figure(620 * len(names), 460)
        for place, name in enumerate(names):
            _draw(charts.axes(fig, 620 * place + 70, 50, 530, 340), result, name)
        charts.write_png(fig, path)


def scaling_figure(result: Mapping[str, Any], form: str, wide: bool) -> Figure:
    """One form: points, curves, and an arrow from the largest DIFF model to the softmax size of equal loss."""
    width, height = (charts.WIDE, 480) if wide else (charts.NARROW, 420)
    fig = charts.figure(width, height)
    _draw(charts.axes(fig, 64, 44, width - 84, height - 110), result, form)
    return fig


def _draw(ax: Axes, result: Mapping[str, Any], form: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    fits, axis = result["forms"][form]["variants"], result["axis"]
    key = "tokens" if axis == "tokens" else "size"
    names = list(fits)
    for name in names:
        colour, line = charts.look(name, names)
        own = [point for point in result["points"] if point["attention"] == name]
        sizes, losses = [point[key] for point in own], [point["val_loss"] for point in own]
        ax.plot(sizes, losses, linestyle="", marker=MARKERS.get(name, "D"), color=colour, markersize=5, alpha=0.8)
        curve = fits[name]["curve"]
        ax.plot(curve["x"], curve["loss"], color=colour, linestyle=line, linewidth=1.5, label=name)
    ax.set(xscale="log", yscale="log", xlabel=_unit(result), ylabel="held-out loss (nats per token)")
    every = np.array([point["val_loss"] for point in result["points"]])
    ax.set_ylim(float(every.min() / 1.02), float(every.max() * 1.02))
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    ax.tick_params(axis="x", rotation=30)
    ax.grid(True)
    ax.legend(loc="upper right")
    ax.set_title(result["forms"][form]["formula"])
    _arrow(ax, result, form)


def _arrow(ax: Axes, result: Mapping[str, Any], form: str) -> None:
    """Along one loss, from a DIFF size to the softmax size that has it: the largest that is inside the axes."""
    low, high = ax.get_xlim()
    rows = [
        row
        for row in result["forms"][form]["equivalences"]
        if row["given"] != BASELINE and row["equal"]["value"] and low < row["equal"]["value"] < high
    ]
    if not rows:
        return
    row = max(rows, key=lambda row: (not row["extrapolated"], row["size"]))
    fit = result["forms"][form]["variants"][row["given"]]["curve"]
    loss = float(np.interp(np.log(row["size"]), np.log(fit["x"]), fit["loss"]))
    colour = charts.look(row["given"], list(result["forms"][form]["variants"])).colour
    head, foot = (float(row["equal"]["value"]), loss), (float(row["size"]), loss)
    ax.annotate("", xy=head, xytext=foot, arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 2})
    text = f"{row['given']} {count(row['size'])} = softmax {count(row['equal']['value'])}"
    # Left of the arrow, below the curves, nothing else is drawn.
    left = min(head, foot)
    ax.annotate(text, left, xytext=(-3, -7), textcoords="offset points", ha="right", va="top", color=colour)


def _alt(result: Mapping[str, Any]) -> str:
    rows = [row for form in result["forms"].values() for row in form["equivalences"] if row["given"] != BASELINE]
    told = (f"{row['given']} of {count(row['size'])} equals softmax of {count(row['equal']['value'])}" for row in rows)
    return f"Held-out loss against {_unit(result)} with fitted curves: {'; '.join(told)}."


def _unit(result: Mapping[str, Any]) -> str:
    return {"non_embedding_parameters": "parameters without the embedding", "tokens": "training tokens"}.get(
        result["axis"], "parameters"
    )


def _between(entry: Mapping[str, float | None], written: Any) -> str:
    ends = [written(entry[end]) if entry[end] is not None else "∞" for end in ("low", "high")]
    return f"{MISSING if entry['value'] is None else written(entry['value'])} ({' to '.join(ends)})"


def _short(value: float) -> str:
    return f"{value:.3g}"


def _plain(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"
