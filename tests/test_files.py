"""Files that are whole or not there."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffattn.errors import CheckpointError, ConfigError
from diffattn.files import is_unfinished, read_object, unwritable, whole_folder, writable_folder, write_text


def test_many_at_once_find_that_a_folder_can_be_written(tmp_path: Path) -> None:
    """The processes of one ladder start in the same moment; a file of one name was taken away by the first of them."""
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(writable_folder, [tmp_path / "out"] * 2000)) == {tmp_path / "out"}
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError,
        match=r"cannot write to .*/file/out \(Not a directory\); wanted a folder that can",
    ):
        writable_folder(tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is no JSON (Expecting value"),
        (b"\xff\xfe{}", "it is no JSON ("),
        (b"[" * 100_000, "it is no JSON (it is nested too deeply)"),
        (b'{"a": ' * 100_000, "it is no JSON (it is nested too deeply)"),
        (b'{"a": ' + b"9" * 5000 + b"}", "it is no JSON (Exceeds the limit"),
        (b"[]", "it holds a list"),
        (b"null", "it holds a NoneType"),
    ],
    ids=["empty", "no UTF-8", "deep list", "deep object", "long number", "list", "null"],
)
def test_a_file_that_holds_no_json_object_is_one_line(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(says)) as caught:
        read_object(file, way_out="restore it")
    assert str(file) in str(caught.value)
    assert str(caught.value).endswith(": restore it")
    assert "\n" not in str(caught.value)


def test_a_whole_folder_takes_the_place_of_nothing_but_an_empty_one(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "a").write_text("mine")
    with pytest.raises(ConfigError, match="holds files that diffattn did not write"), whole_folder(full) as new:
        (new / "b").write_text("ours")
    assert [(path.name, path.read_text()) for path in full.iterdir()] == [("a", "mine")]
    with whole_folder(full, replaces=lambda folder: True) as new:
        (new / "b").write_text("ours")
    assert [path.name for path in full.iterdir()] == ["b"]
    # What a system puts into folders by itself makes none full, and stays; a link stays one.
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.DS_Store").write_text("of the system")
    (tmp_path / "link").symlink_to("empty")
    with whole_folder(tmp_path / "link") as new:
        (new / "b").write_text("ours")
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == [".DS_Store", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "link"]


WRITING = """
import os, sys
from pathlib import Path
from diffattn.files import whole_folder
with whole_folder(Path(sys.argv[1])) as new:
    (new / "half").touch()
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_or_a_person_has_is_not(tmp_path: Path) -> None:
    target, mine = tmp_path / "target", tmp_path / "target.old.partial"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    (tmp_path / "target.partial").write_text("mine too")
    runs = [
        subprocess.Popen([sys.executable, "-c", WRITING, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == b"writing\n"
    unfinished = [path for path in tmp_path.iterdir() if is_unfinished(path)]
    assert len(unfinished) == 2
    runs[0].kill()
    runs[0].communicate()
    write_text(target.with_name("other"), "of another name")
    assert all(path.exists() for path in unfinished)
    with whole_folder(target):
        assert sum(path.exists() for path in unfinished) == 1
    runs[1].communicate(timeout=30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "target", mine.name, "target.partial"]
    assert [path.name for path in target.iterdir()] == ["half"]
    assert (mine / "notes").read_text() == "mine"


def test_a_text_written_by_a_link_leaves_the_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("deep/target")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "deep/target").read_text() == "text"


def test_whether_a_folder_can_be_written_is_asked_without_making_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert unwritable(tmp_path / "a/b/c") is None
    assert unwritable(tmp_path / "file/a") == "Not a directory"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
