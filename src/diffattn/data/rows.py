"""Rows of JSON, CSV and Parquet as documents: which field holds the text, and what to say where none does."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from diffattn.data.documents import chat_text, is_chat, read_chat
from diffattn.errors import DataError
from diffattn.files import parse_json

TEXT_FIELD = "text"
# Taken where a row has no field of the name above.
CHATS = ("messages", "conversations")


class Row(NamedTuple):
    """A text, the conversation that it is (or nothing), and where in the file it stands, such as ``line 3``."""

    text: str
    chat: str
    where: str


class NoFieldError(DataError):
    """A file whose rows have no field of the name that is wanted."""


def json_lines(name: str, text: str, field: str) -> Iterator[Row]:
    """The rows of a file with one JSON value a line; blank lines are left out."""
    # Not splitlines: a text in JSON may hold other line ends as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        # Files that were strung together have marks of byte order inside.
        line = line.strip().lstrip("\ufeff")
        if line:
            try:
                row = parse_json(line)
            except ValueError as error:
                raise DataError(
                    f"{name}: line {number} is not JSON ({_short(error)}); one object per line is wanted: correct "
                    "the line, or remove it"
                ) from None
            yield _row(name, f"line {number}", row, field)


def json_array(name: str, rows: list[Any], field: str) -> Iterator[Row]:
    """The rows of a file that is one JSON array."""
    for number, row in enumerate(rows, start=1):
        yield _row(name, f"row {number}", row, field)


def json_file(name: str, text: str, field: str) -> Iterator[Row]:
    """The rows of a ``.json`` file: an array, one object, or one object a line."""
    try:
        content = parse_json(text)
    except ValueError as error:
        first = text.lstrip().split("\n", 1)[0]
        if not is_object(first):
            raise DataError(
                f"{name}: not JSON ({_short(error)}); an array of objects, or one object per line, is wanted: correct "
                "the file"
            ) from None
        yield from json_lines(name, text, field)
        return
    if isinstance(content, dict) and (lists := [key for key, value in content.items() if _is_rows(value)]):
        raise NoFieldError(
            f"{name}: one object, whose rows are under {lists[0]!r}; an array of objects is wanted: "
            f"jq -c '.{lists[0]}[]' writes its rows one a line, as a .jsonl file"
        )
    yield from json_array(name, content if isinstance(content, list) else [content], field)


def table_rows(name: str, text: str, field: str, *, tabs: bool) -> Iterator[Row]:
    """The rows of a CSV file with a header; columns are parted by a comma, a semicolon or a tab."""
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
                    f"{name}: {where} has {len(cells)} cells and the header {len(header)}; a cell with the sign that "
                    f"parts columns, {separators!r}, has to stand in double quotes: correct the line"
                )
            else:
                yield Row(cells[column], "", where)
    except csv.Error as error:
        raise DataError(
            f"{name}: line {reader.line_num} is not CSV ({_short(error)}); a cell in double quotes is wanted to end "
            "with them, and to double those inside: correct the line"
        ) from None
    finally:
        csv.field_size_limit(limit)


def parquet_rows(name: str, data: bytes, field: str) -> Iterator[Row]:
    """The rows of a Parquet file."""
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
        raise DataError(f"{name}: a Parquet file that cannot be read ({_short(error)}); write it again") from None


def is_object(text: str) -> bool:
    """Whether a text is one JSON object."""
    try:
        return isinstance(parse_json(text), dict)
    except ValueError:
        return False


def text_of(row: dict[str, Any], field: str) -> tuple[str, str] | None:
    """The text of a row and the conversation that it is, if it is one; None where the field holds no text.

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
        raise DataError(
            f"{name}: {where}: {error}; wanted one in each message: correct the row, or remove it"
        ) from None
    if found is None:
        content = row if isinstance(row, dict) else {}
        fields = [str(key) for key, value in content.items() if isinstance(value, str) or is_chat(value)]
        holds = f", which holds {_kind(content[field])}" if field in content else ""
        way = "name one of them with --field" if fields else "write text there, or remove the row"
        raise NoFieldError(
            f"{name}: {where} has no text in field {field!r}{holds}; fields with text: "
            f"{', '.join(fields)[:200] or 'none'}; {way}"
        )
    return Row(*found, where)


def _column(name: str, header: list[str], field: str) -> int:
    if field not in header:
        columns = ", ".join(header)[:200]
        raise NoFieldError(f"{name}: no column {field!r}; columns: {columns}; name one of them with --field")
    return header.index(field)


def _has(header: str, sign: str, field: str) -> bool:
    return field in next(csv.reader([header.strip()], delimiter=sign), [])


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _kind(value: object) -> str:
    """What a value is, in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"


def _short(words: object) -> str:
    return " ".join(str(words).split())[:200]
