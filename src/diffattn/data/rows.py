"""Reads rows of JSON, CSV, Parquet and Arrow as documents, and finds the field that holds the text."""

from __future__ import annotations

import csv
import json
import mmap
import re
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

from diffattn.data.documents import chat_text, is_chat, read_chat
from diffattn.data.streams import LONGEST, Characters
from diffattn.errors import DataError, one_line
from diffattn.files import parse_json

TEXT_FIELD = "text"
# The fields that are read if a row has no field of the name above.
CHATS = ("messages", "conversations")
# The bytes of a table's column that are held at once, and the most rows.
_BATCH, _ROWS = 2**23, 1024


class Row(NamedTuple):
    """A text of a file."""

    text: str
    chat: str
    """The conversation as JSON; empty for other text."""
    where: str
    """The position in the file, such as ``line 3``."""
    last: bool = True
    """False if the next row goes on with the same text."""


class NoFieldError(DataError):
    """A file whose rows do not have the field that is wanted."""


def json_lines(name: str, lines: Iterable[str], field: str) -> Iterator[Row]:
    """Yields the rows of a file with one JSON value a line; blank lines are left out."""
    for number, line in enumerate(lines, start=1):
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


def json_array(name: str, rows: Iterable[object], field: str) -> Iterator[Row]:
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
        yield from json_lines(name, text.split("\n"), field)
        return
    if isinstance(content, dict) and (lists := [key for key, value in content.items() if _is_rows(value)]):
        raise NoFieldError(
            f"{name}: one object, whose rows are under {lists[0]!r}",
            "an array of objects",
            f"write its rows into a .jsonl file: jq -c '.{lists[0]}[]'",
        )
    yield from json_array(name, content if isinstance(content, list) else [content], field)


def elements(text: Characters) -> Iterator[object]:
    """Yields the elements of one JSON array; no more of it than one element and a block is held in memory.

    Raises:
        DataError: an element that is no JSON or longer than ``LONGEST`` characters, or text behind the array.
    """
    blocks = text.blocks()
    held, place, number = "", 0, 0
    while True:
        try:
            start = _past_space(held, place)
            if number and held[start] == "]":
                break
            value, end = _element(held, start, "," if number else "[")
        except (ValueError, IndexError, RecursionError) as error:
            # Perhaps it ends in the next block. As much again is read, so that a long element is not tried too often.
            rest = held[place:]
            held, place = _longer(rest, blocks, 2 * len(rest) if len(rest) <= LONGEST else 0), 0
            if len(held) == len(rest):
                raise _no_array(text.name, f"row {number + 1} is not JSON ({_reason(error)})") from None
            continue
        yield value
        place, number = end, number + 1
    if held[start + 1 :].strip() or any(block.strip() for block in blocks):
        raise _no_array(text.name, f"there is more text behind the array of {number:,} rows")


_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()


def begins_with_object(text: str) -> bool:
    """Returns whether a text begins like a JSON array whose first element is an object.

    >>> begins_with_object('[{"text": "one"}, '), begins_with_object("[1, ")
    (True, False)
    """
    try:
        return isinstance(_element(text, _past_space(text, 0), "[")[0], dict)
    except (ValueError, IndexError, RecursionError):
        return False


def _element(text: str, start: int, sign: str) -> tuple[object, int]:
    """Returns the element behind a sign, and where it ends.

    Raises:
        ValueError: no such sign, or no JSON behind it.
        IndexError: the text ends before it is known where the element does.
    """
    if text[start] != sign:
        raise ValueError(f"{text[start]!r} in place of {sign!r}")
    value, end = _DECODER.raw_decode(text, _past_space(text, start + 1))
    if end == len(text):
        raise IndexError(end)
    return value, end


def _past_space(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    assert found is not None
    return found.end()


def _longer(text: str, blocks: Iterator[str], size: int) -> str:
    """Returns a text with the next blocks behind it, so that it is longer than ``size``, if there is so much."""
    parts, length = [text], len(text)
    while length <= size and (block := next(blocks, None)) is not None:
        parts.append(block)
        length += len(block)
    return "".join(parts)


def _reason(error: Exception) -> str:
    if isinstance(error, IndexError):
        return "the file ends before the array does"
    return "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error, 200)


def _no_array(name: str, what: str) -> DataError:
    return DataError(f"{name}: {what}", "one array of objects", "correct the file, or write one object per line")


def table_rows(text: Characters, field: str, *, tabs: bool) -> Iterator[Row]:
    """Yields the rows of a CSV file with a header; a comma, a semicolon or a tab separates its columns."""
    name = text.name
    header_line = _first_line(text)
    separators = (
        "\t" if tabs else max(",;\t", key=lambda sign: (_has(header_line, sign, field), header_line.count(sign)))
    )
    # The limit holds for the whole process, where another table may be read at the same time: it only grows.
    csv.field_size_limit(max(LONGEST, csv.field_size_limit()))
    try:
        reader = csv.reader(text.table_lines(), delimiter=separators, strict=True)
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


def _first_line(text: Characters) -> str:
    size = 2**16
    while True:
        beginning = text.peek(size).lstrip("\r\n")
        if "\n" in beginning or len(beginning) < size - 1 or size > LONGEST:
            return beginning.split("\n", 1)[0]
        size *= 4


def parquet_rows(name: str, file: IO[bytes], field: str) -> Iterator[Row]:
    """Yields the rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        # By default all of a column's values in a row group are read at once, which may be gigabytes.
        table = pyarrow.parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        column = text_column(name, table.schema_arrow.names, field)
        number = 0
        for group in range(table.num_row_groups):
            facts = table.metadata.row_group(group)
            parts = [facts.column(place) for place in range(facts.num_columns)]
            size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema.startswith(column))
            together = rows_together(facts.num_rows, size)
            for batch in table.iter_batches(together, row_groups=[group], columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _row(name, f"row {number}", {column: value}, column)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{name}: cannot be read as Parquet ({one_line(error, 200)})", "a whole Parquet file", "write it again"
        ) from None


def arrow_rows(name: str, file: IO[bytes], field: str) -> Iterator[Row]:
    """Yields the rows of a file with a stream of Arrow, as ``datasets`` writes them."""
    import pyarrow

    try:
        # Mapped, since a batch of the file may be larger than memory. It is closed with the last value that is read.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        stream = pyarrow.ipc.open_stream(pyarrow.py_buffer(content))
        column = text_column(name, stream.schema.names, field)
        number = 0
        for batch in stream:
            values = batch.column(column)
            together = rows_together(len(values), values.nbytes)
            for start in range(0, len(values), together):
                for value in values.slice(start, together).to_pylist():
                    number += 1
                    yield _row(name, f"row {number}", {column: value}, column)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{name}: cannot be read as Arrow ({one_line(error, 200)})", "a whole Arrow file", "write it as Parquet"
        ) from None


def rows_together(count: int, size: int) -> int:
    """Returns how many rows of a column of ``count`` rows and ``size`` bytes are read at once.

    >>> rows_together(1000, 10**6), rows_together(1000, 10**9)
    (1024, 8)
    """
    return max(1, min(_ROWS, count * _BATCH // max(1, size)))


def text_column(name: str, names: list[str], field: str) -> str:
    """Returns the column of a table that holds the text, or conversations where there is no column of text.

    Raises:
        NoFieldError: there is none of that name.
    """
    chats = [chat for chat in CHATS if chat in names and field == TEXT_FIELD]
    return chats[0] if chats and field not in names else names[_column(name, names, field)]


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
