"""Scaling laws of every variant, and the softmax size that has a DIFF size's loss, with intervals, for each form.

The intervals are of a bootstrap: a cell is what one seed gave at one size, for all variants together, since these share
data and initial values. Each draw gives every cell the residuals of a cell that is drawn at random, enlarged by
√(n / (n − p)) because a fit makes its own residuals too small, and fits every curve again. The 2.5% and 97.5% points
are moved away from the estimate by t / 1.96, Student's factor for the n − p that are left, where n is a curve's points
and p its numbers. Where variants were not measured at the same sizes and seeds, each draws for itself.

Residuals are drawn over all sizes, so losses are taken to scatter by the same share at every size: where they scatter
four times as much at one end as at the other, the equal size at the noisy end was held by 72 to 80 of 100 intervals.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from diffattn.errors import ConfigError, DataError
from diffattn.progress import OnStage, Stage, unseen
from diffattn.results.scaling import (
    Bounded,
    Equivalence,
    FitResult,
    FittedCurve,
    FormResult,
    ScalingPoint,
    ScalingResult,
)
from diffattn.scaling.forms import FLOOR, JOINT, POWER, Array, Form, fit_form, invert, refit
from diffattn.scaling.options import FitOptions
from diffattn.scaling.points import check_points, read_points
from diffattn.variants import BASELINE

_EQUAL = 1e-4


def fit_scaling(
    points: Iterable[ScalingPoint] | str | Path,
    *,
    size: str = FitOptions.size,
    at: Sequence[float] = (),
    bootstrap: int = FitOptions.bootstrap,
    seed: int = FitOptions.seed,
    command: str = "diffattn.fit_scaling(...)",
    on_stage: OnStage = unseen,
) -> ScalingResult:
    """Fits every form to every variant's losses and says which softmax model each DIFF model equals.

    Args:
        points: a file, ``figure3a`` for the paper's, or the points themselves.
        size, bootstrap, seed: see :class:`diffattn.scaling.options.FitOptions`.
        at: sizes (tokens, where these vary alone) at which models are compared. Default: the smallest, the middle and
            the largest of the points.
        command: the command that made the result, to be named in it.
        on_stage: called with how many of the curves are fitted.

    Raises:
        ConfigError, DataError: points or options that no curve can be fitted to; each in one line.

    Source: the forms and the loss are in ``scaling/forms.py``; the claims that this tests are those of arXiv
    2410.05258v2, section 3.2.

    >>> result = fit_scaling("figure3a", at=(6.8e9,), bootstrap=100)
    >>> [round(form.equivalences[0].equal.value / 1e9, 1) for form in result.forms.values()]
    [10.9, 9.1]
    """
    if not 100 <= bootstrap <= 1_000_000:
        raise ConfigError(f"bootstrap is {bootstrap}", "100 to 1,000,000 draws", "leave it out for the usual 1000")
    source = str(points) if isinstance(points, str | Path) else "points"
    given = read_points(points, size=size) if isinstance(points, str | Path) else points
    checked, axes = check_points(given)
    if any(not (math.isfinite(value) and value > 0) for value in at):
        raise ConfigError(
            f"at is {', '.join(f'{value:g}' for value in at)}", "finite sizes above 0", "write a size such as 6.8B"
        )
    curves = _curves(checked, axes)
    unit = "tokens" if axes == ("tokens",) else size
    forms = (JOINT,) if len(axes) == 2 else (FLOOR, POWER)
    sizes = list(at) or _typical(curves)
    fits = {}
    for done, form in enumerate(forms):
        on_stage(Stage("fitting curves", done, len(forms)))
        fits[form.name] = _fit(form, curves, bootstrap, seed)
    return ScalingResult(
        source=source,
        axis=unit,
        points=checked,
        bootstrap=bootstrap,
        command=command,
        forms={
            form.name: FormResult(
                formula=form.formula.replace("N", "T") if unit == "tokens" else form.formula,
                variants={name: fits[form.name][name].summary() for name in curves},
                equivalences=_equivalences(fits[form.name], sizes, unit),
            )
            for form in forms
        },
    )


@dataclass
class _Curve:
    """One variant's points: log sizes relative to ``centre``, log losses, and the cell of each point."""

    name: str
    x: Array
    y: Array
    centre: Array
    cells: list[tuple[int, ...]]
    largest: float
    smallest: float


