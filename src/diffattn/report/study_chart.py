"""A study's result as a table and as one chart: a panel per thing measured, a line with its interval per model.

Where panels have a second axis with several settings, each model has a map of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffattn.humanize import MISSING
from diffattn.report import charts
from diffattn.results.interval import Interval
from diffattn.results.study import Axes, ModelPoint, PointResult, StudyTable

if TYPE_CHECKING:
    import altair as alt

PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 330, 240, 3
CELL_WIDTH, CELL_HEIGHT = 52, 34
# All digits of a setting, in groups of three: 1,024.
SETTING_TICKS = "format(datum.value, ',.12~r')"


def study_rows(result: StudyTable) -> list[list[str]]:
    """The header and a row per point: each model's mean ± half its 95% interval, then its difference from the first."""
    first, *others = result.names
    second = any(point.by is not None for point in result.points)
    settings = [*([result.axes.by] if second else []), result.axes.x]
    rows = [[result.study, *settings, *result.names, *(f"{name} − {first}" for name in others)]]
    for point in result.points:
        at = [*([_setting(point.by)] if second else []), _setting(point.x)]
        row = [point.panel, *at, *(_mean(point.models.get(name)) for name in result.names)]
        rows.append([*row, *(_difference(point.models.get(name)) for name in others)])
    return rows


def _setting(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:g}" if abs(value) < 1e6 else f"{value:,.0f}"


def _mean(entry: ModelPoint | None) -> str:
    return MISSING if entry is None else _number(entry.mean) + _half(entry)


def _difference(entry: ModelPoint | None) -> str:
    difference = None if entry is None else entry.difference
    if difference is None:
        return MISSING
    text = ("+" if difference.mean > 0 else "") + _number(difference.mean) + _half(difference)
    return text if difference.excludes_zero else f"{text}, no difference seen"


def _half(entry: Interval) -> str:
    return "" if entry.high is None else f" ±{_number(entry.high - entry.mean)}"


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}" if abs(value) >= 100 else f"{value:.3f}"


def write_study_png(result: StudyTable, path: str | Path) -> None:
    """The chart, as one PNG."""
    charts.write_png(study_chart(result), path)


def study_chart(result: StudyTable) -> alt.ConcatChart | alt.VConcatChart:
    """The chart: panels beside each other, or a row of maps per panel where the points have a second axis."""
    import altair as alt

    panels: dict[str, list[PointResult]] = {}
    for point in result.points:
        panels.setdefault(point.panel, []).append(point)
    if len({point.by for point in result.points}) > 1:
        rows = [
            alt.hconcat(*(_map(result, panel, name) for name in result.names if any(name in p.models for p in points)))
            for panel, points in panels.items()
        ]
        return alt.vconcat(*rows, spacing=24)
    drawn = [
        _bars(points, panel, result) if len(points) == 1 else _lines(points, panel, result)
        for panel, points in panels.items()
    ]
    return alt.concat(*drawn, columns=COLUMNS, spacing=28)


def _rows(points: Sequence[PointResult], names: Sequence[str]) -> list[charts.Row]:
    return [
        {
            "model": name,
            "mark": charts.look(name, names).mark,
            "x": point.x,
            "mean": point.models[name].mean,
            "low": point.models[name].low,
            "high": point.models[name].high,
            "setting": _setting(point.x),
            "in digits": _mean(point.models[name]),
        }
        for point in points
        for name in names
        if name in point.models
    ]


def _lines(points: Sequence[PointResult], panel: str, result: StudyTable) -> alt.LayerChart:
    """One panel: a line per model, with its interval as a band."""
    import altair as alt

    logarithmic = result.axes.logarithmic
    x = alt.X(
        "x:Q",
        title=result.axes.x,
        scale=alt.Scale(type="log" if logarithmic else "linear", nice=False, zero=False, padding=8),
        axis=alt.Axis(
            values=sorted({point.x for point in points}) if logarithmic else alt.Undefined,
            labelExpr=SETTING_TICKS,
            labelOverlap="greedy",
            grid=False,
        ),
    )
    legend = charts.line_legend()
    base = alt.Chart().encode(x=x, color=charts.colour_of("model", result.names, legend))
    y = alt.Y("mean:Q", title=result.axes.y, scale=alt.Scale(zero=False))
    layers = [
        base.mark_area(opacity=0.15).encode(
            y=alt.Y("low:Q", title=result.axes.y, scale=alt.Scale(zero=False)), y2="high:Q"
        ),
        base.mark_line(strokeWidth=1.5).encode(y=y, strokeDash=charts.dash_of("model", result.names, legend)),
        base.mark_point(filled=True, size=26, opacity=1).encode(
            y=y,
            shape=charts.mark_of("mark"),
            tooltip=charts.tooltips(**{"model": "model", "setting": result.axes.x, "in digits": panel}),
        ),
    ]
    data = charts.data_of(_rows(points, result.names))
    return charts.layered(layers, data).properties(title=panel, width=PANEL_WIDTH, height=PANEL_HEIGHT)


def _bars(points: Sequence[PointResult], panel: str, result: StudyTable) -> alt.LayerChart:
    """One panel of one setting: the models side by side, intervals as bars."""
    import altair as alt

    base = alt.Chart().encode(
        x=alt.X("model:N", title=None, sort=list(result.names), axis=alt.Axis(labelAngle=-30, labelLimit=160)),
        color=charts.colour_of("model", result.names),
    )
    y = alt.Y("mean:Q", title=result.axes.y, scale=alt.Scale(zero=False))
    layers = [
        base.mark_rule(strokeWidth=2).encode(
            y=alt.Y("low:Q", title=result.axes.y, scale=alt.Scale(zero=False)), y2="high:Q"
        ),
        base.mark_point(filled=True, size=60, opacity=1).encode(
            y=y,
            shape=charts.mark_of("mark"),
            tooltip=charts.tooltips(**{"model": "model", "in digits": panel}),
        ),
    ]
    data = charts.data_of(_rows(points, result.names))
    return charts.layered(layers, data).properties(title=panel, width=PANEL_WIDTH, height=PANEL_HEIGHT)


def _map(result: StudyTable, panel: str, name: str) -> alt.LayerChart:
    """One model's map of a panel: both settings as axes, the mean as shade and as number."""
    import altair as alt

    means = [entry.mean for point in result.points for entry in point.models.values()]
    low, high = min(0.0, *means), max(1.0, *means)
    rows = [
        {"x": point.x, "by": point.by, "mean": point.models[name].mean, "in digits": f"{point.models[name].mean:.2f}"}
        for point in result.points
        if point.panel == panel and name in point.models
    ]
    axes: Axes = result.axes
    base = alt.Chart().encode(
        x=alt.X("x:O", title=axes.x, axis=alt.Axis(labelAngle=0, labelExpr=SETTING_TICKS)),
        y=alt.Y("by:O", title=axes.by, axis=alt.Axis(labelExpr=SETTING_TICKS)),
    )
    shade = alt.Color("mean:Q", scale=alt.Scale(scheme="cividis", domain=[low, high]), legend=None)
    bright = alt.condition(alt.datum.mean > (low + high) / 2, alt.value(charts.PNG_INK), alt.value(charts.PAPER))
    size = {"width": alt.Step(CELL_WIDTH), "height": alt.Step(CELL_HEIGHT)}
    title = f"{name}: {panel}" if len(result.names) > 1 else panel
    numbers = base.mark_text(fontSize=11).encode(text="in digits:N", color=bright)
    layers = charts.layered([base.mark_rect().encode(color=shade), numbers], charts.data_of(rows))
    return layers.properties(title=title, **size)
