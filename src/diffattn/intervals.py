"""Paired differences with their intervals, and the one sentence that they allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from scipy import stats


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """The mean and its 95% interval by Student's t; a single value has no interval.

    >>> interval([1.0])
    {'mean': 1.0, 'low': None, 'high': None}
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> dict[str, float | None]:
    """The mean of ``values − baseline``, pair by pair, with its 95% interval by Student's t.

    The i-th entries share a seed: initial values and order of the data. A single pair has no interval (``None``).

    >>> paired_difference([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    {'mean': -0.5, 'low': -0.5, 'high': -0.5}
    """
    return interval([a - b for a, b in zip(values, baseline, strict=True)])


def verdict(name: str, difference: dict[str, float | None], *, seeds: int, surplus: float) -> str:
    """Returns one plain sentence: "lower", "higher" or "no difference seen".

    Args:
        name: the variant.
        difference: the result of :func:`paired_difference`, in nats per token; negative is better.
        seeds: the number of pairs.
        surplus: the variant's parameters divided by its baseline's, minus 1.

    >>> verdict("diff_v2", {"mean": 0.01, "low": -0.02, "high": 0.04}, seeds=2, surplus=0.0)
    'diff_v2: no difference seen in held-out loss (mean +0.0100, 95% interval -0.0200 to +0.0400, 2 seeds).'
    """
    mean, low, high = difference["mean"], difference["low"], difference["high"]
    assert mean is not None
    aside = f", with {surplus:+.1%} parameters" if abs(surplus) > 0.005 else ""
    if low is None or high is None:
        return (
            f"{name}: no difference seen in held-out loss, because one seed gives no interval (difference {mean:+.4f}"
            f"{aside})."
        )
    facts = f"95% interval {low:+.4f} to {high:+.4f}, {seeds} seeds{aside}"
    if low <= 0 <= high:
        return f"{name}: no difference seen in held-out loss (mean {mean:+.4f}, {facts})."
    return f"{name}: held-out loss {'lower' if mean < 0 else 'higher'} by {abs(mean):.4f} nats per token ({facts})."


def pairs(variants: dict[str, dict[str, Any]], baseline: str = "softmax") -> dict[str, dict[str, Any]]:
    """Compares every variant with the softmax baseline: difference, verdict and ratio of parameters."""
    if baseline not in variants:
        return {}
    result = {}
    for name, row in variants.items():
        if name != baseline:
            difference = paired_difference(row["val_loss"], variants[baseline]["val_loss"])
            ratio = row["parameters"] / variants[baseline]["parameters"]
            result[name] = {
                "val_loss_difference": difference,
                "verdict": verdict(name, difference, seeds=len(row["val_loss"]), surplus=ratio - 1),
                "parameters_ratio": ratio,
            }
    return result