@dataclass
class _Fit:
    """One form, fitted to one variant's points and to every draw of the bootstrap."""

    form: Form
    curve: _Curve
    theta: Array
    draws: Array

    @property
    def stretch(self) -> float:
        """Student's factor over the normal one, for the degrees of freedom that a curve's points leave."""
        return float(stats.t.ppf(0.975, len(self.curve.y) - len(self.theta)) / stats.norm.ppf(0.975))

    def summary(self) -> FitResult:
        """Returns the fitted numbers with their intervals, the criteria and the line to draw."""
        form, curve, n, p = self.form, self.curve, len(self.curve.y), len(self.theta)
        values, drawn = form.numbers(self.theta, curve.centre), form.numbers(self.draws, curve.centre)
        residual = curve.y - form.log_loss(self.theta, curve.x)
        # One number more than the form's: the spread of the losses.
        k = p + 1
        aic = n * math.log(float(residual @ residual) / n) + 2 * k if residual.any() else -math.inf
        grid = np.linspace(curve.x[:, 0].min() - 0.7, curve.x[:, 0].max() + 0.7, 60)
        at = np.stack([grid, *(np.full(60, curve.x[:, axis].max()) for axis in range(1, form.axes))], axis=1)
        parameters = {}
        for i, name in enumerate(form.names):
            low, high = interval(values[i], drawn[:, i], self.stretch)
            parameters[name] = Bounded(value=float(values[i]), low=low, high=high)
        return FitResult(
            parameters=parameters,
            aic=aic if math.isfinite(aic) else None,
            aicc=aic + 2 * k * (k + 1) / (n - k - 1) if n > k + 1 and math.isfinite(aic) else None,
            residuals=residual.tolist(),
            curve=FittedCurve(
                x=np.exp(grid + curve.centre[0]).tolist(), loss=np.exp(form.log_loss(self.theta, at)).tolist()
            ),
        )


def interval(value: float, draws: Array, stretch: float) -> tuple[float, float | None]:
    """Returns the 95% interval of a positive number, computed from its draws in logarithms; None for infinity.

    >>> interval(1.0, np.linspace(0.5, 2.0, 1001), 1.0)
    (0.536, 1.9625)
    """
    with np.errstate(divide="ignore"):
        low, high = np.quantile(np.log(draws), (0.025, 0.975), method="closest_observation")
    # Without a finite estimate there is nothing to move the ends away from.
    middle = math.log(value) if 0 < value < math.inf else 0.0
    factor = stretch if 0 < value < math.inf else 1.0
    ends = [middle + factor * (end - middle) if math.isfinite(end) else end for end in (float(low), float(high))]
    return tuple(float(f"{math.exp(end):.12g}") if end < 700 else None for end in ends)  # type: ignore[return-value]


def _curves(points: Sequence[ScalingPoint], axes: tuple[str, ...]) -> dict[str, _Curve]:
    """Returns the points of each variant as logarithms, softmax first.

    Raises:
        DataError: too few points or sizes for a curve, or losses that do not fall.
    """
    names = sorted({point.attention for point in points}, key=lambda name: (name != BASELINE, name))
    curves = {}
    for name in names:
        own = [point for point in points if point.attention == name]
        raw = np.log(np.array([[getattr(point, axis) for axis in axes] for point in own], dtype=float))
        numbers = 5 if len(axes) == 2 else 3
        distinct = [_ranks(raw[:, axis]) for axis in range(len(axes))]
        if len(own) < numbers + 1 or any(len(set(ranks)) < 3 for ranks in distinct):
            raise DataError(
                f"{len(own)} points of {name} at {len(set(zip(*distinct, strict=True)))} sizes given",
                f"at least {numbers + 1} points at 3 or more sizes, because the form with a floor has {numbers} "
                "numbers",
                "train more models",
            )
        centre = raw.mean(axis=0)
        y = np.log(np.array([point.val_loss for point in own]))
        slopes = np.linalg.lstsq(np.column_stack([raw - centre, np.ones(len(own))]), y, rcond=None)[0][:-1]
        if rising := [axis for axis, slope in zip(axes, slopes, strict=True) if slope >= 0]:
            raise DataError(
                f"losses of {name} do not fall with {' and '.join(rising)}",
                "losses that fall, as a scaling law does",
                "check the columns, or train the larger models longer",
            )
        cells = [
            (*(ranks[i] for ranks in distinct), -1 if own[i].seed is None else int(own[i].seed or 0))
            for i in range(len(own))
        ]
        ends = np.exp(raw[:, 0])
        curves[name] = _Curve(name, raw - centre, y, centre, cells, float(ends.max()), float(ends.min()))
    return curves


def _ranks(values: Array) -> list[int]:
    """Returns the rank of each value's size; sizes within 2% count as one, as matched variants differ by less."""
    order = np.argsort(values)
    ranks, rank = np.zeros(len(values), dtype=int), 0
    for before, index in itertools.pairwise(order):
        rank += int(values[index] - values[before] > 0.02)
        ranks[index] = rank
    return ranks.tolist()


