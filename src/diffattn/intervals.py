"""Paired differences with their intervals, and the one sentence that they allow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from scipy import stats

from diffattn.results.comparison import PairResult, VariantResult
from diffattn.results.interval import Interval
from diffattn.variants import BASELINE


def interval(values: Sequence[float]) -> Interval:
    """Returns the mean and its 95% interval by Student's t; one value has no interval.

    >>> interval([1.0])
    Interval(mean=1.0, low=None, high=None)
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Interval(mean, None, None)
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Returns the mean of ``values − baseline``, pair by pair, with its 95% interval by Student's t.

    The i-th entries share a seed: initial values and order of the data. One pair has no interval.

    >>> paired_difference([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    Interval(mean=-0.5, low=-0.5, high=-0.5)
    """
    return interval([a - b for a, b in zip(values, baseline, strict=True)])


def verdict(name: str, difference: Interval, *, seeds: int, surplus: float) -> str:
    """Returns one plain sentence: "lower", "higher" or "no difference seen".

    Args:
        name: the variant.
        difference: from :func:`paired_difference`, in nats per token; negative is better.
        seeds: the number of pairs behind it.
        surplus: parameters of the variant over those of its baseline, minus 1.

    >>> verdict("diff_v2", Interval(0.01, -0.02, 0.04), seeds=2, surplus=0.0)
    'diff_v2: no difference seen in held-out loss (mean +0.0100, 95% interval -0.0200 to +0.0400, 2 seeds).'
    """
    aside = f", with {surplus:+.1%} parameters" if abs(surplus) > 0.005 else ""
    if difference.low is None:
        return (
            f"{name}: no difference seen in held-out loss, because one seed gives no interval (difference "
            f"{difference.mean:+.4f}{aside})."
        )
    facts = f"95% interval {difference.low:+.4f} to {difference.high:+.4f}, {seeds} seeds{aside}"
    if not difference.excludes_zero:
        return f"{name}: no difference seen in held-out loss (mean {difference.mean:+.4f}, {facts})."
    word = "lower" if difference.mean < 0 else "higher"
    return f"{name}: held-out loss {word} by {abs(difference.mean):.4f} nats per token ({facts})."


def pairs(variants: Mapping[str, VariantResult], baseline: str = BASELINE) -> dict[str, PairResult]:
    """Returns every variant against its softmax twin; empty where softmax was not trained."""
    if baseline not in variants:
        return {}
    twin, result = variants[baseline], {}
    for name, variant in variants.items():
        if name != baseline:
            difference = paired_difference(variant.val_loss, twin.val_loss)
            ratio = variant.parameters / twin.parameters
            result[name] = PairResult(
                val_loss_difference=difference,
                verdict=verdict(name, difference, seeds=len(variant.val_loss), surplus=ratio - 1),
                parameters_ratio=ratio,
            )
    return result
