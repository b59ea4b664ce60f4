"""The one definition of the comparison table that the terminal and the page share."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffattn.humanize import count, exact, flops, loss, seconds, size, whole

BASELINE = "softmax"


class Measure(NamedTuple):
    """One row of the table: its key in `result["variants"][name]`, how it is called and how it is written."""

    key: str
    label: str
    format: Callable[[float | None], str]
    unit: str = ""
    note: str = ""


MEASURES = [
    Measure("val_loss", "Validation loss", loss, "nats per token"),
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


def cell(measure: Measure, variant: Mapping[str, Any], baseline: Mapping[str, Any] | None = None) -> Cell:
    """The cell of one measure and variant; a list is one value per seed and reads as its mean."""
    values: Any = variant.get(measure.key)
    mean = _mean(values)
    seeds = tuple(measure.format(value) for value in values) if isinstance(values, list | tuple) else ()
    every = ", ".join(exact(value) for value in values) if seeds else exact(mean)
    reference = _mean(baseline.get(measure.key)) if baseline is not None else None
    return Cell(measure.format(mean), seeds if len(seeds) > 1 else (), "" if seeds else _ratio(mean, reference), every)


def _mean(values: Any) -> float | None:
    if not isinstance(values, list | tuple):
        return values
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _ratio(value: float | None, reference: float | None) -> str:
    if value is None or not reference or not (math.isfinite(value) and math.isfinite(reference)):
        return ""
    if value == reference:
        return "same"
    ratio = value / reference
    return f"{ratio:.2f}×" if abs(ratio - 1) >= 0.005 else f"{ratio:.4f}×"


def present(result: Mapping[str, Any]) -> list[Measure]:
    """The measures that at least one variant has."""
    variants = result["variants"].values()
    return [measure for measure in MEASURES if any(variant.get(measure.key) is not None for variant in variants)]


def compare_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The table as text: a header, then one row per measure and one column per variant.

    >>> compare_rows({"variants": {"softmax": {"parameters": 3_021_312, "val_loss": [3.5, 3.7]}}})
    [['measure', 'softmax'], ['Validation loss (nats per token)', '3.6000 (3.5000, 3.7000)'], ['Parameters', '3.02 M']]
    """
    rows = [["measure", *result["variants"]]]
    for measure in present(result):
        label = f"{measure.label} ({measure.unit})" if measure.unit else measure.label
        cells = [cell(measure, variant) for variant in result["variants"].values()]
        rows.append([label, *(f"{c.text} ({', '.join(c.seeds)})" if c.seeds else c.text for c in cells)])
    return rows
