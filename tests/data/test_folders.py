"""A folder of text: what is read, under which names, and what is said of the rest."""

import json
import os

import pytest

from diffattn.data.text import read_corpus
from diffattn.errors import DataError


@pytest.fixture
def folder(tmp_path):
    """As people have them: capitals, links, hidden, dangling, empty, other kinds."""
    inside = tmp_path / "folder"
    for name in ("A.TXT", "b.txt", "inner/c.Md", "inner/d.txt.gz"):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).write_bytes(b"text of " + name.encode() if not name.endswith("gz") else _packed())
    return inside


def _packed() -> bytes:
    import gzip

    return gzip.compress(b"text of d")


def _read(folder):
    notes: list[str] = []
    corpus = read_corpus(folder, on_note=notes.append)
    assert all(note.isprintable() for note in notes)
    return [document.name for document in corpus.documents], notes


def test_nothing_is_said_where_all_is_read(folder) -> None:
    assert _read(folder) == (["A.TXT", "b.txt", "inner/c.Md", "inner/d.txt.gz"], [])


def test_linked_folders_are_read_once_and_loops_end(folder, tmp_path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "e.txt").write_text("text of e")
    (other / "back").symlink_to(folder)
    (folder / "0link").symlink_to(other)
    (folder / "again").symlink_to(other)
    (folder / "0inner").symlink_to(folder / "inner")
    (folder / "up").symlink_to("..")
    (folder / "itself").symlink_to(".")
    names, (note,) = _read(folder)
    # What is there without links keeps its name, so that the digest of the text does, too.
    assert names == ["0link/e.txt", "A.TXT", "b.txt", "inner/c.Md", "inner/d.txt.gz"]
    assert "5 files read" in note
    assert "links to folders that are read anyway or lie above: 5" in note


def test_what_is_left_out_is_counted_with_its_reason(folder) -> None:
    (folder / ".hidden.txt").write_text("hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "a.txt").write_text("hidden")
    (folder / "empty.txt").touch()
    (folder / "nowhere.txt").symlink_to("absent.txt")
    (folder / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(folder / "pipe.txt")
    for name in ("a.png", "b.png", "c.py", "Makefile"):
        (folder / name).write_text("other")
    (folder / "package.json").write_text('{"name": "x"}')
    (folder / "table.csv").write_text("a,b\n1,2\n")
    names, (note,) = _read(folder)
    assert names == ["A.TXT", "b.txt", "inner/c.Md", "inner/d.txt.gz"]
    for words in (
        "4 files read", "hidden: 2", "empty: 1", "links that lead nowhere: 2", "pipes and the like: 1",
        "of other kinds (.png, .py, no ending): 4", "without a field 'text': 2",
    ):  # fmt: skip
        assert words in note


def test_a_file_that_is_linked_is_read(folder, tmp_path) -> None:
    (tmp_path / "out.txt").write_text("text of out")
    (folder / "link.txt").symlink_to(tmp_path / "out.txt")
    assert "link.txt" in _read(folder)[0]


def test_tables_and_rows_in_a_folder(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("text,n\none,1\n")
    (tmp_path / "b.json").write_text(json.dumps([{"text": "two"}]))
    (tmp_path / "c.NDJSON").write_text(json.dumps({"text": "three"}))
    assert _read(tmp_path) == (["a.csv", "b.json", "c.NDJSON"], [])


def test_a_folder_of_tables_without_the_field_names_what_there_is(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("content,n\none,1\n")
    with pytest.raises(DataError, match="wanted one of content, n: name the column with --field"):
        read_corpus(tmp_path)
    # Of rows that are made to hold text it is an error, whatever stands beside them.
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "c.jsonl").write_text('{"content": "one"}')
    with pytest.raises(DataError, match="--field"):
        read_corpus(tmp_path)


def test_a_text_file_in_a_folder_that_is_no_text_is_an_error(folder) -> None:
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match=r"binary\.txt: no text"):
        read_corpus(folder)


def test_a_folder_that_cannot_be_listed_is_an_error(folder, monkeypatch) -> None:
    scan = os.scandir

    def refused(path):
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"inner: cannot be read \(Permission denied\)"):
        read_corpus(folder)
