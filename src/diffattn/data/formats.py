"""Recognises what a file holds, by its content as much as by its name, and refuses what cannot be read as text."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import IO

from diffattn.data import rows
from diffattn.data.documents import PIECE, SEPARATOR
from diffattn.data.rows import Row, is_object, json_array, json_file, json_lines
from diffattn.data.streams import LONGEST, PACKED, Bytes, Characters, unpacked
from diffattn.errors import DataError
from diffattn.files import parse_json, shown

# Endings by the content of the file. A folder's tables and .json files are read if they have the field that is wanted.
PLAIN, LINES, TABLES, PARQUET = (".txt", ".md"), (".jsonl", ".ndjson"), (".json", ".csv", ".tsv"), (".parquet",)
_SEPARATORS = (SEPARATOR, "\f")
_SEPARATOR_LINE = re.compile(rf"(?m)^(?:{'|'.join(map(re.escape, _SEPARATORS))})\r?(?:\n|\Z)")
_WEB_PAGE = re.compile(r"\s*(?:<!doctype html|<html[\s>])", re.IGNORECASE)
# A file with an unknown ending counts as JSON lines if this many of its lines are JSON objects.
_LINES = 20
# A JSON value of at most so many characters is read at once; a longer array row by row.
_WHOLE = 2**24
# The first bytes of a stream of Arrow, such as ``datasets`` writes.
_ARROW = b"\xff\xff\xff\xff"
_AS_TEXT = "pandoc FILE -t plain -o FILE.txt"
# The first bytes of a file, its kind, and a way to make text of it.
_REFUSED = (
    (b"%PDF-", "a PDF", "pdftotext FILE"),
    (b"\xd0\xcf\x11\xe0", "a file of an office program", "save it as text there"),
    (b"{\\rtf", "rich text", _AS_TEXT),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x FILE, and give the folder"),
    (b"Rar!\x1a\x07", "a rar archive", "unrar x FILE, and give the folder"),
    (b"\x04\x22\x4d\x18", "a file packed with lz4", "lz4 -d FILE"),
    (b"\x1f\x9d", "a file packed with compress", "uncompress FILE"),
    (b"SQLite format 3\x00", "an SQLite database", "write the table with the text as a .csv file"),
    (b"ARROW1", "an Arrow file", "write it as Parquet"),
    (b"Obj\x01", "an Avro file", "write it as Parquet"),
)
_DOCUMENTS = (".docx", ".odt", ".epub", ".pptx", ".xlsx", ".ods")


def ending(name: str) -> str:
    """The ending that names the content of a file, in small letters; that of ``A.TXT.gz`` is ``.txt``."""
    path = PurePath(name.lower())
    return PurePath(path.stem).suffix if path.suffix in PACKED else path.suffix


def rows_of(path: Path, field: str, on_note: Callable[[str], None]) -> Iterator[Row]:
    """Yields the texts of a file, a very long one in several rows.

    Args:
        path: a file, packed or not; the ending of its name decides what the content leaves open.
        field: the field that holds the text in a row of JSON, CSV, Parquet or Arrow.
        on_note: called if the content is read as something else than the name says.

    Raises:
        DataError: anything that cannot be read, with its position in the file.
    """
    name, kind = shown(path), ending(path.name)
    with unpacked(path) as content, contextlib.ExitStack() as opened:
        if content.peek(4) == b"PAR1":
            file = opened.enter_context(_seekable(path, content))
            if _last_bytes(file, 4) == b"PAR1":
                yield from rows.parquet_rows(name, file, field)
                return
            content = Bytes(file.read)
        if kind in PARQUET:
            raise DataError(
                f"{name}: its name says Parquet, its content does not",
                "a whole Parquet file",
                "get it again, since it is damaged or cut short",
            )
        if kind == ".arrow" and content.peek(4) == _ARROW:
            yield from rows.arrow_rows(name, opened.enter_context(_seekable(path, content)), field)
            return
        _check(name, kind, content.peek(4096))
        text = Characters(name, content)
        if kind in TABLES[1:]:
            yield from rows.table_rows(text, field, tabs=kind == ".tsv")
        elif kind == ".json":
            yield from _json(text, field)
        elif (array := _array(text)) is not None:
            on_note(f"{name} is one JSON array of objects: its field {field!r} is read")
            yield from json_array(name, array, field)
        elif kind in LINES:
            yield from json_lines(name, text.lines(), field)
        elif _is_json_lines(text):
            on_note(f"{name} has a JSON object in each line: their field {field!r} is read")
            yield from json_lines(name, text.lines(), field)
        else:
            if _WEB_PAGE.match(text.peek(4096)):
                if kind not in PLAIN:
                    raise DataError(f"{name}: it is a web page", "a file of text", f"make text of it first: {_AS_TEXT}")
                on_note(f"{name} is a web page: its tags are read as text")
            yield from _parts(text.blocks())


@contextlib.contextmanager
def _seekable(path: Path, content: Bytes) -> Iterator[IO[bytes]]:
    """Yields the content of a file as one in which any place can be read: the file itself if it is not packed."""
    with contextlib.ExitStack() as opened:
        if content.packed:
            file: IO[bytes] = opened.enter_context(tempfile.TemporaryFile())
            while data := content.read(2**20):
                file.write(data)
            file.seek(0)
        else:
            file = opened.enter_context(path.open("rb"))
        yield file


def _last_bytes(file: IO[bytes], count: int) -> bytes:
    file.seek(-count, os.SEEK_END)
    found = file.read()
    file.seek(0)
    return found


def _check(name: str, kind: str, head: bytes) -> None:
    """Raises a DataError if the content begins like another kind of file than text."""
    what, way = next(((what, way) for magic, what, way in _REFUSED if head.startswith(magic)), ("", ""))
    if head.startswith(b"PK\x03\x04"):
        is_document = kind in _DOCUMENTS
        what = "a file of an office program or a book" if is_document else "a zip archive"
        way = _AS_TEXT if is_document else "unzip FILE -d FOLDER, and give the folder"
    elif head[257:262] == b"ustar":
        what, way = "a tar archive", "tar -xf FILE -C FOLDER, and give the folder"
    elif kind == ".ipynb":
        what, way = "a notebook", "jupyter nbconvert --to markdown FILE"
    if what:
        raise DataError(f"{name}: it is {what}", "a file of text", f"make text of it first: {way}")


def _json(text: Characters, field: str) -> Iterator[Row]:
    """Yields the rows of a ``.json`` file."""
    beginning = text.peek(_WHOLE + 1)
    if len(beginning) <= _WHOLE:
        yield from json_file(text.name, beginning, field)
    elif beginning.lstrip().startswith("["):
        yield from json_array(text.name, rows.elements(text), field)
    elif _is_json_lines(text):
        yield from json_lines(text.name, text.lines(), field)
    else:
        raise DataError(
            f"{text.name}: one JSON value of more than {_WHOLE:,} characters",
            "an array of objects, or one object per line",
            "write its rows into a .jsonl file: jq -c '.[]' FILE",
        )


def _array(text: Characters) -> Iterable[object] | None:
    """The rows of a text that is one JSON array of objects; None for any other text."""
    if not text.peek(4096)[:4096].lstrip().startswith("["):
        return None
    beginning = text.peek(_WHOLE + 1)
    if len(beginning) > _WHOLE:
        return rows.elements(text) if rows.begins_with_object(beginning) else None
    try:
        found = parse_json(beginning)
    except ValueError:
        return None
    return found if isinstance(found, list) and found and all(isinstance(row, dict) for row in found) else None


def _is_json_lines(text: Characters) -> bool:
    """Returns whether the first lines are JSON objects; looks only as far as these lines reach."""
    if not text.peek(4096)[:4096].lstrip().startswith("{"):
        return False
    size, start, seen = 2**16, 0, 0
    while seen < _LINES:
        beginning = text.peek(size)
        end = beginning.find("\n", start)
        if end < 0:
            if len(beginning) >= size and size <= LONGEST:
                size *= 4
                continue
            end = len(beginning)
        if line := beginning[start:end].strip():
            if not is_object(line):
                return False
            seen += 1
        start = end + 1
        if start > len(beginning):
            break
    return seen > 0


def _parts(blocks: Iterator[str]) -> Iterator[Row]:
    """Yields the documents between the separator lines of a plain text, a long one in rows of ``PIECE`` characters."""
    held: list[str] = []
    size, rest, in_line = 0, "", False
    for block in blocks:
        text = rest + block
        end = _known_end(text, in_line)
        start = 0
        for before, behind in _separator_lines(text, end, in_line):
            held.append(text[start:before])
            yield from _cut(held)
            yield Row(held[0], "", "")
            held, size, start = [], 0, behind
        held.append(text[start:end])
        size += end - start
        if size > PIECE:
            yield from _cut(held)
            size = len(held[0])
        in_line = text[end - 1] != "\n" if end else in_line
        rest = text[end:]
    if _SEPARATOR_LINE.fullmatch(rest):
        yield Row("".join(held), "", "")
        held, rest = [], ""
    held.append(rest)
    yield from _cut(held)
    yield Row(held[0], "", "")


def _separator_lines(text: str, end: int, in_line: bool) -> list[tuple[int, int]]:
    """Returns where each separator line of the text before ``end`` begins and ends."""
    found = []
    # A search for the words is 100 times as fast as one for the pattern.
    for word in _SEPARATORS:
        start = text.find(word, 0, end)
        while start >= 0:
            match = _SEPARATOR_LINE.match(text, start, end)
            # The pattern takes the middle of a line for its beginning where the text begins there.
            if match and not (in_line and start == 0):
                found.append(match.span())
            start = text.find(word, start + 1, end)
    return sorted(found)


def _known_end(text: str, in_line: bool) -> int:
    """Returns where a last line begins that may yet become a separator line, else the end of the text."""
    start = text.rfind("\n") + 1
    if start == 0 and in_line:
        return len(text)
    last = text[start : start + 20]
    return start if any(f"{word}\r".startswith(last) for word in _SEPARATORS) else len(text)


def _cut(held: list[str]) -> Iterator[Row]:
    """Yields the rows of a document of which more follows, and leaves its last part, in one text."""
    excess = sum(map(len, held)) - PIECE
    while excess > 0:
        # Only the last text is cut: copies of a whole piece would be most of the memory.
        end = len(held[-1]) - excess
        if end <= 0:
            held[-2:] = ["".join(held[-2:])]
            continue
        rest, held[-1] = held[-1][end:], held[-1][:end]
        yield Row("".join(held), "", "", last=False)
        held[:] = [rest]
        excess -= PIECE
    held[:] = ["".join(held)]
