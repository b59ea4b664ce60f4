"""The points of a scaling law, read and checked: a CSV or JSON lines file, or the paper's own."""

from __future__ import annotations

import csv
import importlib.resources
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffattn.errors import ConfigError, DataError

PAPER = "figure3a"
SIZES = ("parameters", "non_embedding_parameters")


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
        source: a ``.csv`` with a header, or a ``.jsonl`` with an object a line. Columns: ``attention``, ``val_loss``
            (nats per token), one or both of ``size``'s name and ``tokens``, and optionally ``seed``; others are
            ignored. Lines that start with ``#`` are comments.
        size: which column is the size, ``parameters`` or ``non_embedding_parameters``. Default: ``parameters``.

    Raises:
        ConfigError: an unknown ``size``, or a file that is not there.
        DataError: a column is missing, or a value is no number that a loss or a count can be; with the line.

    >>> points = read_points("figure3a")
    >>> len(points), points[0].attention, points[0].val_loss
    (10, 'softmax', 3.17)
    """
    if size not in SIZES:
        raise ConfigError(f"size is {size!r}; wanted one of {', '.join(SIZES)}")
    if str(source) == PAPER:
        name = f"{PAPER}.csv"
        text = importlib.resources.files("diffattn.plan").joinpath("data", name).read_text(encoding="utf-8")
    else:
        name = str(source)
        try:
            text = Path(source).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise ConfigError(
                f"{name!r} given; a readable .csv or .jsonl is wanted ({reason}); check the path, or give {PAPER} for "
                "the paper's points"
            ) from None
    rows = _json_lines(text, name) if name.endswith((".jsonl", ".json")) else _comma_separated(text, name)
    points = [_point(row, size, f"{name} line {number}") for number, row in rows]
    if not points:
        raise DataError(f"{name} given; at least one row of points is wanted; it has none")
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


def _comma_separated(text: str, name: str) -> list[tuple[int, Mapping[str, Any]]]:
    rows: list[tuple[int, Mapping[str, Any]]] = []
    header: list[str] | None = None
    for number, line in _lines(text):
        try:
            # Line by line, so that a quote that is not closed is a bad line and not the rest of the file.
            cells = [cell.strip() for cell in next(csv.reader([line], strict=True))]
        except csv.Error as error:
            raise DataError(f"{name} line {number} is no CSV ({error}); cells between commas are wanted") from None
        if header is None:
            header = cells
            if double := next((cell for cell in header if header.count(cell) > 1), None):
                raise DataError(f"{name} line {number} names {double} twice; each column once is wanted; rename one")
        elif len(cells) != len(header):
            raise DataError(f"{name} line {number} has {len(cells)} cells; {len(header)} are wanted, as in its header")
        else:
            rows.append((number, dict(zip(header, cells, strict=True))))
    return rows


def _json_lines(text: str, name: str) -> list[tuple[int, Mapping[str, Any]]]:
    rows: list[tuple[int, Mapping[str, Any]]] = []
    for number, line in _lines(text):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name} line {number} is no JSON ({error}); an object a line is wanted") from None
        if not isinstance(row, dict):
            raise DataError(f"{name} line {number} is no JSON object; an object a line is wanted")
        rows.append((number, row))
    return rows


def _lines(text: str) -> list[tuple[int, str]]:
    """The lines that are neither empty nor comments, with their numbers; `splitlines` would also cut inside a text."""
    lines = enumerate(text.split("\n"), 1)
    return [(number, line) for number, line in lines if line.strip() and not line.lstrip().startswith("#")]


def _point(row: Mapping[str, Any], size: str, place: str) -> Point:
    for column in ("attention", "val_loss"):
        if row.get(column) in (None, ""):
            raise DataError(f"{place} has no {column}; the columns attention, val_loss and {size} or tokens are wanted")
    if not isinstance(row["attention"], str):
        raise DataError(f"{place}: attention is {row['attention']!r}; a name such as softmax is wanted")
    counts = {}
    for column in (size, "tokens"):
        given = row.get(column)
        counts[column] = None if given in (None, "") else _number(given, column, place)
    if counts[size] is None and counts["tokens"] is None:
        raise DataError(f"{place} has neither {size} nor tokens; at least one of the two columns is wanted")
    seed = row.get("seed")
    return Point(
        attention=row["attention"],
        size=counts[size],
        tokens=counts["tokens"],
        val_loss=_number(row["val_loss"], "val_loss", place),
        seed=None if seed in (None, "") else _seed(seed, place),
    )


def _seed(given: Any, place: str) -> int:
    value = _number(given, "seed", place, least=0.0)
    if value != int(value):
        raise DataError(f"{place}: seed is {given!r}; a whole number is wanted; correct the cell")
    return int(value)


def _number(given: Any, column: str, place: str, *, least: float | None = None) -> float:
    try:
        if isinstance(given, bool):
            raise ValueError
        value = float(given)
    except (TypeError, ValueError):
        raise DataError(f"{place}: {column} is {given!r}; a number is wanted; correct the cell") from None
    except OverflowError:
        value = math.inf
    if not math.isfinite(value) or (value <= 0 if least is None else value < least):
        raise DataError(
            f"{place}: {column} is {value:g}; a finite number {'above 0' if least is None else 'of at least 0'} is "
            "wanted; leave out a run that diverged"
        )
    return value
