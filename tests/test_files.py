"""Files that are whole or not there."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffattn.errors import CheckpointError, ConfigError
from diffattn.files import read_object, writable_folder


def test_many_at_once_find_that_a_folder_can_be_written(tmp_path: Path) -> None:
    """The processes of one ladder start in the same moment; a file of one name was taken away by the first of them."""
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(writable_folder, [tmp_path / "out"] * 2000)) == {tmp_path / "out"}
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write to .*/file/out: Not a directory; choose another folder"):
        writable_folder(tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it says: Expecting value"),
        (b"\xff\xfe{}", "it says: "),
        (b"[" * 100_000, "it says: it is nested too deeply"),
        (b'{"a": ' * 100_000, "it says: it is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "it says: Exceeds the limit"),
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
