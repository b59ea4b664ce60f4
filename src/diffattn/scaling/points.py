"""The points of a scaling law, read and checked: a table as spreadsheets and scripts write it, or the paper's own."""

from __future__ import annotations

import codecs
import csv
import importlib.resources
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffattn.errors import ConfigError, DataError
from diffattn.files import parse_json
from diffattn.names import plain
from diffattn.plan.shape import VARIANTS
from diffattn.quantities import COUNTS, AmbiguousError, read_quantity, short, writes_decimals

PAPER = "figure3a"
SIZES = ("parameters", "non_embedding_parameters")
_COUNTS = (*SIZES, "tokens", "seed")
_NUMBERS = (*_COUNTS, "val_loss")
_COLUMNS = ("attention", *_NUMBERS)
# What people call a column, where the file has none of its own name.
_ALSO = {
    "attention": ("variant", "model", "architecture"),
    "val_loss": ("loss", "validation loss", "held-out loss", "eval loss", "test loss"),
    "parameters": ("params", "model size", "size"),
    "tokens": ("training tokens", "train tokens"),
}
_DELIMITERS = (",", ";", "\t", "|")
# What a file starts with, by the kinds that are taken for a table.
_NO_TEXT = {b"PK": "a spreadsheet or another zip archive", b"\x1f\x8b": "gzip", b"PAR1": "Parquet", b"%PDF": "PDF"}


@dataclass(frozen=True)
class Point:
    """One trained model: ``size`` in parameters, ``tokens`` of training, or None where the file has no such column."""

    attention: str
    size: float | None
    tokens: float | None
    val_loss: float
    seed: int | None = None


def read_points(source: str | Path, *, size: str = "parameters") -> list[Point]:
    """Read points from a file, or the paper's by the name ``figure3a``.

    Args:
        source: a table with a header, its cells between commas, semicolons, tabs or ``|``, or JSON: an object a line,
            an array of objects, or an object whose ``rows`` is one. In UTF-8, or UTF-16 with its mark. Columns:
            ``attention``, ``val_loss`` (nats per token), one or both of ``size``'s name and ``tokens``, and optionally
            ``seed``; in any case, or as people call them (loss, params, variant), others are ignored. Numbers may have
            a decimal comma, marks between thousands, and a unit where they are counts (6.8B). Lines that start with
            ``#`` are comments.
        size: which column is the size, ``parameters`` or ``non_embedding_parameters``. Default: ``parameters``.

    Raises:
        ConfigError: an unknown ``size``, or a file that is not there or is no text.
        DataError: a column is missing, or a value is no number that a loss or a count can be; with line and column.

    >>> points = read_points("figure3a")
    >>> len(points), points[0].attention, points[0].val_loss
    (10, 'softmax', 3.17)
    """
    if size not in SIZES:
        raise ConfigError(f"size is {size!r}; wanted one of {', '.join(SIZES)}")
    if str(source).strip().casefold() == PAPER:
        name = f"{PAPER}.csv"
        text = importlib.resources.files("diffattn.plan").joinpath("data", name).read_text(encoding="utf-8")
    else:
        name = str(source)
        text = _text(source)
    lines = _lines(text)
    rows = _json(text, lines, name) if lines and lines[0][1].lstrip()[:1] in ("{", "[") else _table(lines, name)
    if not rows:
        raise DataError(f"{name} given; at least one row of points is wanted; it has none")
    points = [_point(row, size, place) for place, row in rows]
    for axis, column in (("size", size), ("tokens", "tokens")):
        empty = [place for (place, _), point in zip(rows, points, strict=True) if getattr(point, axis) is None]
        if empty and len(empty) < len(points):
            raise DataError(f"{empty[0]} has no {column} and other rows have; all or none are wanted: fill the cell")
    return points


def check_points(points: Iterable[Point]) -> tuple[list[Point], tuple[str, ...]]:
    """The points and the axes that vary among them, ``"size"``, ``"tokens"`` or both; an equal axis is no axis.

    Raises:
        DataError: the same model twice, one variant only or no softmax, or no axis that varies.
    """
    points = list(points)
    seen: set[tuple[Any, ...]] = set()
    for point in points:
        key = (point.attention, point.size, point.tokens, point.seed)
        if key in seen:
            raise DataError(
                f"{_told(point)} given twice; one row for each model is wanted; remove one, or tell them apart by seed"
            )
        seen.add(key)
    variants = {point.attention for point in points}
    if "softmax" not in variants or len(variants) < 2:
        raise DataError(
            f"only {', '.join(sorted(variants)) or 'nothing'} given; softmax and at least one other attention are "
            "wanted, because a size is compared with a softmax size; add the other's rows"
        )
    axes = []
    for axis in ("size", "tokens"):
        values = [getattr(point, axis) for point in points]
        if any(value is None for value in values) and any(value is not None for value in values):
            raise DataError(f"some rows give {axis} and some do not; all or none are wanted; fill the empty cells")
        # Matched variants differ by parts of a percent, and so do token counts that are rounded to whole steps.
        if values[0] is not None and max(values) > 1.1 * min(values):
            axes.append(axis)
    if not axes:
        raise DataError(
            "all rows have the same size and tokens; one of them has to vary for a curve; add models of other sizes"
        )
    return points, tuple(axes)


