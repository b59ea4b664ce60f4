"""The one definition of the comparison table that the terminal and the page share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from diffattn.humanize import count, exact, flops, loss, seconds, size, whole
from diffattn.results.comparison import ComparisonResult, VariantResult


class Measure(NamedTuple):
    """One row of the table: the field of a ``VariantResult``, how it is called and how it is written."""

    key: str
    label: str
    format: Callable[[float | None], str]
    unit: str = ""
    note: str = ""


MEASURES = [
    Measure("val_loss", "Held-out loss", loss, "nats per token"),
    Measure("bits_per_byte", "Bits per byte", loss),
    Measure("parameters", "Parameters", count),
    Measure("attention_parameters", "Attention parameters", count),
    Measure("intermediate_size", "FFN width", whole),
    Measure("model_flops_per_token", "Model FLOPs", flops, "per token", "what the definition costs"),
    Measure("executed_flops_per_token", "Executed FLOPs", flops, "per token", "what the backend does"),
    Measure("train_tokens_per_second", "Training speed", count, "tokens/s"),
    Measure("train_peak_bytes", "Training peak memory", size),
    Measure("cache_bytes_per_token", "KV cache", size, "per token"),
    Measure("checkpoint_bytes", "Checkpoint on disk", size),
    Measure("load_seconds", "Load time", seconds),
    Measure("first_token_seconds", "Time to first token", seconds),
]


class Cell(NamedTuple):
    """One value of the table: what is read, each seed where there are several, the ratio to softmax, every digit."""

    text: str
    seeds: tuple[str, ...] = ()
    ratio: str = ""
    exact: str = ""


def cell(measure: Measure, variant: VariantResult, baseline: VariantResult | None = None) -> Cell:
    """The cell of one measure and variant; a list is one value per seed and reads as its mean."""
    values = _values(measure, variant)
    mean = _mean(values)
    if not isinstance(values, list | tuple):
        reference = None if baseline is None else _mean(_values(measure, baseline))
        return Cell(measure.format(mean), (), ratio_text(mean, reference), exact(mean))
    seeds = tuple(measure.format(value) for value in values)
    return Cell(measure.format(mean), seeds if len(seeds) > 1 else (), "", ", ".join(map(exact, values)))


def _values(measure: Measure, variant: VariantResult) -> float | Sequence[float | None] | None:
    found: float | Sequence[float | None] | None = getattr(variant, measure.key)
    return found


def _mean(values: float | Sequence[float | None] | None) -> float | None:
    if values is None or isinstance(values, int | float):
        return values
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def ratio_text(value: float | None, reference: float | None) -> str:
    """A ratio as it is read, with four digits where it is within half a percent of 1; empty where there is none.

    >>> ratio_text(1, 2), ratio_text(1.0004, 1), ratio_text(3, 3), ratio_text(3, None)
    ('0.50×', '1.0004×', 'same', '')
    """
    if value is None or not reference or not (math.isfinite(value) and math.isfinite(reference)):
        return ""
    if value == reference:
        return "same"
    ratio = value / reference
    return f"{ratio:.2f}×" if abs(ratio - 1) >= 0.005 else f"{ratio:.4f}×"


def present(result: ComparisonResult) -> list[Measure]:
    """The measures that at least one variant has."""
    variants = result.variants.values()
    return [measure for measure in MEASURES if any(_values(measure, variant) is not None for variant in variants)]


def compare_rows(result: ComparisonResult) -> list[list[str]]:
    """The table as text: a header, then one row per measure and one column per variant."""
    rows = [["measure", *result.variants]]
    for measure in present(result):
        label = f"{measure.label} ({measure.unit})" if measure.unit else measure.label
        cells = [cell(measure, variant) for variant in result.variants.values()]
        rows.append([label, *(f"{c.text} ({', '.join(c.seeds)})" if c.seeds else c.text for c in cells)])
    return rows
