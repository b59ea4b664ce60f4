"""Text is read in blocks, pieces and batches: where these end is seen by nobody, and they are all that is in memory."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffattn.data import documents, formats, rows, sources, streams
from diffattn.data.documents import documents_of
from diffattn.data.text import open_text, read_corpus, text_digest
from diffattn.errors import DataError

BITS = [
    "<|endoftext|>",
    "\f",
    "\n",
    "\r\n",
    "\r",
    "a",
    "é",
    "漢",
    "🦁",
    "\n<|endoftext|>\n",
    "\n\f\r\n",
    "<|endof",
    "\ufeff",
]
TEXTS = st.lists(st.sampled_from(BITS), max_size=30).map("".join)
# As the documentation says it: lines that hold only a separator.
SEPARATORS = re.compile(r"(?m)^(?:<\|endoftext\|>|\f)\r?(?:\n|\Z)")


@pytest.fixture
def small(monkeypatch):
    """Sets the sizes of blocks, pieces and values that are held."""

    def set_sizes(chunk: int, piece: int = 8, whole: int = 2**24) -> None:
        monkeypatch.setattr(streams, "_CHUNK", chunk)
        monkeypatch.setattr(formats, "_WHOLE", whole)
        for module in (documents, formats, sources):
            monkeypatch.setattr(module, "PIECE", piece)

    return set_sizes


def _error(path) -> str:
    with pytest.raises(DataError) as raised:
        for _ in open_text(path).pieces():
            pass
    return str(raised.value)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("text") / "a.txt"


@given(TEXTS)
def test_a_separator_is_found_across_the_borders_of_blocks(file, text: str) -> None:
    file.write_bytes(("x\n" + text).encode())
    expected = [(number, part) for number, part in enumerate(SEPARATORS.split("x\n" + text)) if part.strip()]
    for chunk, piece in ((1, 3), (5, 2), (64, 50)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(streams, "_CHUNK", chunk)
            patch.setattr(formats, "PIECE", piece)
            found = list(open_text(file).pieces())
        assert all(len(each.text) <= piece for each in found)
        assert [(each.name, each.text) for each in documents_of(found)] == [
            (f"a.txt#{number}" if number else "a.txt", part) for number, part in expected
        ]


@given(TEXTS)
@settings(max_examples=50)
def test_a_table_has_the_lines_that_csv_sees(text: str) -> None:
    for chunk in (1, 3, 64):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(streams, "_CHUNK", chunk)
            found = streams.Characters("a", streams.Bytes(io.BytesIO(text.encode()).read))
            assert list(found.table_lines()) == list(io.StringIO(text.removeprefix("\ufeff"), newline=""))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_rows_are_whole_whatever_the_blocks(tmp_path, small, pack, chunk: int) -> None:
    texts = ["one", "two\nlines é", "漢" * 30, "🦁"]
    table = io.StringIO()
    csv.writer(table).writerows([["n", "text"], *enumerate(texts)])
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    expected = [
        document.text for document in read_corpus(_written(tmp_path / "a.jsonl", "\n".join(lines), bytes)).documents
    ]
    assert expected == texts
    small(chunk, whole=10)
    for name, content in (
        ("a.jsonl", "\n".join(lines)), ("a.csv", table.getvalue()), ("a.json", f"[{', '.join(lines)}]\n"),
        ("b.json", "\n".join(lines)), ("c.txt", "[" + ",\n".join(lines) + "]"), ("d", "\n".join(lines)),
    ):  # fmt: skip
        read = list(open_text(_written(tmp_path / name, content, pack)).pieces())
        assert [document.text for document in documents_of(read)] == texts
        assert max(len(piece.text) for piece in read) == 8


def _written(path, content: str, pack):
    path.write_bytes(pack(content.encode()))
    return path


def test_a_digest_is_the_same_in_pieces_and_whole(tmp_path, small) -> None:
    (tmp_path / "a.txt").write_text("word " * 99 + "\n\f\n \n\f\n" + "é" * 50)
    (tmp_path / "b.jsonl").write_text('{"text": "row"}\n{"messages": [{"role": "user", "content": "a long question"}]}')
    whole = read_corpus(tmp_path)
    small(7)
    pieces = list(open_text(tmp_path).pieces())
    # A conversation is never parted.
    assert [piece.text for piece in pieces if piece.chat] == ["user: a long question"]
    assert len(pieces) > len(whole.documents) == 4
    assert text_digest(open_text(tmp_path)) == read_corpus(tmp_path).digest == whole.digest


def test_a_long_document_that_begins_with_blanks_is_whole_and_a_blank_one_is_none(tmp_path, small) -> None:
    small(4)
    (tmp_path / "a.txt").write_text(" " * 30 + "text" + " " * 30)
    (tmp_path / "b.txt").write_text(" " * 30)
    assert [document.text for document in documents_of(open_text(tmp_path).pieces())] == [" " * 30 + "text" + " " * 30]
    assert "no text in it" in _error(tmp_path / "b.txt")


def _plain(count: int) -> str:
    return "word " * (200 * count)


def _documents(count: int) -> str:
    return ("word " * 19 + "\n\f\n") * (10 * count)


def _jsonl(count: int) -> str:
    return (json.dumps({"text": "word " * 19}) + "\n") * (10 * count)


def _json(count: int) -> str:
    return "[" + ", ".join([json.dumps({"text": "word " * 19})] * (10 * count)) + "]"


def _csv(count: int) -> str:
    return "text,n\n" + ("word " * 19 + ",1\n") * (10 * count)


@pytest.mark.parametrize(
    ("name", "content", "pack"),
    [
        ("a.txt", _plain, bytes),
        ("b.txt", _documents, bytes),
        ("a.jsonl", _jsonl, bytes),
        ("a.json", _json, bytes),
        ("a.csv", _csv, bytes),
        ("a.txt.gz", _plain, gzip.compress),
        ("a.txt.xz", _plain, lzma.compress),
        ("a.txt.bz2", _plain, bz2.compress),
        ("a.jsonl.zst", _jsonl, lambda data: pyarrow.compress(data, "zstd", asbytes=True)),
    ],
)
def test_memory_does_not_grow_with_the_text(tmp_path, small, name: str, content, pack) -> None:
    small(2**14, piece=2**15, whole=2**15)
    peaks = []
    for count in (200, 1200):
        path = _written(tmp_path / name, content(count), pack)
        size = 0
        tracemalloc.start()
        for piece in open_text(path).pieces():
            size += len(piece.text)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert size > 900 * count
    assert peaks[1] < peaks[0] + 100_000


def test_parquet_is_read_in_batches(tmp_path, monkeypatch) -> None:
    texts = [f"row {number} " + "é" * (number % 50) for number in range(300)]
    pyarrow.parquet.write_table(
        pyarrow.table({"n": range(300), "text": texts}), tmp_path / "a.parquet", row_group_size=70
    )
    monkeypatch.setattr(rows, "_BATCH", 1000)
    assert [document.text for document in read_corpus(tmp_path / "a.parquet").documents] == texts
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert [document.text for document in read_corpus(tmp_path / "a.parquet.gz").documents] == texts


def test_parquet_is_not_read_by_row_groups(tmp_path) -> None:
    class Watched(io.FileIO):
        largest = 0

        def read(self, size: int = -1) -> bytes:
            data = super().read(size)
            self.largest = max(self.largest, len(data))
            return data

    texts = [hashlib.sha512(bytes([number])).hexdigest() * 200 for number in range(256)]
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 16}
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", **options)
    with Watched(tmp_path / "a.parquet") as file:
        assert [row.text for row in rows.parquet_rows("a", file, "text")] == texts
        assert file.largest < 2_200_000 < (tmp_path / "a.parquet").stat().st_size


def test_parquet_that_holds_no_utf8_is_one_line(tmp_path) -> None:
    wrong = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": wrong}), tmp_path / "a.parquet")
    assert "a.parquet: cannot be read as Parquet ('utf-8' codec can't decode byte 0xe9" in _error(
        tmp_path / "a.parquet"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"text": "one"}, {"text": "tw', "row 2 is not JSON"),
        ('[{"text": "one"}, {"text": "two"}', "row 2 is not JSON (the file ends before the array does)"),
        ('[{"text": "one"} {"text": "two"}]', "row 2 is not JSON ('{' in place of ',')"),
        ('[{"text": "one"}]\n[{"text": "two"}]', "there is more text behind the array of 1 rows"),
        ('[{"text": "one"}, 5, {"text": "two"}]', "row 2 has no text in field 'text'"),
        ('[{"text": "one"}, ' + "[" * 20_000, "row 2 is not JSON (it is nested too deeply)"),
        ('{"rows": [{"text": "one"}, {"text": "two"}], \n"n": 1}', "write its rows into a .jsonl file"),
    ],
)
def test_a_long_json_file_that_is_damaged_is_one_line(tmp_path, small, content: str, words: str) -> None:
    small(5, whole=8)
    (tmp_path / "a.json").write_text(content)
    line = _error(tmp_path / "a.json")
    assert words in line
    assert "\n" not in line


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_that_no_memory_holds_is_named(tmp_path, small, monkeypatch, name: str) -> None:
    small(16)
    monkeypatch.setattr(streams, "LONGEST", 6000)
    first = '{"text": "fine"}\n{"text": "' if name == "a.jsonl" else "text\n"
    (tmp_path / name).write_text(first + "a" * 10_000)
    assert "line 2 has more than 6,000 characters; wanted shorter rows: write that text into a .txt" in _error(
        tmp_path / name
    )


def test_the_position_of_a_wrong_byte_is_that_of_the_file(tmp_path, small) -> None:
    content = "é漢🦁\n".encode() * 50
    (tmp_path / "a.txt").write_bytes(content + "café".encode("latin1") + content)
    for chunk in (1, 7, 64, 10_000):
        small(chunk)
        line = _error(tmp_path / "a.txt")
        assert f"not UTF-8 at byte {len(content) + 3} (0xe9); wanted text in UTF-8: convert it first" in line
    (tmp_path / "a.txt").write_bytes(content + "🦁".encode()[:2])
    assert f"not UTF-8 at byte {len(content)} (0xf0)" in _error(tmp_path / "a.txt")