def _told(point: Point) -> str:
    parts = [point.attention]
    parts += [f"{point.size:g} parameters"] if point.size is not None else []
    parts += [f"{point.tokens:g} tokens"] if point.tokens is not None else []
    return ", ".join([*parts, f"seed {point.seed}"] if point.seed is not None else parts)


def _text(source: str | Path) -> str:
    """A file as text, in the encoding that its mark says, else UTF-8."""
    try:
        raw = Path(source).read_bytes()
        kind = next((kind for start, kind in _NO_TEXT.items() if raw.startswith(start)), None)
        if kind is not None:
            raise ValueError(f"it is {kind}: save it as .csv")
        marked = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = raw.decode("utf-16" if marked else "utf-8-sig")
        if "\0" in text:
            raise ValueError("it has bytes of 0, so it is no text, or UTF-16 without its mark: save it as UTF-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = "it is not UTF-8, nor UTF-16 with its mark: save it as UTF-8"
        raise ConfigError(
            f"{str(source)!r} given; a readable .csv or .jsonl is wanted ({reason}); check the path, or give {PAPER} "
            "for the paper's points"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _table(lines: list[tuple[int, str]], name: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The rows of a table by the names of its columns, each with its place."""
    delimiter = None
    # A spreadsheet may say its delimiter in a first line of its own.
    if lines and (said := re.fullmatch(r"\s*sep=(.)\s*", lines[0][1], re.I)):
        delimiter, lines = said[1], lines[1:]
    if not lines:
        return []
    first, title = lines[0]
    if delimiter is None:
        delimiter = max(_DELIMITERS, key=lambda mark: (_known(title, mark), title.count(mark)))
    header = _columns(_cells(title, delimiter, f"{name} line {first}"))
    if double := next((column for column in _COLUMNS if header.count(column) > 1), None):
        raise DataError(f"{name} line {first} names {double} twice; each column once is wanted; rename one")
    rows: list[tuple[str, dict[str, Any]]] = []
    for number, line in lines[1:]:
        place = f"{name} line {number}"
        cells = _cells(line, delimiter, place)
        if not any(cells):
            continue
        if len(cells) < len(header) or any(cells[len(header) :]):
            hint = "; a decimal comma there needs quotes, or ; between cells" if delimiter == "," else ""
            raise DataError(
                f"{place} has {len(cells)} cells; {len(header)} are wanted, as in its header: {line.strip()[:60]}{hint}"
            )
        rows.append((place, dict(zip(header, cells, strict=False))))
    numbers = [row[key] for _, row in rows for key in _NUMBERS if key in row]
    marks = set(map(writes_decimals, numbers)) - {None}
    comma = marks == {","} if len(marks) == 1 else None
    if not marks and delimiter == ";" and not any("." in number for number in numbers):
        # Semicolons stand between cells where commas are taken by decimals.
        comma = True
    return [(place, {**row, "decimal_comma": comma}) for place, row in rows]


def _known(title: str, mark: str) -> int:
    return sum(column in _COLUMNS for column in _columns([cell.strip(' "') for cell in title.split(mark)]))


def _columns(titles: Iterable[Any]) -> list[str]:
    """The names of columns as they are written here, where they are read: in any case, with any marks, as people say.

    >>> _columns(["Params", "Loss", "seed", "note"]), _columns(["loss", "val_loss"])
    (['parameters', 'val_loss', 'seed', 'note'], ['loss', 'val_loss'])
    """
    names = {plain(name): name for name in _COLUMNS}
    columns = [names.get(plain(str(title)), str(title).strip()) for title in titles]
    for name, others in _ALSO.items():
        said = [place for place, column in enumerate(columns) if plain(column) in map(plain, others)]
        if name not in columns and len(said) == 1:
            columns[said[0]] = name
    return columns


def _cells(line: str, delimiter: str, place: str) -> list[str]:
    try:
        # Line by line, so that a quote that is not closed is a bad line and not the rest of the file.
        return [cell.strip() for cell in next(csv.reader([line.strip(" ")], delimiter=delimiter, strict=True))]
    except csv.Error as error:
        raise DataError(f"{place} is no CSV ({error}); cells between commas are wanted: {line.strip()[:60]}") from None


def _json(text: str, lines: list[tuple[int, str]], name: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The objects of a JSON text, which may be one, an array of them, or one a line; each with its place."""
    try:
        whole = parse_json(text)
    except ValueError:
        whole = None
    if isinstance(whole, dict):
        whole = whole.get("rows")
    found = [(f"{name} row {number}", row) for number, row in enumerate(whole, 1)] if isinstance(whole, list) else []
    if not found or not all(isinstance(row, dict) for _, row in found):
        found = []
        for number, line in lines:
            try:
                found.append((f"{name} line {number}", parse_json(line)))
            except ValueError as error:
                raise DataError(f"{name} line {number} is no JSON ({error}); an object a line is wanted") from None
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for place, row in found:
        if not isinstance(row, dict):
            raise DataError(f"{place} is no JSON object; an object a line is wanted")
        columns = _columns(row)
        if double := next((column for column in _COLUMNS if columns.count(column) > 1), None):
            raise DataError(f"{place} names {double} twice; each once is wanted; rename one")
        rows.append((place, dict(zip(columns, row.values(), strict=True))))
    return rows


def _lines(text: str) -> list[tuple[int, str]]:
    """The lines that are neither empty nor comments, with their numbers; `splitlines` would also cut inside a text."""
    lines = enumerate(text.split("\n"), 1)
    # A spreadsheet puts a comment that holds a delimiter into quotes.
    return [(number, line) for number, line in lines if line.strip() and not line.lstrip(' "').startswith("#")]


def _point(row: Mapping[str, Any], size: str, place: str) -> Point:
    for column in ("attention", "val_loss"):
        if row.get(column) in (None, ""):
            found = ", ".join(name for name, cell in row.items() if cell not in (None, "") and name != "decimal_comma")
            raise DataError(
                f"{place} has no {column}; the columns attention, val_loss and {size} or tokens are wanted; it has "
                f"{found[:80] or 'none'}"
            )
    if not isinstance(row["attention"], str):
        raise DataError(f"{place}: attention is {row['attention']!r}; a name such as softmax is wanted")
    comma = row.get("decimal_comma")
    counts = {}
    for column in (size, "tokens"):
        given = row.get(column)
        counts[column] = None if given in (None, "") else _number(given, column, place, comma)
    if counts[size] is None and counts["tokens"] is None:
        raise DataError(f"{place} has neither {size} nor tokens; at least one of the two columns is wanted")
    seed = row.get("seed")
    known = {plain(name): name for name in VARIANTS}
    return Point(
        attention=known.get(plain(row["attention"]), row["attention"].strip()),
        size=counts[size],
        tokens=counts["tokens"],
        val_loss=_number(row["val_loss"], "val_loss", place, comma),
        seed=None if seed in (None, "") else _seed(seed, place, comma),
    )


def _seed(given: Any, place: str, comma: bool | None) -> int:
    value = _number(given, "seed", place, comma, least=0.0)
    if value != int(value):
        raise DataError(f"{place}: seed is {given!r}; a whole number is wanted; correct the cell")
    return int(value)


def _number(given: Any, column: str, place: str, comma: bool | None, *, least: float | None = None) -> float:
    try:
        if isinstance(given, bool):
            raise ValueError
        value = float(given) if not isinstance(given, str) else _written(given, column, comma)
    except AmbiguousError as error:
        raise DataError(f"{place}: {column} is {given!r}, which may mean two things; {error}") from None
    except (TypeError, ValueError):
        raise DataError(f"{place}: {column} is {short(given)}; a number is wanted; correct the cell") from None
    except OverflowError:
        value = math.inf
    if not math.isfinite(value) or (value <= 0 if least is None else value < least):
        raise DataError(
            f"{place}: {column} is {value:g}; a finite number {'above 0' if least is None else 'of at least 0'} is "
            "wanted; leave out a run that diverged"
        )
    return value


def _written(text: str, column: str, comma: bool | None) -> float:
    found = read_quantity(text.strip().lstrip("+"), decimal_comma=comma)
    scales = COUNTS if column in _COUNTS else {"": 1}
    if column == "val_loss" and comma and re.fullmatch(r"\s*[0-9]{1,3}\.[0-9]{3}\s*", text):
        raise AmbiguousError(f"write {text.strip().replace('.', ',')} or {text.strip().replace('.', '')}")
    if found is None or found[1] not in scales:
        return float(text)
    return float(found[0] * scales[found[1]])
