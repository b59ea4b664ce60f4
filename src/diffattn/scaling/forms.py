"""Scaling laws: their forms, one fit with many starts, and many fits at once for a bootstrap.

    power   L = A·N^−α                      floor   L = E + A·N^−α                joint   L = E + A·N^−α + B·T^−β

N is a size in parameters, or tokens where these vary alone; T is tokens. The fit minimises the sum over points of
Huber's loss of log L_fitted − log L, so that one bad run does not move the curve (as in arXiv 2203.15556, section 3.3).
The bend is at δ = 10⁻², 1% of a loss: below it the fit is least squares. With δ = 10⁻³, which that paper has for its
hundreds of runs, points that are read off a figure in steps of 0.2% would be fitted by absolute values, through as
many points as the form has numbers.

Inside, sizes are taken relative to their geometric mean, and each number as its logarithm, so all of them are positive.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

Array = npt.NDArray[np.float64]
DELTA = 1e-2
_LOOK, _FLOORS = 12, (0.05, 0.4, 0.85)


@dataclass(frozen=True)
class Form:
    """A form of scaling law: the numbers that are fitted, and which terms the form has."""

    name: str
    """The name of the form: ``power``, ``floor`` or ``joint``."""
    formula: str
    """The formula as it is read."""
    names: tuple[str, ...]
    """The letters of the numbers that are fitted, in order."""
    floor: bool
    """True where the form has a floor E."""
    axes: int
    """The number of axes: 1 for sizes or tokens, 2 for both."""

    def log_terms(self, theta: Array, x: Array) -> Array:
        """Returns the logarithm of each term, ``(..., points, terms)``.

        Args:
            theta: the numbers of the form, ``(..., p)``.
            x: log of the sizes over their means, ``(points, axes)``.
        """
        terms = [np.broadcast_to(theta[..., :1], (*theta.shape[:-1], len(x)))] if self.floor else []
        for axis in range(self.axes):
            start = self.floor + 2 * axis
            scale, exponent = theta[..., start : start + 1], np.exp(theta[..., start + 1 : start + 2])
            terms.append(scale - exponent * x[:, axis])
        return np.stack(terms, axis=-1)

    def log_loss(self, theta: Array, x: Array) -> Array:
        """Returns log L, ``(..., points)``."""
        return np.logaddexp.reduce(self.log_terms(theta, x), axis=-1)

    def gradient(self, theta: Array, x: Array) -> Array:
        """Returns the derivative of log L by each number, ``(..., points, p)``."""
        terms = self.log_terms(theta, x)
        shares = np.exp(terms - np.logaddexp.reduce(terms, axis=-1, keepdims=True))
        columns = [shares[..., 0]] if self.floor else []
        for axis in range(self.axes):
            share = shares[..., self.floor + axis]
            exponent = np.exp(theta[..., self.floor + 2 * axis + 1])
            columns += [share, -share * exponent[..., None] * x[:, axis]]
        return np.stack(columns, axis=-1)

    def numbers(self, theta: Array, centre: Array) -> Array:
        """Returns the numbers as the formula has them, ``(..., p)``: A is the term at N = 1."""
        values = np.array(theta, dtype=float)
        for axis in range(self.axes):
            start = self.floor + 2 * axis
            values[..., start] += np.exp(values[..., start + 1]) * centre[axis]
        return np.exp(values)


POWER = Form("power", "A·N^−α", ("A", "α"), floor=False, axes=1)
FLOOR = Form("floor", "E + A·N^−α", ("E", "A", "α"), floor=True, axes=1)
JOINT = Form("joint", "E + A·N^−α + B·T^−β", ("E", "A", "α", "B", "β"), floor=True, axes=2)


def huber(residual: Array, bend: float = DELTA) -> Array:
    """Returns Huber's loss: ``r² / 2`` up to ``bend``, a straight line beyond, and the square where it is ``inf``."""
    size = np.abs(residual)
    square = np.minimum(size, bend)
    return square * (size - square / 2)


