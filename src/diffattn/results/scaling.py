"""The result of a fit of scaling laws: the points, the curves of every form, and which sizes have the same loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffattn.results.base import Result


@dataclass(frozen=True)
class ScalingPoint(Result):
    """One trained model, as a scaling law is fitted to it."""

    attention: str
    """The variant."""
    size: float | None
    """Parameters of the model, or those without its embedding; None where the file has no such column."""
    tokens: float | None
    """Tokens that the model was trained on; None where the file has no such column."""
    val_loss: float
    """Held-out loss in nats per token."""
    seed: int | None = None
    """The seed of the run; None where the file has no such column."""


@dataclass(frozen=True, kw_only=True)
class Bounded(Result):
    """A fitted number with its 95% interval by the bootstrap."""

    value: float | None
    """The estimate; None where no number reaches what was asked for."""
    low: float | None
    """The lower end of the interval; None where no number reaches it, which for a size or a ratio means infinity."""
    high: float | None
    """The upper end of the interval; None where no number reaches it: infinity."""


@dataclass(frozen=True, kw_only=True)
class FittedCurve(Result):
    """A fitted law as points of a line."""

    x: Sequence[float]
    """Sizes, in the unit that ``ScalingResult.axis`` names, from half the smallest to twice the largest."""
    loss: Sequence[float]
    """The fitted held-out loss at each of them, in nats per token."""


@dataclass(frozen=True, kw_only=True)
class FitResult(Result):
    """One form, fitted to the losses of one variant."""

    parameters: Mapping[str, Bounded]
    """The fitted numbers by their letters in the formula, such as E, A and α."""
    aic: float | None
    """Akaike's information criterion, without a unit; None where the curve goes through every point."""
    aicc: float | None
    """The criterion, corrected for few points; None where there are too few for it."""
    residuals: Sequence[float]
    """Log of the measured loss minus log of the fitted one, for each point of the variant."""
    curve: FittedCurve
    """The line to draw."""


@dataclass(frozen=True, kw_only=True)
class Equivalence(Result):
    """A model of one variant, and the size of another variant that has the same loss."""

    given: str
    """The variant whose size is given."""
    other: str
    """The variant whose size is asked for."""
    size: float
    """The size that is given, in the unit that ``ScalingResult.axis`` names."""
    equal: Bounded
    """The size of the other variant that has the same loss, in the same unit."""
    ratio: Bounded
    """The size of the differential (or gated) model over the softmax size of equal loss; below 1 it needs fewer."""
    extrapolated: bool
    """True where one of the two sizes lies outside of those that were measured."""
    words: str
    """The words that may be said: a difference only where the interval of the ratio leaves 1 out."""


@dataclass(frozen=True, kw_only=True)
class FormResult(Result):
    """One form of scaling law, fitted to every variant."""

    formula: str
    """The formula as it is read, such as ``E + A·N^−α``."""
    variants: Mapping[str, FitResult]
    """The fit of each variant by its name, softmax first."""
    equivalences: Sequence[Equivalence]
    """The models that have the same loss: for each variant its sizes, then those of softmax."""


@dataclass(frozen=True, kw_only=True)
class ScalingResult(Result):
    """The scaling laws of several variants, as ``diffattn scale fit --json`` prints them."""

    source: str
    """The file that the points were read from, or ``figure3a``, or ``points``."""
    axis: str
    """The meaning of a size: ``parameters``, ``non_embedding_parameters`` or ``tokens``."""
    points: Sequence[ScalingPoint]
    """The measured models."""
    bootstrap: int
    """The number of random draws behind each interval."""
    command: str
    """The command that made the result."""
    forms: Mapping[str, FormResult]
    """The fits by the name of the form: ``floor`` and ``power``, or ``joint``."""
