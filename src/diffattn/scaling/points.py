"""The points of a scaling law, read and checked: a table as spreadsheets and scripts write it, or the paper's own."""

from __future__ import annotations

import codecs
import csv
import importlib.resources
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from diffattn.errors import ConfigError, DataError
from diffattn.files import parse_json
from diffattn.names import plain
from diffattn.quantities import COUNTS, AmbiguousError, read_quantity, short, writes_decimals
from diffattn.results.scaling import ScalingPoint
from diffattn.variants import BASELINE, VARIANTS

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
_LONGEST_CELL = 1 << 16
_DELIMITERS = (",", ";", "\t", "|")
# What a file starts with, by the kinds that are taken for a table.
_NO_TEXT = {b"PK": "a spreadsheet or another zip archive", b"\x1f\x8b": "gzip", b"PAR1": "Parquet", b"%PDF": "PDF"}


class _Row(NamedTuple):
    """A row of a file: where it stands, and its cells by the names of their columns."""

    where: str
    cells: Mapping[str, object]
    # True where the file writes decimals with a comma, False with a point, None where it does not say.
    comma: bool | None = None


def read_points(source: str | Path, *, size: str = "parameters") -> list[ScalingPoint]:
    """Reads points from a file, or the paper's by the name ``figure3a``.

    Args:
        source: a table with a header, its cells between commas, semicolons, tabs or ``|``, or JSON: an object a line,
            an array of objects, or an object whose ``rows`` is one. In UTF-8, or UTF-16 with its mark. Columns:
            ``attention``, ``val_loss`` (nats per token), one or both of ``size``'s name and ``tokens``, and optionally
            ``seed``; in any case, or as people call them (loss, params, variant), others are ignored. Numbers may have
            a decimal comma, marks between thousands, and a unit where they are counts (6.8B). Lines that start with
            ``#`` are comments.
        size: the column that holds the size, ``parameters`` or ``non_embedding_parameters``. Default: ``parameters``.

    Raises:
        ConfigError: an unknown ``size``, or a file that is not there or is no text.
        DataError: a column is missing, or a value is no number that a loss or a count can be; with line and column.

    >>> points = read_points("figure3a")
    >>> len(points), points[0].attention, points[0].val_loss
    (10, 'softmax', 3.17)
    """
    if size not in SIZES:
        raise ConfigError(f"size is {size!r}", f"one of {', '.join(SIZES)}", "name the column that holds the sizes")
    if str(source).strip().casefold() == PAPER:
        name = f"{PAPER}.csv"
        text = importlib.resources.files("diffattn.plan").joinpath("data", name).read_text(encoding="utf-8")
    else:
        name = str(source)
        text = _text(source)
    lines = _lines(text)
    rows = _json(text, lines, name) if lines and lines[0][1].lstrip()[:1] in ("{", "[") else _table(lines, name)
    if not rows:
        raise DataError(f"{name} has no rows", "at least one row of points", "check that it is the right file")
    points = [_point(row, size) for row in rows]
    for axis, column in (("size", size), ("tokens", "tokens")):
        empty = [row.where for row, point in zip(rows, points, strict=True) if getattr(point, axis) is None]
        if empty and len(empty) < len(points):
            raise DataError(
                f"{empty[0]} has no {column} and other rows have", "it in all rows or none", "fill the cell"
            )
    return points


def check_points(points: Iterable[ScalingPoint]) -> tuple[list[ScalingPoint], tuple[str, ...]]:
    """Returns the points and the axes that vary among them: ``"size"``, ``"tokens"`` or both.

    Raises:
        DataError: the same model twice, one variant only or no softmax, or no axis that varies.
    """
    points = list(points)
    seen: set[tuple[object, ...]] = set()
    for point in points:
        key = (point.attention, point.size, point.tokens, point.seed)
        if key in seen:
            raise DataError(
                f"{_described(point)} stands there twice", "one row for each model",
                "remove one, or give each a seed of its own",
            )  # fmt: skip
        seen.add(key)
    variants = {point.attention for point in points}
    if BASELINE not in variants or len(variants) < 2:
        raise DataError(
            f"only {', '.join(sorted(variants)) or 'nothing'} given",
            "softmax and at least one other attention, because a size is compared with a softmax size",
            "add the rows of the other",
        )
    axes = []
    for axis in ("size", "tokens"):
        values = [getattr(point, axis) for point in points]
        if any(value is None for value in values) and any(value is not None for value in values):
            raise DataError(f"some rows give {axis} and some do not", "it in all rows or none", "fill the empty cells")
        # Matched variants differ by parts of a percent, and so do token counts that are rounded to whole steps.
        if values[0] is not None and max(values) > 1.1 * min(values):
            axes.append(axis)
    if not axes:
        raise DataError(
            "all rows have the same size and tokens", "one of them to vary, for a curve", "add models of other sizes"
        )
    return points, tuple(axes)


