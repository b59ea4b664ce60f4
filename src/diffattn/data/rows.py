"""Reads rows of JSON, CSV and Parquet as documents, and finds the field that holds the text."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from diffattn.data.documents import chat_text, is_chat, read_chat
from diffattn.errors import DataError, one_line
from diffattn.files import parse_json

TEXT_FIELD = "text"
# The fields that are read if a row has no field of the name above.
CHATS = ("messages", "conversations")


class Row(NamedTuple):
    """A text of a file."""

    text: str
    chat: str
    """The conversation as JSON; empty for other text."""
    where: str
    """The position in the file, such as ``line 3``."""


class NoFieldError(DataError):
    """A file whose rows do not have the field that is wanted."""


def json_lines(name: str, text: str, field: str) -> Iterator[Row]:
    """Yields the rows of a file with one JSON value a line; blank lines are left out."""
    # str.splitlines would also split at other line ends, which a text in JSON may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        # Files that were joined into one may have byte-order marks inside.
        line = line.strip().lstrip("\ufeff")
        if line:
            try:
                row = parse_json(line)
            except ValueError as error:
                raise DataError(
                    f"{name}: line {number} is not JSON ({one_line(error, 200)})",
                    "one object per line",
                    "correct the line, or remove it",
                ) from None
            yield _row(name, f"line {number}", row, field)


def json_array(name: str, rows: list[Any], field: str) -> Iterator[Row]:
    """Yields the rows of a file that is one JSON array."""
    for number, row in enumerate(rows, start=1):
        yield _row(name, f"row {number}", row, field)


def json_file(name: str, text: str, field: str) -> Iterator[Row]:
    """Yields the rows of a ``.json`` file: an array, one object, or one object a line."""
    try:
        content = parse_json(text)
    except ValueError as error:
        first = text.lstrip().split("\n", 1)[0]
        if not is_object(first):
            raise DataError(
                f"{name}: not JSON ({one_line(error, 200)})",
                "an array of objects, or one object per line",
                "correct the file",
            ) from None
        yield from json_lines(name, text, field)
        return
    if isinstance(content, dict) and (lists := [key for key, value in content.items() if _is_rows(value)]):
        raise NoFieldError(
            f"{name}: one object, whose rows are under {lists[0]!r}",
            "an array of objects",
            f"write its rows into a .jsonl file: jq -c '.{lists[0]}[]'",
        )
    yield from json_array(name, content if isinstance(content, list) else [content], field)


def table_rows(name: str, text: str, field: str, *, tabs: bool) -> Iterator[Row]:
    """Yields the rows of a CSV file with a header; a comma, a semicolon or a tab separates its columns."""
    header_line = text.lstrip("\r\n").split("\n", 1)[0]
    separators = (
        "\t" if tabs else max(",;\t", key=lambda sign: (_has(header_line, sign, field), header_line.count(sign)))
    )
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separators, strict=True)
        header: list[str] | None = None
        for cells in reader:
            where = f"line {reader.line_num}"
            if not cells:
                continue
            if header is None:
                header = cells
                column = _column(name, header, field)
            elif len(cells) != len(header):
                raise DataError(
                    f"{name}: {where} has {len(cells)} cells and the header {len(header)}",
                    f"as many, with double quotes around a cell that has the separator {separators!r} in it",
                    "correct the line",
                )
            else:
                yield Row(cells[column], "", where)
    except csv.Error as error:
        raise DataError(
            f"{name}: line {reader.line_num} is not CSV ({one_line(error, 200)})",
            "cells whose double quotes are closed, with double quotes inside a cell written twice",
            "correct the line",
        ) from None
    finally:
        csv.field_size_limit(limit)


def parquet_rows(name: str, data: bytes, field: str) -> Iterator[Row]:
    """Yields the rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        chats = [chat for chat in CHATS if chat in names and field == TEXT_FIELD]
        column = chats[0] if chats and field not in names else names[_column(name, names, field)]
        number = 0
        for batch in file.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _row(name, f"row {number}", {column: value}, column)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{name}: cannot be read as Parquet ({one_line(error, 200)})", "a whole Parquet file", "write it again"
        ) from None


def is_object(text: str) -> bool:
    """Returns whether a text is one JSON object."""
    try:
        return isinstance(parse_json(text), dict)
    except ValueError:
        return False


def text_of(row: dict[str, object], field: str) -> tuple[str, str] | None:
    """Returns the text of a row and its conversation, empty for other text; None if the field holds no text.

    Raises:
        ValueError: a conversation with a message that has no text.
    """
    names = [field] if field in row or field != TEXT_FIELD else [field, *CHATS]
    for value in (row.get(name) for name in names):
        if isinstance(value, str):
            return value, ""
        if is_chat(value):
            chat = read_chat(value)
            return chat_text(chat), chat
    return None


def _row(name: str, where: str, row: Any, field: str) -> Row:
    if isinstance(row, str):
        return Row(row, "", where)
    try:
        found = text_of(row, field) if isinstance(row, dict) else None
    except ValueError as error:
        raise DataError(f"{name}: {where}: {error}", "text in each message", "correct the row, or remove it") from None
    if found is None:
        content = row if isinstance(row, dict) else {}
        fields = [str(key) for key, value in content.items() if isinstance(value, str) or is_chat(value)]
        holds = f", which holds {_kind(content[field])}" if field in content else ""
        way = "name one of them with --field" if fields else "write text there, or remove the row"
        raise NoFieldError(
            f"{name}: {where} has no text in field {field!r}{holds}",
            f"a field with text, here: {', '.join(fields)[:200] or 'none'}",
            way,
        )
    return Row(*found, where)


def _column(name: str, header: list[str], field: str) -> int:
    if field not in header:
        columns = ", ".join(header)[:200]
        raise NoFieldError(f"{name}: no column {field!r}", f"one of {columns}", "name the column with --field")
    return header.index(field)


def _has(header: str, sign: str, field: str) -> bool:
    return field in next(csv.reader([header.strip()], delimiter=sign), [])


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _kind(value: object) -> str:
    """The kind of a value in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"
