"""The files of the benchmark of reading hold what they should, so that its rates are of text that was read."""

from pathlib import Path

import pytest

from benchmarks.read_text import FORMATS, read, texts


@pytest.mark.parametrize("name", FORMATS)
def test_each_file_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    written = list(texts(0.3))
    FORMATS[name](tmp_path / name, iter(written))
    found = read(tmp_path / name)
    ends = len(written) if name == "documents.txt" else 0
    assert found["characters"] == sum(map(len, written)) + ends
    assert found["documents"] == (1 if name == "one.txt" else len(written))
    assert found["megabytes_per_cpu_second"] > 0