def _fit(form: Form, curves: dict[str, _Curve], bootstrap: int, seed: int) -> dict[str, _Fit]:
    """Returns the fits of one form to every variant; where all have the same cells, draws are shared."""
    rng = np.random.default_rng(seed)
    cells = sorted(next(iter(curves.values())).cells)
    paired = all(sorted(curve.cells) == cells for curve in curves.values())
    shared = rng.integers(len(cells), size=(bootstrap, len(cells)))
    fits = {}
    for name, curve in curves.items():
        theta = fit_form(form, curve.x, curve.y)
        fitted = form.log_loss(theta, curve.x)
        n, p = len(curve.y), len(theta)
        residual = (curve.y - fitted) * math.sqrt(n / (n - p))
        if paired:
            # Row i of the draw says which cell's residual the i-th cell in order is given.
            order = np.argsort([cells.index(cell) for cell in curve.cells])
            drawn = np.empty((bootstrap, n))
            drawn[:, order] = residual[order][shared]
        else:
            drawn = residual[rng.integers(n, size=(bootstrap, n))]
        fits[name] = _Fit(form, curve, theta, refit(form, curve.x, fitted + drawn, theta))
    return fits


def _typical(curves: dict[str, _Curve]) -> list[float]:
    """Returns the smallest, the middle and the largest softmax size."""
    curve = curves[BASELINE]
    by_rank = dict(zip(_ranks(curve.x[:, 0]), np.exp(curve.x[:, 0] + curve.centre[0]).tolist(), strict=True))
    sizes = sorted(by_rank.values())
    return [sizes[0], sizes[len(sizes) // 2], sizes[-1]]


def _equivalences(fits: dict[str, _Fit], sizes: Sequence[float], unit: str) -> list[Equivalence]:
    """Returns for each variant but softmax its sizes, then those of softmax, each with the size of equal loss."""
    rows = []
    softmax = fits[BASELINE]
    for name, fit in fits.items():
        if name == BASELINE:
            continue
        for size in sizes:
            rows.append(_equivalence(fit, softmax, size, unit, given=name))
        for size in sizes:
            rows.append(_equivalence(softmax, fit, size, unit, given=BASELINE))
    return rows


def _equivalence(source: _Fit, target: _Fit, size: float, unit: str, *, given: str) -> Equivalence:
    """Returns the size on ``target``'s curve that has the loss of ``size`` on ``source``'s."""
    form = source.form
    # The joint form compares sizes at the most tokens that both were trained on.
    fixed = min(float(fit.curve.x[:, -1].max() + fit.curve.centre[-1]) for fit in (source, target))

    def equal(theta_source: Array, theta_target: Array) -> Array:
        at = np.array([[math.log(size) - source.curve.centre[0], fixed - source.curve.centre[-1]][: form.axes]])
        loss = form.log_loss(theta_source, at)[..., 0]
        tokens = fixed - target.curve.centre[-1] if form.axes == 2 else 0.0
        with np.errstate(over="ignore"):
            return np.exp(invert(form, theta_target, loss, tokens) + target.curve.centre[0])

    value, draws = float(equal(source.theta, target.theta)), equal(source.draws, target.draws)
    stretch = max(source.stretch, target.stretch)
    low, high = interval(value, draws, stretch)
    reached = math.isfinite(value)
    forwards = given != BASELINE
    flip: Callable[[float | None], float | None] = (
        (lambda end: size / end if end else 0.0) if forwards else (lambda end: None if end is None else end / size)
    )
    ratio = Bounded(
        value=flip(value) if reached else None,
        low=flip(high if forwards else low),
        high=flip(low if forwards else high),
    )
    inside = all(
        reached and fit.curve.smallest <= at <= fit.curve.largest for fit, at in ((source, size), (target, value))
    )
    row = Equivalence(
        given=given,
        other=target.curve.name,
        size=size,
        equal=Bounded(value=value if reached else None, low=low, high=high),
        ratio=ratio,
        extrapolated=not inside,
        words="",
    )
    return replace(row, words=_words(row, "tokens" if unit == "tokens" else "parameters"))


def _words(row: Equivalence, noun: str) -> str:
    """Returns what may be said: a difference only where the interval of the ratio leaves 1 out."""
    diff = row.given if row.given != BASELINE else row.other
    low, high = row.ratio.low, row.ratio.high
    beyond = ", extrapolated" if row.extrapolated else ""
    # Equal curves are fitted to six digits or so.
    same = low is not None and low <= 1 + _EQUAL and (high is None or high >= 1 - _EQUAL)
    if row.equal.value is None:
        unsure = "; but the interval includes 1: no difference seen" if same else ""
        return f"no number of {noun} of {row.other} reaches this loss{unsure}{beyond}"
    if same:
        return f"the interval includes 1: no difference seen{beyond}"
    return f"{diff} needs {'fewer' if high is not None and high < 1 else 'more'} {noun}{beyond}"
