"""Loss curves: every seed of every variant, training and held-out, against the tokens seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from diffattn.humanize import count, loss
from diffattn.report import charts
from diffattn.results.comparison import CurvePoint, LossCurve

if TYPE_CHECKING:
    import altair as alt

Curves = Sequence[LossCurve]
Part = Literal["train", "validation"]

PARTS: dict[Part, str] = {"train": "Training", "validation": "Held-out text"}
MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "triangle-left", "triangle-right", "cross")
SMOOTH_ABOVE = 100
MOST_POINTS = 200


def names_of(curves: Curves) -> list[str]:
    """The variants, in the order of their first run."""
    return list(dict.fromkeys(curve.attention for curve in curves))


def seeds_of(curves: Curves) -> list[int]:
    """The seeds, in the order of their first run."""
    return list(dict.fromkeys(curve.seed for curve in curves))


def smoothing(curves: Curves) -> int:
    """Steps of the moving average: 1 (none) up to 100 points, then a fiftieth of the longest run."""
    longest = max((len(curve.train) for curve in curves), default=0)
    return 1 if longest <= SMOOTH_ABOVE else max(5, longest // 50)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The centred moving average; at the ends over the points that there are.

    >>> smooth(np.array([1.0, 2.0, 6.0]), 3).tolist()
    [1.5, 3.0, 4.0]
    """
    if window <= 1 or len(values) < window:
        return values
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def points(series: Sequence[CurvePoint]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and losses; a loss that was not a number leaves a gap."""
    tokens = np.array([point.tokens for point in series], dtype=float)
    losses = np.array([math.nan if point.loss is None else point.loss for point in series], dtype=float)
    return tokens, losses


def drawn_points(curve: LossCurve, part: Part, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The points of one run as they are drawn: those of the training smoothed and thinned, the others as they are."""
    tokens, losses = points(getattr(curve, part))
    if part != "train":
        return tokens, losses
    keep = np.unique(np.linspace(0, len(tokens) - 1, min(len(tokens), MOST_POINTS)).astype(int))
    return tokens[keep], smooth(losses, window)[keep]


def loss_range(drawn: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float] | None:
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


def curve_chart(curves: Curves, part: Part) -> alt.LayerChart:
    """One panel: a line per run, which names its numbers where one points; ``part`` is "train" or "validation"."""
    import altair as alt

    names, window = names_of(curves), smoothing(curves)
    drawn = [drawn_points(curve, part, window) for curve in curves]
    rows = [
        {
            "variant": curve.attention,
            "seed": f"seed {curve.seed}",
            "tokens": float(at),
            # A gap in JSON is null.
            "loss": float(value) if math.isfinite(value) else None,
            "tokens seen": count(float(at)),
            "loss in digits": loss(float(value)),
        }
        for curve, (tokens, losses) in zip(curves, drawn, strict=True)
        for at, value in zip(tokens, losses, strict=True)
    ]
    limits = loss_range(drawn)
    losses = alt.Scale(zero=False) if limits is None else alt.Scale(domain=list(limits), zero=False, nice=False)
    seeds = [f"seed {seed}" for seed in seeds_of(curves)]
    shapes = alt.Scale(domain=seeds, range=[MARKERS[place % len(MARKERS)] for place in range(len(seeds))])
    chosen = alt.selection_point(fields=["variant"], bind="legend", name=f"chosen_{part}")
    hovered = alt.selection_point(on="pointerover", empty=False, name=f"hovered_{part}")
    every = alt.Chart().encode(
        x=alt.X("tokens:Q", title="training tokens", axis=alt.Axis(labelExpr=charts.COUNT_TICKS, tickCount=5)),
        y=alt.Y("loss:Q", title="loss (nats per token)", scale=losses, axis=alt.Axis(tickCount=7)),
        color=charts.colour_of("variant", names, charts.line_legend()),
    )
    lines = every.mark_line(clip=True, strokeWidth=1.5).encode(
        strokeDash=charts.dash_of("variant", names, charts.line_legend()),
        detail="seed:N",
        opacity=alt.condition(chosen, alt.value(1), alt.value(0.12)),
    )
    # The marks of a training lie close together, so they are seen only where one points.
    resting = 0 if part == "train" and len(rows) > len(curves) else 1
    shown, faint = alt.value(resting), alt.value(0.12 * resting)
    seen = alt.when(hovered).then(alt.value(1)).when(chosen).then(shown).otherwise(faint)
    marks = every.mark_point(clip=True, filled=True, size=36).encode(
        shape=alt.Shape("seed:N", scale=shapes, legend=alt.Legend(orient="bottom", columns=3) if resting else None),
        opacity=seen,
        tooltip=charts.tooltips(
            **{"variant": "variant", "seed": "run", "tokens seen": "training tokens", "loss in digits": "loss"}
        ),
    )
    layers = charts.layered([lines, marks], charts.data_of(rows)).add_params(chosen, hovered)
    return layers.properties(title=PARTS[part], description=curve_alt(curves, part), width="container", height=310)


def curve_caption(curves: Curves) -> str:
    """The words for what was done to the curves."""
    window = smoothing(curves)
    how = f"a moving average over {window} steps" if window > 1 else "every step"
    return (
        f"One line per seed. Training: {how}. Held-out text: every evaluation. The loss axis fits what follows "
        "the first quarter of the tokens; the start may lie above the frame. Point at a line for its numbers; press a "
        "name in the legend to see it alone."
    )


def curve_alt(curves: Curves, part: Part) -> str:
    """The chart in words: where each variant's losses end."""
    ends = []
    for name in names_of(curves):
        last = [run[-1].loss for run in (getattr(c, part) for c in curves if c.attention == name) if run]
        ends.append(f"{name} ends at {', '.join(loss(value) for value in last)}" if last else f"{name} has none")
    seeds = len(seeds_of(curves))
    return f"{PARTS[part]}: loss against training tokens, {seeds} seed(s); {'; '.join(ends)}."
