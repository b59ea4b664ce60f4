"""What the rows of benchmarks are written over."""

from pathlib import Path

import pytest

from benchmarks.rows import Writer


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("content", ["mine", '["command"]\n', '{"text": "mine"}\n', "[" * 100_000, "\n"])
def test_a_file_that_holds_something_else_is_refused(content: str, keep: bool, tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text(content)
    with pytest.raises(SystemExit, match="a new file, or rows of a benchmark, is wanted: choose another name"):
        Writer(file, keep=keep)
    assert file.read_text() == content


def test_rows_are_written_anew_or_behind_those_that_are_there(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.jsonl"
    for keep, lines in ((False, 1), (True, 2), (False, 1)):
        Writer(file, keep=keep)({"command": "python -m benchmarks.x"})
        assert file.read_text().count("\n") == lines
    file.write_text("")
    Writer(file)({"command": "python -m benchmarks.x"})
