"""A study's result as a table and as one chart: a panel per thing measured, a line with its interval per model.

Where panels have a second axis with several places, each model has a map of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffattn.report import charts

PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 400, 240, 3


def study_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The header and a row per point: each model's mean ± half its 95% interval, then its difference from the first."""
    names = list(result["models"])
    first, others = names[0], names[1:]
    second = any(point["by"] is not None for point in result["points"])
    places = [*([result["axes"]["by"]] if second else []), result["axes"]["x"]]
    header = [result["study"], *places, *names, *(f"{name} − {first}" for name in others)]
    rows = [header]
    for point in result["points"]:
        models = point["models"]
        at = [*([_place(point["by"])] if second else []), _place(point["x"])]
        row = [point["panel"], *at, *(_mean(models.get(name)) for name in names)]
        rows.append([*row, *(_difference(models.get(name)) for name in others)])
    return rows


def _place(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e6 else f"{value:,.0f}"


def _mean(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "–"
    return _number(entry["mean"]) + _half(entry)


def _difference(entry: Mapping[str, Any] | None) -> str:
    difference = None if entry is None else entry.get("difference")
    if difference is None:
        return "–"
    text = ("+" if difference["mean"] > 0 else "") + _number(difference["mean"]) + _half(difference)
    unclear = difference["low"] is None or difference["low"] <= 0 <= difference["high"]
    return f"{text}, none seen" if unclear else text


def _half(entry: Mapping[str, Any]) -> str:
    return "" if entry["low"] is None else f" ±{_number(entry['high'] - entry['mean'])}"


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}" if abs(value) >= 100 else f"{value:.3f}"


def write_study_png(result: Mapping[str, Any], path: str | Path) -> None:
    """The chart, as one PNG."""
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for point in result["points"]:
        panels.setdefault(point["panel"], []).append(point)
    names = list(result["models"])
    if len({point["by"] for point in result["points"]}) > 1:
        _write_maps(result, panels, names, path)
        return
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with charts.style():
        fig = charts.figure(columns * PANEL_WIDTH + 20, rows * (PANEL_HEIGHT + 90) + 50)
        handles: dict[str, Any] = {}
        for place, (panel, points) in enumerate(panels.items()):
            left, top = 70 + place % columns * PANEL_WIDTH, 80 + place // columns * (PANEL_HEIGHT + 90)
            ax = charts.axes(fig, left, top, PANEL_WIDTH - 90, PANEL_HEIGHT)
            handles |= _draw(ax, points, names)
            ax.set_title(panel, fontsize=11)
            ax.set_ylabel(result["axes"]["y"])
            if len(points) == 1:
                ax.set_xticks(range(len(names)), names, rotation=0 if sum(map(len, names)) < 40 else 60)
                ax.set_xlim(-0.5, len(names) - 0.5)
                continue
            ax.set_xlabel(result["axes"]["x"])
            if result["axes"]["logarithmic"]:
                ax.set_xscale("log")
                ax.set_xticks([point["x"] for point in points], [_place(point["x"]) for point in points])
                ax.minorticks_off()
                if len(points) > 8:
                    ax.tick_params(axis="x", rotation=60)
        fig.legend(handles.values(), handles.keys(), loc="upper left", ncols=len(names), bbox_to_anchor=(0.02, 1.0))
        charts.write_png(fig, path)


def _write_maps(
    result: Mapping[str, Any], panels: Mapping[str, list[Mapping[str, Any]]], names: list[str], path: str | Path
) -> None:
    """A row of maps per panel, a map per model: both places as axes, the mean as shade and as number."""
    xs = sorted({point["x"] for point in result["points"]})
    bys = sorted({point["by"] for point in result["points"]})
    means = [entry["mean"] for point in result["points"] for entry in point["models"].values()]
    shades = {"cmap": "cividis", "vmin": min(0.0, *means), "vmax": max(1.0, *means)}
    width, height = 52 * len(xs), 34 * len(bys)
    with charts.style():
        fig = charts.figure(110 + len(names) * (width + 30), 20 + len(panels) * (height + 90))
        for row, (panel, points) in enumerate(panels.items()):
            for column, name in enumerate(names):
                ax = charts.axes(fig, 80 + column * (width + 30), 44 + row * (height + 90), width, height)
                cells = np.full((len(bys), len(xs)), np.nan)
                for point in points:
                    if name in point["models"]:
                        cells[bys.index(point["by"]), xs.index(point["x"])] = point["models"][name]["mean"]
                ax.imshow(cells, aspect="auto", **shades)
                middle = (shades["vmin"] + shades["vmax"]) / 2
                for (y, x), value in np.ndenumerate(cells):
                    if np.isfinite(value):
                        colour = charts.INK if value > middle else "white"
                        ax.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=10, color=colour)
                ax.set_title(f"{name}: {panel}" if len(names) > 1 else panel, fontsize=10)
                ax.set_xticks(range(len(xs)), list(map(_place, xs)))
                ax.set_yticks(range(len(bys)), list(map(_place, bys)) if column == 0 else [""] * len(bys))
                ax.set_xlabel(result["axes"]["x"])
                if column == 0:
                    ax.set_ylabel(result["axes"]["by"])
        charts.write_png(fig, path)


def _draw(ax: Any, points: list[Mapping[str, Any]], names: list[str]) -> dict[str, Any]:
    """A line per model with its interval as a band; in a panel of one place, models side by side, intervals as bars."""
    drawn = {}
    for column, name in enumerate(names):
        mine = [(point["x"], point["models"][name]) for point in points if name in point["models"]]
        if not mine:
            continue
        colour, line = charts.look(name, names)
        if len(points) == 1:
            mine = [(column, mine[0][1])]
        x, mean = [place for place, _ in mine], [entry["mean"] for _, entry in mine]
        (drawn[name],) = ax.plot(x, mean, color=colour, linestyle=line, marker="o", markersize=4, label=name)
        bounded = [(place, entry) for place, entry in mine if entry["low"] is not None]
        if len(bounded) > 1:
            low, high = ([entry[end] for _, entry in bounded] for end in ("low", "high"))
            ax.fill_between([place for place, _ in bounded], low, high, color=colour, alpha=0.15, linewidth=0)
        for place, entry in bounded if len(bounded) == 1 else []:
            ax.plot([place, place], [entry["low"], entry["high"]], color=colour)
    ax.grid(axis="y")
    return drawn