def _described(point: ScalingPoint) -> str:
    """Returns the words for one model: ``softmax, 1e+06 parameters, seed 0``."""
    parts = [point.attention]
    parts += [f"{point.size:g} parameters"] if point.size is not None else []
    parts += [f"{point.tokens:g} tokens"] if point.tokens is not None else []
    return ", ".join([*parts, f"seed {point.seed}"] if point.seed is not None else parts)


def _text(source: str | Path) -> str:
    """Returns the text of a file, in the encoding that its mark says, else UTF-8."""
    try:
        raw = Path(source).read_bytes()
        kind = next((kind for start, kind in _NO_TEXT.items() if raw.startswith(start)), None)
        if kind is not None:
            raise ValueError(f"it is {kind}: save it as .csv")
        marked = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = raw.decode("utf-16" if marked else "utf-8-sig")
        if "\0" in text:
            raise ValueError("it has bytes of 0, as UTF-16 without its mark has: save it as UTF-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = "it is not UTF-8, nor UTF-16 with its mark: save it as UTF-8"
        raise ConfigError(
            f"{str(source)!r} given, which cannot be read ({reason})",
            "a .csv or .jsonl file",
            f"check the path, or give {PAPER} for the paper's points",
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _table(lines: list[tuple[int, str]], name: str) -> list[_Row]:
    """Returns the rows of a table, which begins with the names of its columns."""
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
        raise DataError(f"{name} line {first} names {double} twice", "each column once", "rename one")
    rows: list[tuple[str, dict[str, str]]] = []
    for number, line in lines[1:]:
        where = f"{name} line {number}"
        cells = _cells(line, delimiter, where)
        if not any(cells):
            continue
        if len(cells) < len(header) or any(cells[len(header) :]):
            hint = ", or put a number with a decimal comma into quotes" if delimiter == "," else ""
            raise DataError(
                f"{where} has {len(cells)} cells ({line.strip()[:60]})", f"{len(header)}, as in its header",
                f"correct the line{hint}",
            )  # fmt: skip
        rows.append((where, dict(zip(header, cells, strict=False))))
    numbers = [row[key] for _, row in rows for key in _NUMBERS if key in row]
    marks = set(map(writes_decimals, numbers)) - {None}
    comma = marks == {","} if len(marks) == 1 else None
    if not marks and delimiter == ";" and not any("." in number for number in numbers):
        # Semicolons stand between cells where commas are taken by decimals.
        comma = True
    return [_Row(where, row, comma) for where, row in rows]


def _known(title: str, mark: str) -> int:
    """Returns how many columns of a header have a known name, where ``mark`` stands between them."""
    return sum(column in _COLUMNS for column in _columns([cell.strip(' "') for cell in title.split(mark)]))


def _columns(titles: Iterable[str]) -> list[str]:
    """Returns the names of columns as this file writes them, however people write them; other names stay.

    >>> _columns(["Params", "Loss", "seed", "note"]), _columns(["loss", "val_loss"])
    (['parameters', 'val_loss', 'seed', 'note'], ['loss', 'val_loss'])
    """
    names = {plain(name): name for name in _COLUMNS}
    columns = [names.get(plain(str(title)), str(title).strip()) for title in titles]
    for name, others in _ALSO.items():
        said = [index for index, column in enumerate(columns) if plain(column) in map(plain, others)]
        if name not in columns and len(said) == 1:
            columns[said[0]] = name
    return columns


def _cells(line: str, delimiter: str, where: str) -> list[str]:
    """Returns the cells of one line.

    Raises:
        DataError: a quote that is not closed, or a cell that no person wrote.
    """
    try:
        # Line by line, so that a quote that is not closed is a bad line and not the rest of the file.
        cells = [cell.strip() for cell in next(csv.reader([line.strip(" ")], delimiter=delimiter, strict=True))]
        # The limit of csv is one of the whole process, in which a text may be read whose cells are longer.
        if (longest := max(map(len, cells), default=0)) > _LONGEST_CELL:
            raise csv.Error(f"a cell of {longest:,} characters")
        return cells
    except csv.Error as error:
        given = f"{where} is no CSV ({error}): {line.strip()[:60]}"
        raise DataError(given, "cells between commas, with quotes that are closed", "correct the line") from None


def _json(text: str, lines: list[tuple[int, str]], name: str) -> list[_Row]:
    """Returns the objects of a JSON text: one object with ``rows``, an array of objects, or one object a line."""
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
                raise DataError(
                    f"{name} line {number} is no JSON ({error})", "a JSON object on each line", "correct the line"
                ) from None
    rows = []
    for where, row in found:
        if not isinstance(row, dict):
            raise DataError(f"{where} is no JSON object", "a JSON object on each line", "correct it")
        columns = _columns(row)
        if double := next((column for column in _COLUMNS if columns.count(column) > 1), None):
            raise DataError(f"{where} names {double} twice", "each name once", "rename one")
        rows.append(_Row(where, dict(zip(columns, row.values(), strict=True))))
    return rows


def _lines(text: str) -> list[tuple[int, str]]:
    """Returns the lines that are neither empty nor comments, with their numbers."""
    # Not `splitlines`, which would also cut at marks inside a text.
    lines = enumerate(text.split("\n"), 1)
    # A spreadsheet puts a comment that holds a delimiter into quotes.
    return [(number, line) for number, line in lines if line.strip() and not line.lstrip(' "').startswith("#")]


def _point(row: _Row, size: str) -> ScalingPoint:
    """Returns the model that a row is of.

    Raises:
        DataError: a cell is missing, or no number that a loss or a count can be.
    """
    attention = row.cells.get("attention")
    for column in ("attention", "val_loss"):
        if row.cells.get(column) in (None, ""):
            found = ", ".join(name for name, cell in row.cells.items() if cell not in (None, ""))
            raise DataError(
                f"{row.where} has no {column}, only {found[:80] or 'empty cells'}",
                f"the columns attention, val_loss and {size} or tokens",
                "name the columns in the first line",
            )
    if not isinstance(attention, str):
        raise DataError(f"{row.where}: attention is {attention!r}", "a name such as softmax", "correct the cell")
    counts = {}
    for column in (size, "tokens"):
        empty = row.cells.get(column) in (None, "")
        counts[column] = None if empty else _number(row, column)
    if counts[size] is None and counts["tokens"] is None:
        raise DataError(f"{row.where} has neither {size} nor tokens", "at least one of the two", "add the column")
    known = {plain(name): name for name in VARIANTS}
    return ScalingPoint(
        attention=known.get(plain(attention), attention.strip()),
        size=counts[size],
        tokens=counts["tokens"],
        val_loss=_number(row, "val_loss"),
        seed=None if row.cells.get("seed") in (None, "") else _seed(row),
    )


def _seed(row: _Row) -> int:
    """Returns the seed of a row.

    Raises:
        DataError: no whole number.
    """
    value = _number(row, "seed", least=0.0)
    if value != int(value):
        given = f"{row.where}: seed is {row.cells['seed']!r}"
        raise DataError(given, "a whole number", "correct the cell")
    return int(value)


def _number(row: _Row, column: str, *, least: float | None = None) -> float:
    """Returns the number in a cell: above 0, or at least ``least`` where that is given.

    Raises:
        DataError: no number, or one that is too small or not finite.
    """
    given = row.cells[column]
    try:
        if isinstance(given, bool) or not isinstance(given, str | int | float):
            raise ValueError
        value = float(given) if not isinstance(given, str) else _written(given, column, row.comma)
    except AmbiguousError as error:
        said = f"{row.where}: {column} is {given!r}, which may mean two things"
        raise DataError(said, "a number that can be read in one way", str(error)) from None
    except ValueError:
        raise DataError(f"{row.where}: {column} is {short(given)}", "a number", "correct the cell") from None
    except OverflowError:
        value = math.inf
    if not math.isfinite(value) or (value <= 0 if least is None else value < least):
        raise DataError(
            f"{row.where}: {column} is {value:g}",
            f"a finite number {'above 0' if least is None else 'of at least 0'}",
            "leave out a run that diverged",
        )
    return value


def _written(text: str, column: str, comma: bool | None) -> float:
    """Returns the number that a text stands for, with a unit such as M where the column holds counts.

    Raises:
        AmbiguousError: a mark in it may stand before decimals or between thousands.
        ValueError: it is no number.
    """
    found = read_quantity(text.strip().lstrip("+"), decimal_comma=comma)
    scales = COUNTS if column in _COUNTS else {"": 1}
    if column == "val_loss" and comma and re.fullmatch(r"\s*[0-9]{1,3}\.[0-9]{3}\s*", text):
        raise AmbiguousError(f"write {text.strip().replace('.', ',')} or {text.strip().replace('.', '')}")
    if found is None or found[1] not in scales:
        return float(text)
    return float(found[0] * scales[found[1]])
