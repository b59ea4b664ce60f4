"""Reads numbers as people write them: 6.8B, 6,8B, 1_000, 6,837,000,000, 8 GiB."""

from __future__ import annotations

import re
from decimal import Decimal

from diffattn.errors import ConfigError

# Every count that makes sense is smaller; a larger one is a typing error, and products of several do not fit a float.
MOST = 10**18
# The letters that may follow a count.
COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_LONGEST = 60
_SPACES = " \u00a0\u2009\u202f"


class AmbiguousError(ValueError):
    """A number with a comma that may stand before decimals or between thousands."""


def read_quantity(text: str, *, decimal_comma: bool | None = None) -> tuple[Decimal, str] | None:
    """Returns a number of at least 0 and the unit after it in lower case, or None if the text is no number.

    Decimals follow a point or a comma; groups of three digits may be separated by commas, points, spaces, apostrophes
    or underscores. A single comma before three digits is ambiguous, so the caller has to say what it is. A single point
    before three digits separates thousands if the comma stands before decimals, and stands before decimals otherwise.

    Args:
        text: a text such as ``"6,837,000,000"`` or ``"8 GiB"``.
        decimal_comma: True if a comma stands before decimals, False if between thousands. Default: not known.

    Raises:
        AmbiguousError: a comma that may be either, where ``decimal_comma`` is not known.

    >>> [str(read_quantity(text)[0]) for text in ("6,8B", "1_000", "6.837.000,5", "1e3")]
    ['6.8', '1000', '6837000.5', '1E+3']
    >>> [str(read_quantity("1,234", decimal_comma=one)[0]) for one in (True, False)]
    ['1.234', '1234']
    >>> read_quantity("8 GiB"), read_quantity("-3"), read_quantity("1,2,3")
    ((Decimal('8'), 'gib'), None, None)
    """
    text = text.strip()
    match = re.fullmatch(rf"([0-9](?:[0-9.,_'’{_SPACES}]*[0-9])?\.?)(e[+-]?[0-9]{{1,3}})?\s*([a-z]*)", text, re.I)
    if match is None or len(text) > _LONGEST:
        return None
    digits = _digits(match[1], decimal_comma)
    return None if digits is None else (Decimal(digits + (match[2] or "")), match[3].lower())


def _digits(text: str, decimal_comma: bool | None) -> str | None:
    """Returns the number with a decimal point and nothing between thousands, or None if its marks make no sense."""
    text = re.sub(f"[{_SPACES}]", " ", re.sub(r"(?<=[0-9])_(?=[0-9])", "", text))
    if "_" in text:
        return None
    for mark in ("'", "’", " "):
        if mark in text:
            head, point, tail = re.fullmatch(r"([^.,]*)([.,]?)(.*)", text).groups()  # type: ignore[union-attr]
            if not _grouped(head, mark):
                return None
            text = head.replace(mark, "") + point + tail
    if "," not in text:
        grouped = _grouped(text, ".") and not text.startswith("0")
        if text.count(".") > 1 or (decimal_comma and grouped):
            return text.replace(".", "") if grouped else None
        return text
    if "." in text:
        decimal, group = (",", ".") if text.rindex(",") > text.rindex(".") else (".", ",")
        head, _, tail = text.rpartition(decimal)
        return f"{head.replace(group, '')}.{tail}" if _grouped(head, group) and tail.isdigit() else None
    if text.count(",") > 1:
        return text.replace(",", "") if _grouped(text, ",") else None
    if _grouped(text, ",") and not text.startswith("0"):
        if decimal_comma is None:
            raise AmbiguousError(f"write {text.replace(',', '.')} or {text.replace(',', '')}")
        return text.replace(",", "." if decimal_comma else "")
    return text.replace(",", ".")


def writes_decimals(text: str) -> str | None:
    """Returns the mark that certainly stands before this number's decimals, ``","`` or ``"."``, or None.

    >>> [writes_decimals(text) for text in ("3,41", "3.41", "6,837.5", "6,837,000", "1,234", "12")]
    [',', '.', '.', '.', None, None]
    """
    text = re.sub(r"[^0-9.,]", "", re.sub("e[+-]?[0-9]+", "", text.strip(), flags=re.I))
    marks = [letter for letter in text if letter in ",."]
    if not marks:
        return None
    other = "." if marks[-1] == "," else ","
    if other in marks:
        return marks[-1] if marks.count(marks[-1]) == 1 else None
    if len(marks) > 1:
        return other
    head, _, tail = text.partition(marks[0])
    return marks[0] if len(tail) != 3 or head in ("0", "") else None


def _grouped(text: str, mark: str) -> bool:
    return re.fullmatch(rf"[0-9]{{1,3}}(?:{re.escape(mark)}[0-9]{{3}})+", text) is not None


def whole(text: str | int | float, scales: dict[str, int], *, most: int = MOST) -> int | None:
    """Returns a whole number from 1 to ``most`` with one of these units after it, or None if the text is none.

    Raises:
        ConfigError: a comma that may stand before decimals or between thousands.

    >>> whole("1.5k", {"": 1, "k": 1024}), whole("0.5", {"": 1}), whole("4x", {"": 1})
    (1536, None, None)
    """
    text = str(text)
    # A count without a unit is a whole number, so its comma can only stand between thousands.
    bare = re.search("[a-z]", text, re.I) is None
    try:
        found = read_quantity(text, decimal_comma=False if bare else None)
    except AmbiguousError as error:
        unit = re.search(r"\s*[a-z].*", text, re.I)
        words = " or ".join(word + (unit[0].strip() if unit else "") for word in str(error).split()[1::2])
        raise ConfigError(f"{short(text)} can be read as two numbers", "a clear number", f"write {words}") from None
    if found is None or found[1] not in scales:
        return None
    value = found[0] * scales[found[1]]
    return int(value) if 1 <= value <= most and value == value.to_integral_value() else None


def short(text: object) -> str:
    """Returns a text in quotes, cut off if it is long.

    >>> short("9" * 400)
    "'999999999999999999999999999999999999...'"
    """
    said = str(text)
    return repr(said if len(said) <= _LONGEST else f"{said[:36]}...")
