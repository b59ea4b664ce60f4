"""One process to a run folder: the second is refused while the first lives, and a dead one holds nothing."""

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from support.small_run import assert_same_run, at, run

from diffattn.data.packing import PreparedData
from diffattn.errors import ConfigError
from diffattn.files import LOCK, NO_LOCKS
from diffattn.train.lock import InUseError, held

# Holds a folder's lock, says so, and waits for the end of its input.
HOLDER = """
import sys
from pathlib import Path
from diffattn.train.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Callable[[], subprocess.Popen[str]]:
    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    return start


def test_a_second_process_is_refused_while_the_first_lives_and_not_after(
    holder: Callable[[], subprocess.Popen[str]], data: PreparedData, whole: Path, tmp_path: Path
) -> None:
    first = holder()
    with pytest.raises(InUseError) as raised:
        run(data, tmp_path, resume=True)
    line = str(raised.value)
    assert line.startswith(f"{tmp_path} is being trained by process {first.pid} on {os.uname().nodename}; wanted")
    assert "\n" not in line
    assert "--out" in line
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    # What it left behind locks nothing.
    assert (tmp_path / LOCK).exists()
    run(data, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)
    assert not (tmp_path / LOCK).exists()


def test_the_lock_is_held_while_a_run_trains_and_its_steps_may_ask_again(data: PreparedData, tmp_path: Path) -> None:
    said: list[BaseException] = []

    def ask() -> None:
        try:
            with held(tmp_path):
                pass
        except BaseException as error:
            said.append(error)

    def elsewhere() -> None:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    run(data, tmp_path, on_progress=at(2, ask))
    assert said == []
    with held(tmp_path):
        elsewhere()
    assert len(said) == 1
    assert isinstance(said[0], InUseError)
    assert f"process {os.getpid()} on" in str(said[0])


def _try(folder: Path, answer: Connection) -> None:
    try:
        with held(folder):
            answer.send("had it")
    except InUseError as error:
        answer.send(str(error))


def test_a_forked_process_has_not_what_its_parent_has(tmp_path: Path) -> None:
    """It inherits the table of locks, but no lock."""
    ours, theirs = multiprocessing.Pipe()
    with held(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=_try, args=(tmp_path, theirs))
        child.start()
        assert f"process {os.getpid()} on" in ours.recv()
        child.join()
    child = multiprocessing.get_context("fork").Process(target=_try, args=(tmp_path, theirs))
    child.start()
    assert ours.recv() == "had it"
    child.join()


def test_a_lock_file_without_a_name_in_it(holder: Callable[[], subprocess.Popen[str]], tmp_path: Path) -> None:
    first = holder()
    (tmp_path / LOCK).write_bytes(b"\xff\x00")
    with pytest.raises(InUseError, match="is being trained by another process; wanted"), held(tmp_path):
        pass
    first.communicate("")


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(NO_LOCKS[0], "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with held(tmp_path):
        pass
    assert capsys.readouterr().err == (
        f"{tmp_path}: its file system has no locks, so take care that nobody else trains in it\n"
    )


def test_a_lock_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    words = rf"cannot write {tmp_path / LOCK} \(Is a directory\); wanted a folder that can be written: make it writable"
    with pytest.raises(ConfigError, match=words), held(tmp_path):
        pass


def test_a_lock_that_was_let_go_while_it_was_asked_for_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file was removed in between, so that a third process would lock another one of that name."""
    original, calls = fcntl.lockf, []

    def lockf(file: object, how: int) -> None:
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        original(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with held(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
