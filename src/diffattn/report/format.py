"""Numbers for people, and the one definition of the comparison table that the terminal and the page share."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

MISSING = "–"
BASELINE = "softmax"


def _number(value: float, scale: float) -> str:
    """Three significant digits; fewer where the shorter number is exact."""
    scaled = value / scale
    if scaled == round(scaled, 0 if abs(scaled) >= 100 else 1):
        return f"{scaled:.1f}".removesuffix(".0")
    return f"{scaled:.{_digits(scaled)}f}"


def _digits(scaled: float) -> int:
    # 9.999 prints as 10.0, so the size is that of the rounded number.
    if abs(round(scaled, 1)) >= 100:
        return 0
    return 1 if abs(round(scaled, 2)) >= 10 else 2


def _scaled(value: float, base: float, prefixes: Sequence[str]) -> tuple[str, str]:
    """The number and its prefix, so that what is printed stays below `base`: 999,999 is 1 M, not 1000 k."""
    scale = 1.0
    for prefix in prefixes[:-1]:
        scaled = abs(value) / scale
        if round(scaled, _digits(scaled)) < base:
            return _number(value, scale), prefix
        scale *= base
    return _number(value, scale), prefixes[-1]


def _or_words(finite: Callable[[float], str]) -> Callable[[float | None], str]:
    """The formatter, with words for what is not a finite number."""

    @functools.wraps(finite)
    def written(value: float | None) -> str:
        if value is None:
            return MISSING
        if math.isnan(value):
            return "not a number"
        if math.isinf(value):
            return "∞" if value > 0 else "−∞"
        return finite(value)

    return written


@_or_words
def count(value: float) -> str:
    """A count in thousands, millions, billions.

    >>> count(3_021_312), count(812), count(999_999)
    ('3.02 M', '812', '1.00 M')
    """
    return " ".join(_scaled(value, 1000, ("", "k", "M", "B", "T"))).strip()


@_or_words
def size(value: float) -> str:
    """Bytes, in powers of 1024.

    >>> size(1228.8), size(812), size(12_130_000)
    ('1.2 KiB', '812 B', '11.6 MiB')
    """
    return " ".join(_scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB")))


@_or_words
def flops(value: float) -> str:
    """Floating-point operations, in powers of 1000.

    >>> flops(12_345_678)
    '12.3 MFLOP'
    """
    return " ".join(_scaled(value, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")))


@_or_words
def seconds(value: float) -> str:
    """A duration.

    >>> seconds(0.0351), seconds(3.21), seconds(125), seconds(3720)
    ('35.1 ms', '3.21 s', '2 min 05 s', '1 h 02 min')
    """
    if abs(value) < 1:
        return " ".join(_scaled(value * 1e6, 1000, ("µs", "ms", "s")))
    if round(value, _digits(value)) < 60:
        return f"{_number(value, 1)} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@_or_words
def loss(value: float) -> str:
    """A loss or another quality, to four decimals.

    >>> loss(3.41234)
    '3.4123'
    """
    return f"{value:.4f}"


@_or_words
def signed(value: float) -> str:
    """A difference with its sign; never rounded to zero, for the sign of an interval's end matters.

    >>> signed(0.0123), signed(-0.5), signed(-0.00001), signed(0.0)
    ('+0.0123', '−0.5000', '−1.0e-05', '0.0000')
    """
    if value == 0:
        return "0.0000"
    digits = f"{abs(value):.4f}" if abs(value) >= 0.00005 else f"{abs(value):.1e}"
    return ("+" if value > 0 else "−") + digits


@_or_words
def whole(value: float) -> str:
    """A number that is read as it is.

    >>> whole(5461)
    '5,461'
    """
    return exact(value)


@_or_words
def exact(value: float) -> str:
    """Every digit, for a tooltip.

    >>> exact(3021312), exact(0.1)
    ('3,021,312', '0.1')
    """
    return f"{int(value):,}" if float(value).is_integer() else repr(float(value))


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
