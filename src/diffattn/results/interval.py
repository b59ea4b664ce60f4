"""A mean with its 95% interval: what every claim of this package rests on."""

from __future__ import annotations

from dataclasses import dataclass

from diffattn.results.base import Result


@dataclass(frozen=True)
class Interval(Result):
    """A mean and its 95% interval by Student's t; the functions of ``diffattn.intervals`` make it.

    >>> Interval(-0.02, -0.03, -0.01).excludes_zero, Interval(-0.02, None, None).excludes_zero
    (True, False)
    """

    mean: float
    """The mean of the values, in their own unit."""
    low: float | None
    """The lower end of the interval, in the same unit; None where there is one value only, which has no interval."""
    high: float | None
    """The upper end of the interval; None where ``low`` is."""

    @property
    def excludes_zero(self) -> bool:
        """True where the interval leaves zero out: only then a difference counts as seen."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high
