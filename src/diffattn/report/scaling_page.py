"""A fit of scaling laws as tables for a terminal, as charts, and as one page with both."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffattn.humanize import MISSING, count, loss
from diffattn.report import charts
from diffattn.report.page import render_charts
from diffattn.results.scaling import Bounded, Equivalence, FormResult, ScalingPoint, ScalingResult
from diffattn.variants import BASELINE

if TYPE_CHECKING:
    import altair as alt


def number_rows(result: ScalingResult) -> list[list[str]]:
    """The fitted numbers: a header, then a row per form and variant."""
    rows = [["form", "variant", "fitted, with 95% interval", "AIC", "AICc", "largest residual"]]
    for form in result.forms.values():
        for name, fit in form.variants.items():
            numbers = ", ".join(f"{key} {_between(entry, _short)}" for key, entry in fit.parameters.items())
            largest = max(fit.residuals, key=abs)
            rows.append([form.formula, name, numbers, _plain(fit.aic), _plain(fit.aicc), f"{largest:+.2%}"])
    return rows


def equivalence_rows(result: ScalingResult) -> list[list[str]]:
    """The models that have the same loss, the forms side by side: a header, then a row per direction and size."""
    forms = list(result.forms.values())
    rows = [["this model", *(f"equals, by {form.formula}" for form in forms)]]
    for same in zip(*(form.equivalences for form in forms), strict=True):
        rows.append([f"{same[0].given} {count(same[0].size)}", *map(_equal, same)])
    return rows


def _equal(row: Equivalence) -> str:
    if row.equal.value is None:
        return row.words
    ratio = _between(row.ratio, lambda value: f"{value:.3f}")
    return f"{row.other} {_between(row.equal, count)}; DIFF / softmax {ratio}: {row.words}"


def render_scaling(result: ScalingResult) -> str:
    """The page, as HTML that needs no network."""
    drawn: dict[str, charts.AnyChart] = {f"{name}-chart": scaling_chart(result, name) for name in result.forms}
    return render_charts(
        "scaling.html",
        drawn,
        source=result.source,
        axis=_unit(result),
        points=len(result.points),
        bootstrap=result.bootstrap,
        command=result.command,
        tables=[("Equal losses", equivalence_rows(result)), ("Fitted numbers", number_rows(result))],
        figures=[(form.formula, f"{name}-chart") for name, form in result.forms.items()],
    )


def write_scaling_png(result: ScalingResult, path: str | Path) -> None:
    """The charts of all forms, side by side, as one PNG."""
    import altair as alt

    drawn = [scaling_chart(result, name).properties(width=500, height=340) for name in result.forms]
    charts.write_png(alt.hconcat(*drawn, spacing=30), path)


def scaling_chart(result: ScalingResult, name: str) -> alt.LayerChart:
    """One form: points, curves, and an arrow from the largest DIFF model to the softmax size of equal loss."""
    import altair as alt

    form = result.forms[name]
    names = list(form.variants)
    points = [_point(result, point, names) for point in result.points if point.attention in names]
    line = [
        {
            "variant": each,
            "size": float(size),
            "loss": float(value),
            "size in words": count(size),
            "loss in digits": loss(value),
        }
        for each, fit in form.variants.items()
        for size, value in zip(fit.curve.x, fit.curve.loss, strict=True)
    ]
    losses = [point.val_loss for point in result.points]
    sizes = [size for fit in form.variants.values() for size in fit.curve.x]
    chosen = alt.selection_point(fields=["variant"], bind="legend", name=f"chosen_{name}")
    opacity = alt.condition(chosen, alt.value(1), alt.value(0.12))
    told = {"variant": "variant", "size in words": _unit(result), "loss in digits": "held-out loss"}
    x = functools.partial(
        alt.X,
        title=_unit(result),
        scale=alt.Scale(type="log", nice=False),
        axis=alt.Axis(
            labelExpr=charts.COUNT_TICKS, values=charts.round_numbers(min(sizes), max(sizes)), labelOverlap="greedy"
        ),
    )
    y = alt.Y(
        "loss:Q",
        title="held-out loss (nats per token)",
        scale=alt.Scale(type="log", domain=[min(losses) / 1.02, max(losses) * 1.02], nice=False),
        axis=alt.Axis(format=".3~g", tickCount=6, labelOverlap="greedy"),
    )
    colour = charts.colour_of("variant", names, charts.line_legend())
    dash = charts.dash_of("variant", names, charts.line_legend())
    layers = [
        alt.Chart(charts.data_of(line))
        .mark_line(clip=True, strokeWidth=1.5)
        .encode(x=x("size:Q"), y=y, color=colour, strokeDash=dash, opacity=opacity),
        alt.Chart(charts.data_of(points))
        .mark_point(clip=True, filled=True, size=40)
        .encode(
            x=x("size:Q"),
            y=y,
            color=colour,
            shape=charts.mark_of("mark"),
            opacity=opacity,
            tooltip=charts.tooltips(**told),
        ),
        *_arrow(form, x, y, colour),
    ]
    named = charts.layered(layers).add_params(chosen)
    return named.properties(title=form.formula, description=_alt(result, form), width="container", height=340)


def _point(result: ScalingResult, point: ScalingPoint, names: Sequence[str]) -> charts.Row:
    size = point.tokens if result.axis == "tokens" else point.size
    return {
        "variant": point.attention,
        "mark": charts.look(point.attention, names).mark,
        "size": size,
        "loss": point.val_loss,
        "size in words": count(size),
        "loss in digits": loss(point.val_loss),
    }


def _arrow(form: FormResult, x: Callable[[str], alt.X], y: alt.Y, colour: alt.Color) -> list[alt.Chart]:
    """Along one loss, from a DIFF size to the softmax size that has it: the largest that is inside the axes."""
    import altair as alt

    sizes = [size for fit in form.variants.values() for size in fit.curve.x]
    inside = [
        (row, row.equal.value)
        for row in form.equivalences
        if row.given != BASELINE and row.equal.value and min(sizes) < row.equal.value < max(sizes)
    ]
    if not inside:
        return []
    row, equal = max(inside, key=lambda pair: (not pair[0].extrapolated, pair[0].size))
    curve = form.variants[row.given].curve
    level = float(np.interp(math.log(row.size), np.log(curve.x), curve.loss))
    words = f"{row.given} {count(row.size)} = softmax {count(equal)}"
    arrow = {"variant": row.given, "size": row.size, "equal": equal, "left": min(row.size, equal), "loss": level}
    base = alt.Chart(charts.data_of([arrow | {"words": words}])).encode(y=y, color=colour)
    return [
        base.mark_rule(strokeWidth=2).encode(x=x("size:Q"), x2="equal:Q"),
        base.mark_point(
            shape="triangle-right" if equal > row.size else "triangle-left",
            filled=True,
            opacity=1,
            size=110,
            xOffset=-5 if equal > row.size else 5,
        ).encode(x=x("equal:Q")),
        # Left of the arrow, below the curves, nothing else is drawn.
        base.mark_text(align="right", baseline="top", dx=-4, dy=5).encode(x=x("left:Q"), text="words:N"),
    ]


def _alt(result: ScalingResult, form: FormResult) -> str:
    rows = [row for row in form.equivalences if row.given != BASELINE]
    told = (f"{row.given} of {count(row.size)} equals softmax of {count(row.equal.value)}" for row in rows)
    return f"Held-out loss against {_unit(result)} with fitted curves: {'; '.join(told)}."


def _unit(result: ScalingResult) -> str:
    return {"non_embedding_parameters": "parameters without the embedding", "tokens": "training tokens"}.get(
        result.axis, "parameters"
    )


def _between(entry: Bounded, written: Callable[[float], str]) -> str:
    low, high = ("∞" if end is None else written(end) for end in (entry.low, entry.high))
    return f"{MISSING if entry.value is None else written(entry.value)} ({low} to {high})"


def _short(value: float) -> str:
    return f"{value:.3g}"


def _plain(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"
