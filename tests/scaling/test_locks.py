"""A comparison that somebody has is refused; a ladder passes over such a run, says who has it, and wants true locks."""

import errno
import fcntl
import json
import os
import queue
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from support.small_comparison import write_shape, write_text
from support.small_ladder import small

from diffattn.cli.main import main
from diffattn.errors import ConfigError
from diffattn.scaling.ladder import run_ladder
from diffattn.scaling.options import WorkOptions
from diffattn.scaling.rows import read_rows
from diffattn.scaling.runs import LadderProgress, Missing
from diffattn.sealed import append_row
from diffattn.study.compare import compare
from diffattn.study.options import CompareOptions
from diffattn.train import lock
from diffattn.train.lock import InUseError, check_locks, held

Result = TypeVar("Result")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The text's alone: the compiled kernel's stays where it is.
    monkeypatch.setattr("diffattn.cache.cache_folder", lambda: tmp_path / "cache")


def elsewhere(function: Callable[[], Result]) -> Result:
    """What another thread gets, which shares no lock with this one, as another process does not."""
    found: list[Result] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def me() -> str:
    """This process, as a lock names it."""
    return f"process {os.getpid()} on {socket.gethostname()}"


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


def test_a_ladder_takes_the_runs_that_nobody_has_and_names_the_others(tmp_path: Path) -> None:
    write_text(tmp_path)
    ladder = small(tmp_path, sizes=("7k",), seeds=1, variants=("softmax", "diff_v1"))
    out = tmp_path / "out"
    found: list[list[str]] = []
    missing: list[Missing] = []

    def second() -> list[str]:
        return [row.arm for row in run_ladder(ladder, out=out, on_missing=missing.extend)]

    def progress(at: LadderProgress) -> None:
        if at.step is not None and not found:
            found.append(elsewhere(second))

    rows = run_ladder(ladder, out=out, on_progress=progress)
    # While the first trained softmax, the second trained the other; neither was trained twice.
    assert found == [["diff_v1"]]
    assert [str(run) for run in missing] == [f"softmax-16x2-seed0-4-0.01 ({me()})"]
    assert [row.arm for row in rows] == ["softmax", "diff_v1"]
    assert len(read_rows(out / "rows.jsonl")) == 2
    (run,) = out.glob("softmax-*")
    with held(run):
        assert len(elsewhere(second)) == 2


def test_the_command_says_which_rows_are_missing_and_who_trains_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path)
    words = f"--tokens 64 --seeds 1 --vocab-size 300 --context 16 --batch-size 2 --text {tmp_path / 'text'} --json"
    rates = {"scale": "--sizes 7k --variants softmax diff_v1", "eval": "--size 7k --arms softmax diff_v1"}
    for verb, more in rates.items():
        out = tmp_path / verb
        out.mkdir()
        (out / "rows.jsonl").touch()
        folder = out / "softmax-16x2-seed0-2-0.01"
        folder.mkdir()
        command = f"{'scale run' if verb == 'scale' else 'eval ablation'} {words} {more} --out {out}".split()
        with held(folder):
            assert elsewhere(lambda command=command: main(command)) == 0  # type: ignore[misc]
        said = capsys.readouterr()
        assert f"no row yet: {folder.name}, which {me()} trains" in said.err.splitlines()
        assert "1 of 2 rows, call it again once the others are done, or wait by --wait" in said.err
        if verb == "scale":
            assert json.loads(said.out)["missing"] == [{"run": folder.name, "by": me()}]
            assert "fit them" not in said.err


def test_who_waits_has_all_rows_and_takes_over_what_another_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path)
    options, out = small(tmp_path, sizes=("7k",), seeds=1, variants=("softmax", "diff_v1")), tmp_path / "out"
    folder = out / "softmax-16x2-seed0-4-0.01"
    folder.mkdir(parents=True)
    (out / "rows.jsonl").touch()
    found: list[list[str]] = []
    stages: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr("diffattn.scaling.ladder._PATIENCE", 0.05)

    def wait() -> None:
        rows = run_ladder(options, out=out, work=WorkOptions(wait=True), on_stage=lambda at: stages.put(at.name))
        found.append([row.arm for row in rows])

    thread = threading.Thread(target=wait)
    with held(folder):
        thread.start()
        while not (name := stages.get(timeout=100)).startswith("waiting for"):
            assert not found
    # The other one has ended without its row.
    thread.join()
    assert name == f"waiting for 1 runs that others train, such as {folder.name} ({me()})"
    assert found == [["softmax", "diff_v1"]]


@pytest.mark.parametrize("kind", ["lockf", "flock"])
def test_a_ladder_is_refused_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, kind, refuse)
    with pytest.raises(ConfigError, match=rf"whose locks do not hold \({kind}: No locks available\); wanted") as caught:
        run_ladder(small(tmp_path), out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", ["lockf", "flock"])
def test_a_ladder_is_refused_where_a_second_process_gets_the_same_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As where each machine of a shared file system keeps its locks for itself: this one says yes to all."""
    monkeypatch.setattr(fcntl, kind, lambda *arguments: None)
    with pytest.raises(ConfigError, match=rf"do not hold \({kind}: a second process got a lock that was held\)"):
        run_ladder(small(tmp_path), out=tmp_path / "out")


def test_a_probe_of_locks_that_has_no_answer_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(lock, "_PATIENCE", 0.2)
    with pytest.raises(ConfigError, match=r"do not hold \(lockf: no answer within 0 s\)"):
        check_locks(tmp_path)
    monkeypatch.setattr(lock, "_PROBE", "import sys; sys.exit('Stale file handle')")
    with pytest.raises(ConfigError, match=r"do not hold \(lockf: Stale file handle\)"):
        check_locks(tmp_path)


def test_a_row_is_written_also_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    append_row(tmp_path / "rows.jsonl", {"a": 1})
    append_row(tmp_path / "rows.jsonl", {"a": 2})
    assert [json.loads(line)["a"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [1, 2]
