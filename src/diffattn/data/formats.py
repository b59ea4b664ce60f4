"""Recognises what a file holds, by its content as much as by its name, and refuses what cannot be read as text."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePath

from diffattn.data.rows import Row, is_object, json_array, json_file, json_lines, parquet_rows, table_rows
from diffattn.errors import DataError, one_line
from diffattn.files import parse_json

# Endings by the content of the file. A folder's tables and .json files are read if they have the field that is wanted.
PLAIN, LINES, TABLES, PARQUET = (".txt", ".md"), (".jsonl", ".ndjson"), (".json", ".csv", ".tsv"), (".parquet",)
_SEPARATOR_LINE = re.compile(r"(?m)^(?:<\|endoftext\|>|\f)\r?(?:\n|\Z)")
_WEB_PAGE = re.compile(r"\s*(?:<!doctype html|<html[\s>])", re.IGNORECASE)
# A file with an unknown ending counts as JSON lines if this many of its lines are JSON objects.
_LINES = 20


def _unzstd(data: bytes) -> bytes:
    # The standard library has zstd only from Python 3.14 on; pyarrow comes with datasets.
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()


# For each ending: the first bytes of the content, and the function that unpacks it.
_PACKED: dict[str, tuple[re.Pattern[bytes], Callable[[bytes], bytes]]] = {
    ".gz": (re.compile(rb"\x1f\x8b"), gzip.decompress),
    ".xz": (re.compile(rb"\xfd7zXZ\x00"), lzma.decompress),
    ".bz2": (re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), bz2.decompress),
    ".zst": (re.compile(rb"\x28\xb5\x2f\xfd"), _unzstd),
}
PACKED = tuple(_PACKED)
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


def rows_of(name: str, data: bytes, field: str, on_note: Callable[[str], None]) -> Iterator[Row]:
    """Yields the texts of a file.

    Args:
        name: the name of the file in errors; its ending decides what the content leaves open.
        data: the content of the file, packed or not.
        field: the field that holds the text in a row of JSON, CSV or Parquet.
        on_note: called if the content is read as something else than the name says.

    Raises:
        DataError: anything that cannot be read, with its position in the file.
    """
    data = _unpacked(name, data)
    kind = ending(name)
    if data.startswith(b"PAR1") and data.endswith(b"PAR1"):
        yield from parquet_rows(name, data, field)
        return
    if kind in PARQUET:
        raise DataError(
            f"{name}: its name says Parquet, its content does not",
            "a whole Parquet file",
            "get it again, since it is damaged or cut short",
        )
    _check(name, kind, data)
    text = _decoded(name, data)
    if kind in TABLES[1:]:
        yield from table_rows(name, text, field, tabs=kind == ".tsv")
    elif kind == ".json":
        yield from json_file(name, text, field)
    elif (rows := _array(text)) is not None:
        on_note(f"{name} is one JSON array of objects: its field {field!r} is read")
        yield from json_array(name, rows, field)
    elif kind in LINES:
        yield from json_lines(name, text, field)
    elif _is_json_lines(text):
        on_note(f"{name} has a JSON object in each line: their field {field!r} is read")
        yield from json_lines(name, text, field)
    else:
        if _WEB_PAGE.match(text):
            if kind not in PLAIN:
                raise DataError(f"{name}: it is a web page", "a file of text", f"make text of it first: {_AS_TEXT}")
            on_note(f"{name} is a web page: its tags are read as text")
        yield from (Row(part, "", "") for part in _SEPARATOR_LINE.split(text))


def _unpacked(name: str, data: bytes) -> bytes:
    """Returns the unpacked content, also if it was packed several times."""
    said = PurePath(name.lower()).suffix
    if said in PACKED and not _PACKED[said][0].match(data):
        raise DataError(
            f"{name}: its name says {said}, its content does not", f"a {said} file", "correct the ending of its name"
        )
    while unpack := next((unpack for begins, unpack in _PACKED.values() if begins.match(data)), None):
        try:
            data = unpack(data)
        except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
            raise DataError(
                f"{name}: cannot be unpacked ({one_line(error)})",
                "a whole file",
                "get it again, since it is damaged or cut short",
            ) from None
    return data


def _check(name: str, kind: str, data: bytes) -> None:
    """Raises a DataError if the content begins like another kind of file than text."""
    what, way = next(((what, way) for magic, what, way in _REFUSED if data.startswith(magic)), ("", ""))
    if data.startswith(b"PK\x03\x04"):
        is_document = kind in _DOCUMENTS
        what = "a file of an office program or a book" if is_document else "a zip archive"
        way = _AS_TEXT if is_document else "unzip FILE -d FOLDER, and give the folder"
    elif data[257:262] == b"ustar":
        what, way = "a tar archive", "tar -xf FILE -C FOLDER, and give the folder"
    elif kind == ".ipynb":
        what, way = "a notebook", "jupyter nbconvert --to markdown FILE"
    if what:
        raise DataError(f"{name}: it is {what}", "a file of text", f"make text of it first: {way}")


def _decoded(name: str, data: bytes) -> str:
    """Returns the content read as UTF-8; raises a DataError that names the encoding that it seems to have instead."""
    wide = next((form for mark, form in _MARKS if data.startswith(mark)), None) or _without_mark(data[:4096])
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if wide is None and _is_binary(data[:4096]):
            raise _not_text(name) from None
        what = f"not UTF-8 at byte {error.start} (0x{data[error.start]:02x})"
        raise _not_utf8(name, what, wide or "latin1") from None
    if wide is not None:
        raise _not_utf8(name, f"not UTF-8 but {wide}", wide)
    if _is_binary(data[:4096]):
        raise _not_text(name)
    return text


_MARKS = ((b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"),
          (b"\xfe\xff", "utf-16"))  # fmt: skip


def _without_mark(data: bytes) -> str | None:
    """The name of a UTF-16 text without a byte-order mark, in which every second byte of most letters is 0, or None."""
    if not data:
        return None
    even, odd = data[::2].count(0), data[1::2].count(0)
    if max(even, odd) < len(data) / 5 or min(even, odd) > len(data) / 20:
        return None
    return "utf-16le" if odd > even else "utf-16be"


def _is_binary(data: bytes) -> bool:
    """Returns whether the beginning of a file has more control characters than a text may have by accident."""
    controls = sum(data.count(byte) for byte in (*range(9), *range(14, 27)))
    return controls > len(data) / 20


def _not_text(name: str) -> DataError:
    return DataError(f"{name}: no text but a program's data", "a file of text", "choose another file")


def _not_utf8(name: str, what: str, encoding: str) -> DataError:
    return DataError(f"{name}: {what}", "text in UTF-8", f"convert it first, for example: iconv -f {encoding} -t utf-8")


def _array(text: str) -> list[object] | None:
    """The rows of a text that is one JSON array of objects; None for any other text."""
    if not text[:4096].lstrip().startswith("["):
        return None
    try:
        rows = parse_json(text)
    except ValueError:
        return None
    return rows if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows) else None


def _is_json_lines(text: str) -> bool:
    if not text[:4096].lstrip().startswith("{"):
        return False
    start, seen = 0, 0
    while start < len(text) and seen < _LINES:
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        if line := text[start:end].strip():
            if not is_object(line):
                return False
            seen += 1
        start = end + 1
    return seen > 0