def fit_form(form: Form, x: Array, y: Array) -> Array:
    """Returns the best numbers over a grid of starts, ``(p,)``.

    Args:
        form: the form that is fitted.
        x: log of the sizes over their geometric means, ``(points, axes)``.
        y: log of the losses, ``(points,)``.
    """

    def objective(theta: Array) -> tuple[float, Array]:
        residual = form.log_loss(theta, x) - y
        slope = np.clip(residual, -DELTA, DELTA)
        # In units of δ², or the optimizer takes the numbers for converged from the start.
        return float(huber(residual).sum() / DELTA**2), slope @ form.gradient(theta, x) / DELTA**2

    starts = _starts(form, y)
    sets = np.broadcast_to(y, (len(starts), len(y)))
    # Least squares first, which has one valley; Huber's loss is flat between points far away from it.
    near = refine(form, x, sets, refine(form, x, sets, starts, bend=np.inf))
    best = min(near, key=lambda theta: objective(theta)[0])
    polished = minimize(objective, best, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return np.asarray(min(best, polished.x, key=lambda theta: objective(theta)[0]))


def refine(form: Form, x: Array, y: Array, theta: Array, *, bend: float = DELTA, steps: int = 60) -> Array:
    """Takes Levenberg's steps on Huber's loss for many sets of losses at once; no set ends worse than it began.

    Args:
        form: the form that is fitted.
        x: log of the sizes, ``(points, axes)``.
        y: log of the losses, ``(sets, points)``.
        theta: the numbers at which each set starts, ``(sets, p)``.
        bend: where Huber's loss turns into a straight line. Default: ``DELTA``.
        steps: the largest number of steps. Default: 60.

    Returns:
        The numbers at which each set ends, ``(sets, p)``.
    """

    theta = np.array(theta, dtype=float)
    value = huber(form.log_loss(theta, x) - y, bend).sum(-1)
    damping, stalled = np.full(len(theta), 1e-3), np.zeros(len(theta), dtype=int)
    identity = np.eye(theta.shape[-1])
    for _ in range(steps):
        # A set that has failed a few times in a row is where it will stay.
        moving = np.flatnonzero(stalled < 5)
        if not len(moving):
            break
        at = theta[moving]
        residual = form.log_loss(at, x) - y[moving]
        weight = 1 / np.maximum(np.abs(residual) / bend, 1.0)
        jacobian = form.gradient(at, x)
        weighted = (jacobian * weight[..., None]).swapaxes(-1, -2)
        normal = weighted @ jacobian
        slope = (weighted @ residual[..., None])[..., 0]
        scale = np.einsum("sii->si", normal).mean(-1) + 1e-12
        step = np.linalg.solve(normal + (damping[moving] * scale)[:, None, None] * identity, -slope[..., None])[..., 0]
        # A number that moves by more than a factor of e² at once has left the valley.
        trial = at + np.clip(step, -2, 2)
        trial_value = huber(form.log_loss(trial, x) - y[moving], bend).sum(-1)
        better = trial_value < value[moving]
        stalled[moving] = np.where(value[moving] - trial_value > 1e-7 * value[moving], 0, stalled[moving] + 1)
        theta[moving[better]], value[moving[better]] = trial[better], trial_value[better]
        damping[moving] = np.clip(np.where(better, damping[moving] / 4, damping[moving] * 6), 1e-9, 1e9)
    return theta


def refit(form: Form, x: Array, y: Array, theta: Array) -> Array:
    """Returns the best numbers for many sets of losses that lie about one fitted curve, as a bootstrap draws them.

    Args:
        form: the form that is fitted.
        x: log of the sizes, ``(points, axes)``.
        y: log of the losses, ``(sets, points)``.
        theta: the numbers of the fitted curve, ``(p,)``.

    Returns:
        The numbers of each set, ``(sets, p)``, from the start that ends best. One start is not enough: from a floor
        near 0 the steps find no slope towards a higher one, and the interval would end where the fit began.
    """
    candidates = []
    for start in (theta, *(_with_floor(form, theta, share, y) for share in _FLOORS if form.floor)):
        candidates.append(refine(form, x, y, np.broadcast_to(start, (len(y), len(theta))), steps=_LOOK))
    ends = np.stack(candidates)
    best = huber(form.log_loss(ends, x) - y).sum(-1).argmin(0)
    return refine(form, x, y, ends[best, np.arange(len(y))])


def _with_floor(form: Form, theta: Array, share: float, y: Array) -> Array:
    """Returns ``theta`` with its floor at ``share`` of the lowest loss, and the same loss and slope in the middle."""
    terms = np.exp(form.log_terms(theta, np.zeros((1, form.axes)))[0])
    floor = share * float(np.exp(y.min()))
    # What the other terms have left to give, over what they gave.
    rest = max(terms.sum() - floor, 1e-3 * floor) / terms[1:].sum()
    moved = np.array(theta, dtype=float)
    moved[0] = np.log(floor)
    moved[1::2] += np.log(rest)
    moved[2::2] -= np.log(rest)
    return moved


def _starts(form: Form, y: Array) -> Array:
    """Returns the numbers to start from, ``(starts, p)``: a grid of exponents and of floors."""
    middle, low = float(y.mean()), float(np.exp(y.min()))
    exponents = np.log([0.05, 0.2, 0.5, 1.0])
    if not form.floor:
        return np.array([[middle, exponent] for exponent in exponents])
    starts = []
    for share in (0.3, 0.7, 0.95):
        rest = np.log(max(np.exp(middle) - share * low, 1e-3) / form.axes)
        for combination in itertools.product(exponents, repeat=form.axes):
            terms = itertools.chain.from_iterable((rest, exponent) for exponent in combination)
            starts.append([np.log(share * low), *terms])
    return np.array(starts)


def invert(form: Form, theta: Array, log_loss: Array, tokens: float = 0.0) -> Array:
    """Returns log N, relative to its mean, at which a curve has a loss; +inf where the curve stays above the loss.

    Args:
        form: the form of the curve.
        theta: the numbers of the curve, ``(..., p)``.
        log_loss: log of the loss, ``(...)``.
        tokens: log of the tokens over their mean, for the joint form. Default: 0.
    """
    loss = np.exp(log_loss)
    if form.floor:
        loss = loss - np.exp(theta[..., 0])
    if form.axes == 2:
        loss = loss - np.exp(theta[..., 3] - np.exp(theta[..., 4]) * tokens)
    start = int(form.floor)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (theta[..., start] - np.log(loss)) / np.exp(theta[..., start + 1])
    return np.where(loss > 0, found, np.inf)
