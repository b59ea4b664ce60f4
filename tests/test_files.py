"""Files that are whole or not there."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffattn.errors import ConfigError
from diffattn.files import writable_folder


def test_many_at_once_find_that_a_folder_can_be_written(tmp_path: Path) -> None:
    """The processes of one ladder start in the same moment; a file of one name was taken away by the first of them."""
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(writable_folder, [tmp_path / "out"] * 2000)) == {tmp_path / "out"}
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write to .*/file/out: Not a directory; choose another folder"):
        writable_folder(tmp_path / "file" / "out")
