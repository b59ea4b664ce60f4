"""Files as people have them: told by content and name, read as what they are, or refused with the way out."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from diffattn.data.text import read_corpus
from diffattn.errors import DataError
from diffattn.files import write_json

ROWS = [{"text": "one, with a comma", "n": 1}, {"text": 'two\nlines "quoted"', "n": 2}]
TEXTS = [row["text"] for row in ROWS]


def _lines(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _table(separator: str, *, end: str = "\n") -> bytes:
    cells = [["text", "n"], *([row["text"], str(row["n"])] for row in ROWS)]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells]
    return end.join(separator.join(row) for row in quoted).encode()


def _parquet(rows: list) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


def _zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


def _texts(path, **options) -> list[str]:
    return [document.text for document in read_corpus(path, **options).documents]


def _refused(path, **options) -> str:
    with pytest.raises(DataError) as raised:
        read_corpus(path, **options)
    line = str(raised.value)
    assert "\n" not in line
    assert path.name in line
    return line


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.jsonl", _lines(ROWS)),
        ("rows.ndjson", _lines(ROWS)),
        ("ROWS.JSONL", _lines(ROWS)),
        ("rows.json", json.dumps(ROWS).encode()),
        ("rows.json", json.dumps(ROWS, indent=2).encode()),
        ("ROWS.JSON", _lines(ROWS)),
        ("rows.jsonl", json.dumps(ROWS).encode()),
        ("rows.txt", _lines(ROWS)),
        ("rows", json.dumps(ROWS).encode()),
        ("strings.json", json.dumps(TEXTS).encode()),
        ("strings.jsonl", _lines(TEXTS)),
        ("table.csv", _table(",")),
        ("TABLE.CSV", _table(",", end="\r\n")),
        ("excel.csv", b"\xef\xbb\xbf" + _table(";", end="\r\n")),
        ("tabs.csv", _table("\t")),
        ("table.tsv", _table("\t")),
        ("part.parquet", _parquet(ROWS)),
        ("part", _parquet(ROWS)),
        # Without the time, which is part of the test's name and would differ between the processes of one run.
        ("rows.jsonl.gz", gzip.compress(_lines(ROWS), mtime=0)),
        ("ROWS.NDJSON.GZ", gzip.compress(_lines(ROWS), mtime=0)),
        ("rows.jsonl.bz2", bz2.compress(_lines(ROWS))),
        ("rows.jsonl.xz", lzma.compress(_lines(ROWS))),
        ("rows.jsonl.zst", _zstd(_lines(ROWS))),
        ("rows.jsonl", gzip.compress(_lines(ROWS), mtime=0)),
        ("table.csv.zst", _zstd(_table(","))),
        ("rows.jsonl.gz", gzip.compress(bz2.compress(_lines(ROWS)), mtime=0)),
        ("marks.jsonl", b"\xef\xbb\xbf" + b"\xef\xbb\xbf".join(_lines([row]) for row in ROWS)),
    ],
)
def test_rows_are_read_whatever_holds_them(tmp_path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert _texts(tmp_path / name) == TEXTS


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, _zstd])
@pytest.mark.parametrize("name", ["a.txt{}", "a.TXT{}", "a{}", "a.txt"])
def test_packed_text_is_unpacked_by_its_content(tmp_path, pack, name: str) -> None:
    ending = {gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".xz", _zstd: ".zst"}[pack]
    path = tmp_path / name.format(ending)
    path.write_bytes(pack(b"plain\r\ntext\n") + pack(b"and more"))
    assert _texts(path) == ["plain\r\ntext\nand more"]
    path.write_bytes(pack(b"plain text" * 99)[:-9])
    assert "cannot be unpacked" in _refused(path)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.pdf", b"%PDF-1.7\n\x00\x01", "pdftotext"),
        ("a.txt", b"%PDF-1.7\n", "pdftotext"),
        ("a.docx", b"PK\x03\x04....", "pandoc"),
        ("a.epub", b"PK\x03\x04....", "pandoc"),
        ("a.zip", b"PK\x03\x04....", "unzip"),
        ("a.doc", b"\xd0\xcf\x11\xe0....", "save it as text"),
        ("a.rtf", b"{\\rtf1 text}", "pandoc"),
        ("a.html", b"<!DOCTYPE html><p>Hi</p>", "pandoc"),
        ("page", b"\n <HTML><p>Hi</p>", "pandoc"),
        ("a.ipynb", b'{"cells": []}', "nbconvert"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c...", "7z x"),
        ("a.txt.lz4", b"\x04\x22\x4d\x18...", "lz4 -d"),
        ("a.arrow", b"ARROW1\x00\x00", "Parquet"),
        ("a.parquet", b"PAR1 cut short", "damaged or cut short"),
        ("a.txt.gz", b"no gzip", "does not"),
        ("a.txt.zst", b"no zstd", "does not"),
        ("wide.txt", "wide text".encode("utf-16-le"), "iconv -f utf-16le -t utf-8"),
        ("wide.txt", "wide text".encode("utf-16-be"), "iconv -f utf-16be -t utf-8"),
        ("wide.jsonl", "{}".encode("utf-16"), "iconv -f utf-16 -t utf-8"),
        ("wider.txt", "wide text".encode("utf-32"), "iconv -f utf-32 -t utf-8"),
        ("a.bin", bytes(range(32)) * 9, "a program's data"),
        ("a.txt", b"\x7fELF" + bytes(99), "a program's data"),
        ("a.png", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00", "a program's data"),
    ],
)
def test_what_is_not_read_is_refused_with_the_way_out(tmp_path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert words in _refused(tmp_path / name)


def test_a_tar_archive_is_refused_packed_or_not(tmp_path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    for name, data in (("a.tar", stream.getvalue()), ("a.tgz", gzip.compress(stream.getvalue(), mtime=0))):
        (tmp_path / name).write_bytes(data)
        assert "tar -xf" in _refused(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "a.txt", "w") as archive:
        archive.writestr("a.txt", "text")
    assert "unzip" in _refused(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "text",
    [
        "[Music]\nwords",
        "{ braces } of a text\n",
        "{}x\n",
        "[1, 2]",
        '{"a": 1}\nand then text',
        "BZh is no bzip2",
        "PAR1 is",
    ],
)
def test_plain_text_that_begins_like_something_else_is_text(tmp_path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    notes: list[str] = []
    assert _texts(tmp_path / "a.txt", on_note=notes.append) == [text]
    assert notes == []


def test_a_format_that_the_name_does_not_say_is_said(tmp_path) -> None:
    notes: list[str] = []
    for name, data in (("a.txt", _lines(ROWS)), ("b.txt", json.dumps(ROWS).encode()), ("c.txt", b"<html>page")):
        (tmp_path / name).write_bytes(data)
        read_corpus(tmp_path / name, on_note=notes.append)
    assert ["a.txt" in notes[0], "b.txt" in notes[1], "c.txt" in notes[2]] == [True] * 3
    (tmp_path / "d.jsonl").write_bytes(_lines(ROWS))
    read_corpus(tmp_path / "d.jsonl", on_note=notes.append)
    assert len(notes) == 3


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b'{"content": "one"}\n'),
        ("a.json", b'[{"content": "one"}]'),
        ("a.csv", b"content,n\none,1\n"),
        ("a.tsv", b"content\tn\none\t1\n"),
        ("a.parquet", _parquet([{"content": "one", "n": 1}])),
    ],
)
def test_text_under_another_name_is_found_by_field(tmp_path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    line = _refused(path)
    assert "--field" in line
    assert "content" in line
    assert _texts(path, text_column="content") == ["one"]
    assert "--field" in _refused(path, text_column="absent")


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
        {
            "messages": [
                {"role": "user", "content": [{"text": "Hi"}]},
                {"role": "assistant", "content": [{"text": "Hello!"}]},
            ]
        },
        {"text": MESSAGES},
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_conversations_are_text(tmp_path, row: dict, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(
        {"jsonl": _lines, "json": lambda rows: json.dumps(rows).encode(), "parquet": _parquet}[ending]([row])
    )
    (document,) = read_corpus(path).documents
    assert document.text == "user: Hi\n\nassistant: Hello!"
    assert json.loads(document.chat) == MESSAGES


def test_a_conversation_under_another_name_is_found_by_field(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines([{"turns": MESSAGES}]))
    assert "wanted a field with text, here: turns: name one of them with --field" in _refused(tmp_path / "a.jsonl")
    assert _texts(tmp_path / "a.jsonl", text_column="turns") == ["user: Hi\n\nassistant: Hello!"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            '{"text": null}',
            "which holds null; wanted a field with text, here: none: write text there, or remove the row",
        ),
        (
            '{"text": 5, "body": "b"}',
            "which holds a number; wanted a field with text, here: body: name one of them with --field",
        ),
        ('{"text": true}', "which holds true or false"),
        ('{"text": {"value": "nested"}}', "which holds an object"),
        ('{"text": ["a", "b"]}', "which holds a list"),
        ("{}", "line 2 has no text in field 'text'"),
        ("5", "line 2 has no text"),
        ("null", "line 2 has no text"),
        ('["text"]', "line 2 has no text"),
        ('{"text": "\\ud800"}', "line 2: a.jsonl#1: not UTF-8: a lone surrogate at character 0"),
        ('{"text": ', "line 2 is not JSON"),
        ('{"text": "a"} {"text": "b"}', "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON (it is nested too deeply)"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "line 2 is not JSON"),
        ('{"messages": [{"role": "user", "content": null}]}', "line 2: message 1 of the conversation holds no text"),
        ('{"messages": [{"role": 5, "content": "a"}]}', "line 2: message 1"),
        ('{"messages": []}', "line 2 has no text"),
    ],
)
def test_a_row_without_text_is_one_line_with_its_number(tmp_path, row: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + row + "\n")
    assert words in _refused(tmp_path / "a.jsonl")


def test_rows_that_are_odd_and_right_are_read(tmp_path) -> None:
    rows = [
        '{"text": "a\\u0000b"}',
        "",
        '{"text": ""}',
        "   ",
        '{"text": "c\\r\\nd\\u2028e"}',
        "\ufeff" + '{"text": "f"}',
    ]
    (tmp_path / "a.jsonl").write_text("\r\n".join(rows), newline="")
    assert _texts(tmp_path / "a.jsonl") == ["a\x00b", "c\r\nd\u2028e", "f"]
    # Zero bytes in a text are kept as any other byte.
    (tmp_path / "a.txt").write_bytes(b"a text with \x00 in it\n" * 9)
    assert _texts(tmp_path / "a.txt") == ["a text with \x00 in it\n" * 9]


def test_a_line_of_many_megabytes_is_read(tmp_path) -> None:
    text = "word " * 2_000_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "a.csv").write_text(f"n,text\n1,{text}\n")
    (tmp_path / "a.txt").write_text(text)
    for name in ("a.jsonl", "a.csv", "a.txt"):
        assert _texts(tmp_path / name) == [text]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"text,n\nhello, world,1\n", "line 2 has 3 cells and the header 2"),
        (b"text,n\nfine,1\nshort\n", "line 3 has 1 cells"),
        (b'text,n\n"open,1\n', "is not CSV"),
        (b'text,n\n"a"b,1\n', "line 2 is not CSV"),
        (b"words,n\na,1\n", "no column 'text'; wanted one of words, n: name the column with --field"),
    ],
)
def test_a_table_that_is_not_right_is_one_line_with_its_number(tmp_path, data: bytes, words: str) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    assert words in _refused(tmp_path / "a.csv")


def test_an_object_around_the_rows_is_named(tmp_path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": ROWS}))
    assert "jq -c '.data[]'" in _refused(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps(ROWS[0]))
    assert _texts(tmp_path / "a.json") == TEXTS[:1]
    (tmp_path / "a.json").write_text('{"text": ')
    assert "not JSON" in _refused(tmp_path / "a.json")


@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"two\nlines.txt", b"\xff\xfe.txt"])
def test_a_file_of_any_name_is_read_and_named(tmp_path, name: bytes) -> None:
    """Bytes that are no UTF-8, line ends: names that printing would break."""
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        file.write(b"words")
    for source in (os.fsdecode(path), tmp_path):
        corpus = read_corpus(source)
        assert [document.text for document in corpus.documents] == ["words"]
        assert corpus.name.isprintable()
        assert corpus.name.encode()
        assert len(corpus.digest) == 64
    with open(path, "wb") as file:
        file.write(b'{"text": "\\ud800"}')
    with pytest.raises(DataError, match="lone surrogate") as raised:
        read_corpus(os.fsdecode(path))
    assert str(raised.value).isprintable()
    assert str(raised.value).encode()


def test_a_file_of_any_name_can_be_trained_on(tmp_path) -> None:
    """Its name goes into files of JSON, and comes back."""
    content = {"text": os.fsdecode(b"caf\xe9.txt")}
    write_json(tmp_path / "config.json", content)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == content
