"""The paired differences in held-out loss, each with its interval, about a line at zero."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from diffattn.humanize import signed
from diffattn.report import charts
from diffattn.results.ablation import AblationResult
from diffattn.results.comparison import ComparisonResult
from diffattn.results.interval import Interval

if TYPE_CHECKING:
    import altair as alt

Compared: TypeAlias = ComparisonResult | AblationResult

# Pixels of a row, and of its bar below its middle: above there is room for the words.
ROW, BELOW = 58, 12


def interval_text(difference: Interval, seeds: int) -> str:
    """The interval as it is read, or why there is none.

    >>> interval_text(Interval(-0.005, -0.02, 0.01), 2)
    '−0.0200 to +0.0100'
    >>> interval_text(Interval(-0.005, None, None), 1)
    'one seed: no interval'
    """
    low, high = difference.low, difference.high
    if low is not None and high is not None:
        return f"{signed(low)} to {signed(high)}"
    return "one seed: no interval" if seeds == 1 else "no interval"


def interval_heading(seeds: int) -> str:
    """The name of the interval, with the number of seeds that it rests on."""
    return "95% interval" if seeds == 1 else f"95% interval over {seeds} seeds"


def seed_differences(result: Compared, name: str) -> dict[int, float]:
    """Each seed's own difference, where both losses are known."""
    baseline = result.variants.get(result.pairs[name].baseline)
    if baseline is None:
        return {}
    losses = zip(result.seeds, result.variants[name].val_loss, baseline.val_loss, strict=False)
    known = {seed: a - b for seed, a, b in losses if a is not None and b is not None}
    return {seed: difference for seed, difference in known.items() if math.isfinite(difference)}


def difference_chart(result: Compared) -> alt.LayerChart:
    """One row per pair: its name and its numbers as text, below them the mean, the interval and each seed."""
    import altair as alt

    names = list(result.variants)
    baselines = {pair.baseline for pair in result.pairs.values()}
    common = next(iter(baselines)) if len(baselines) == 1 else None
    rows: list[charts.Row] = []
    each: list[charts.Row] = []
    reach = [0.0]
    for name, pair in result.pairs.items():
        difference, differences = pair.val_loss_difference, seed_differences(result, name)
        # A number that is none is not drawn.
        ends = {end: _finite(getattr(difference, end)) for end in ("mean", "low", "high")}
        mean, interval = signed(difference.mean), interval_text(difference, len(result.seeds))
        title = name if pair.baseline == common else f"{name} − {pair.baseline}"
        words = {"title": title, "difference": mean, "interval": interval, "numbers": f"{mean}   ({interval})"}
        rows.append({"variant": name, "zero": 0, **ends, **words})
        each += [
            {"variant": name, "seed": f"seed {seed}", "difference": value, "in digits": signed(value)}
            for seed, value in differences.items()
        ]
        reach += [abs(value) for value in (*ends.values(), *differences.values()) if value is not None]
    end = 1.12 * max(reach) or 0.01
    x = functools.partial(
        alt.X,
        title=f"held-out loss − that of {common or 'the other'} (nats per token)",
        scale=alt.Scale(domain=[-end, end], nice=False),
        axis=alt.Axis(labelExpr=charts.SIGNED_TICKS, tickCount=5, grid=False),
    )
    y, colour = alt.Y("variant:N", axis=None, sort=names), charts.colour_of("variant", names)
    told = charts.tooltips(title="pair", difference="mean difference", interval=interval_heading(len(result.seeds)))
    base = alt.Chart().encode(y=y, color=colour)
    layers = [
        # A line at zero in each row, and not through its words.
        base.mark_tick(thickness=1.2, size=30, yOffset=BELOW).encode(x=x("zero:Q"), color=alt.value(charts.INK)),
        base.mark_rule(strokeWidth=3, yOffset=BELOW).encode(x=x("low:Q"), x2="high:Q", tooltip=told),
        base.mark_tick(thickness=2, size=14, yOffset=BELOW).encode(x=x("low:Q"), tooltip=told),
        base.mark_tick(thickness=2, size=14, yOffset=BELOW).encode(x=x("high:Q"), tooltip=told),
        alt.Chart(charts.data_of(each))
        .mark_point(size=34, strokeWidth=1.2, yOffset=BELOW)
        .encode(
            x=x("difference:Q"),
            y=y,
            color=colour,
            tooltip=charts.tooltips(**{"variant": "variant", "seed": "run", "in digits": "difference"}),
        ),
        base.mark_point(shape="diamond", filled=True, opacity=1, size=110, yOffset=BELOW).encode(
            x=x("mean:Q"), tooltip=told
        ),
        base.mark_text(align="left", fontWeight="bold", dy=-14).encode(x=alt.value(0), text="title:N"),
        base.mark_text(align="right", dy=-14).encode(
            x=alt.value("width"), text="numbers:N", color=alt.value(charts.INK)
        ),
        *_directions(common, x),
    ]
    named = charts.layered(layers, charts.data_of(rows)).properties(description=difference_alt(result))
    return named.properties(width="container", height=ROW * len(rows))


def _directions(baseline: str | None, x: Callable[[str], alt.X]) -> list[alt.Chart]:
    """The words above both sides of the line at zero."""
    import altair as alt

    better = f"← better than {baseline}" if baseline else "← better"
    left, right = (alt.Chart(charts.data_of([{"zero": 0, "word": word}])) for word in (better, "worse →"))
    return [
        each.encode(x=x("zero:Q"), y=alt.value(0), text="word:N")
        for each in (left.mark_text(align="right", dx=-8, dy=-8), right.mark_text(align="left", dx=8, dy=-8))
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def difference_alt(result: Compared) -> str:
    """The chart in words."""
    seeds = len(result.seeds)
    parts = []
    for name, pair in result.pairs.items():
        difference = pair.val_loss_difference
        parts.append(f"{name} {signed(difference.mean)} ({interval_text(difference, seeds)})")
    return f"Paired differences in held-out loss about a line at zero: {'; '.join(parts)}."
