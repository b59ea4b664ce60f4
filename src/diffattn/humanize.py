"""Writes numbers for people: three significant digits, a prefix, and words for numbers that are not finite."""

import functools
import math
from collections.abc import Callable, Sequence

MISSING = "–"


def _number(value: float, scale: float) -> str:
    """Returns the number with three significant digits, or fewer if the shorter number is exact."""
    scaled = value / scale
    if scaled == round(scaled, 0 if abs(scaled) >= 100 else 1):
        return f"{scaled:.1f}".removesuffix(".0")
    return f"{scaled:.{_digits(scaled)}f}"


def _digits(scaled: float) -> int:
    # 9.999 prints as 10.0, so the rounded number decides.
    if abs(round(scaled, 1)) >= 100:
        return 0
    return 1 if abs(round(scaled, 2)) >= 10 else 2


def _scaled(value: float, base: float, prefixes: Sequence[str]) -> tuple[str, str]:
    """Returns the number and its prefix so that the number stays below ``base``: 999,999 is 1 M, not 1000 k."""
    scale = 1.0
    for prefix in prefixes[:-1]:
        scaled = abs(value) / scale
        if round(scaled, _digits(scaled)) < base:
            return _number(value, scale), prefix
        scale *= base
    return _number(value, scale), prefixes[-1]


def _or_words(finite: Callable[[float], str]) -> Callable[[float | None], str]:
    """Returns the formatter with words added for numbers that are not finite."""

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
    """Returns a count in thousands, millions, billions.

    >>> count(3_021_312), count(812), count(999_999)
    ('3.02 M', '812', '1.00 M')
    """
    return " ".join(_scaled(value, 1000, ("", "k", "M", "B", "T"))).strip()


@_or_words
def size(value: float) -> str:
    """Returns a number of bytes in powers of 1024.

    >>> size(1228.8), size(812), size(12_130_000)
    ('1.2 KiB', '812 B', '11.6 MiB')
    """
    return " ".join(_scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB")))


@_or_words
def flops(value: float) -> str:
    """Returns a number of floating-point operations in powers of 1000.

    >>> flops(12_345_678)
    '12.3 MFLOP'
    """
    return " ".join(_scaled(value, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")))


@_or_words
def seconds(value: float) -> str:
    """Returns a duration in a unit that fits its length.

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
    """Returns a loss, or another measured quality, with four decimals.

    >>> loss(3.41234)
    '3.4123'
    """
    return f"{value:.4f}"


@_or_words
def signed(value: float) -> str:
    """Returns a difference with its sign; it is never rounded to zero, since the sign of an interval's end matters.

    >>> signed(0.0123), signed(-0.5), signed(-0.00001), signed(0.0)
    ('+0.0123', '−0.5000', '−1.0e-05', '0.0000')
    """
    if value == 0:
        return "0.0000"
    digits = f"{abs(value):.4f}" if abs(value) >= 0.00005 else f"{abs(value):.1e}"
    return ("+" if value > 0 else "−") + digits


@_or_words
def whole(value: float) -> str:
    """Returns a number with every digit, or words where it is not finite.

    >>> whole(5461)
    '5,461'
    """
    return exact(value)


@_or_words
def exact(value: float) -> str:
    """Returns a finite number with every digit, such as for a tooltip.

    >>> exact(3021312), exact(0.1)
    ('3,021,312', '0.1')
    """
    return f"{int(value):,}" if float(value).is_integer() else repr(float(value))
