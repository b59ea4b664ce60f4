"""A comparison that somebody has is refused, and a ladder passes over a run that somebody has."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from support.small_comparison import write_shape, write_text

from diffattn.scaling.ladder import LadderProgress, read_rows, run_ladder
from diffattn.scaling.options import LadderOptions
from diffattn.study.compare import compare
from diffattn.study.options import CompareOptions
from diffattn.train.lock import InUseError, held

Result = TypeVar("Result")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The text's alone: the compiled kernel's stays where it is.
    monkeypatch.setattr("diffattn.data.packing.cache_folder", lambda: tmp_path / "cache")


def elsewhere(function: Callable[[], Result]) -> Result:
    """What another thread gets, which shares no lock with this one, as another process does not."""
    found: list[Result] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_a_comparison_is_one_processes(tmp_path: Path) -> None:
    options = CompareOptions(
        shape=write_shape(tmp_path), text=write_text(tmp_path), steps=2, seeds=1, variants=("softmax",), dtype="float32"
    )

    def second() -> str:
        with pytest.raises(InUseError) as raised:
            compare(None, out=tmp_path / "out", resume=True)
        return str(raised.value)

    said: list[str] = []
    compare(options, out=tmp_path / "out", on_progress=lambda *progress: said.append(elsewhere(second)))
    assert len(said) == 2
    assert all(line.startswith(f"{tmp_path / 'out'} is being trained by process ") for line in said)
    assert compare(None, out=tmp_path / "out", resume=True).variants


def test_a_ladder_takes_the_runs_that_nobody_has(tmp_path: Path) -> None:
    write_text(tmp_path)
    ladder = LadderOptions(
        sizes=("7k",), tokens="64", seeds=1, variants=("softmax", "diff_v1"), text=str(tmp_path / "text"),
        vocab_size=300, context=16, batch_size=2, dtype="float32", device="cpu",
    )  # fmt: skip
    out = tmp_path / "out"
    found: list[list[str]] = []

    def second() -> list[str]:
        return [row.arm for row in run_ladder(ladder, out=out)]

    def progress(at: LadderProgress) -> None:
        if at.step is not None and not found:
            found.append(elsewhere(second))

    rows = run_ladder(ladder, out=out, on_progress=progress)
    # While the first trained softmax, the second trained the other; neither was trained twice.
    assert found == [["diff_v1"]]
    assert [row.arm for row in rows] == ["softmax", "diff_v1"]
    assert len(read_rows(out / "rows.jsonl")) == 2
    (run,) = out.glob("softmax-*")
    with held(run):
        assert len(elsewhere(second)) == 2
