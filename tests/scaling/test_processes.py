"""A ladder in several processes: each run trained once, one report of all, and an end that leaves nobody behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_comparison import write_text
from support.small_ladder import small

from diffattn.errors import ConfigError, DataError, TrainingError, error_from_json, error_to_json
from diffattn.scaling import messages, processes
from diffattn.scaling.ladder import run_ladder
from diffattn.scaling.options import LadderOptions, WorkOptions
from diffattn.scaling.rows import read_rows
from diffattn.scaling.runs import LadderProgress
from diffattn.train.callbacks import Progress
from diffattn.train.lock import InUseError


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_text(tmp_path)
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes that a ladder starts, none of which may outlive it."""
    found: list[subprocess.Popen[str]] = []
    original = subprocess.Popen

    def start(words: list[str], **options: Any) -> subprocess.Popen[str]:
        process = original(words, **options)
        if all(word in words for word in processes._WORKER):
            found.append(process)
        return process

    monkeypatch.setattr(processes.subprocess, "Popen", start)
    yield found
    assert all(process.poll() is not None for process in found)


def test_two_processes_train_each_run_once_to_the_losses_of_one(
    text: Path, started: list[subprocess.Popen[str]]
) -> None:
    options = small(text, sizes=("7k",), seeds=1)
    seen: list[LadderProgress] = []
    rows = run_ladder(options, out=text / "two", work=WorkOptions(processes=2), on_progress=seen.append)
    assert len(started) == 2
    assert sorted(row.arm for row in read_rows(text / "two/rows.jsonl")) == ["diff_v1", "diff_v2", "softmax"]
    begun = [(progress.arm, progress.seed) for progress in seen if progress.step is None]
    assert sorted(begun) == [("diff_v1", 0), ("diff_v2", 0), ("softmax", 0)]
    assert {progress.step.step for progress in seen if progress.step} == {1, 2, 3, 4}
    alone = run_ladder(options, out=text / "one")
    assert [row.val_loss for row in rows] == [row.val_loss for row in alone]
    # Nothing is left to do, so nobody is asked.
    assert run_ladder(options, out=text / "two", work=WorkOptions(processes=2)) == rows
    assert len(started) == 2


def test_ctrl_c_ends_all_processes_and_their_runs_go_on_from_their_steps(
    text: Path, started: list[subprocess.Popen[str]]
) -> None:
    options = small(text, sizes=("7k",), seeds=1, tokens="100000", variants=("softmax", "diff_v1"))
    training: set[str] = set()

    def stop(progress: LadderProgress) -> None:
        if progress.step is not None:
            training.add(progress.arm)
        if len(training) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            training.clear()

    with pytest.raises(KeyboardInterrupt):
        run_ladder(options, out=text / "out", work=WorkOptions(processes=2), on_progress=stop)
    assert [process.returncode for process in started] == [130, 130]
    assert not read_rows(text / "out/rows.jsonl")
    for folder in (text / "out").iterdir():
        rows = (folder / "metrics.jsonl").read_text().splitlines()
        assert (folder / f"checkpoint-{json.loads(rows[-1])['step']}").is_dir()


def play(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """Has processes that train nothing: the first to come does something, the other waits until it is stopped."""
    taken = "import json, os, sys; folder = json.loads(sys.stdin.readline())['folder']"
    script = f"""{taken}
try:
    os.mkdir(os.path.join(folder, "taken"))
except FileExistsError:
    import signal
    signal.signal(signal.SIGTERM, lambda *told: sys.exit(130))
    signal.pause()
{first}"""
    monkeypatch.setattr(processes, "_WORKER", ("-c", script))


def test_a_process_that_is_killed_is_one_line_and_ends_the_others(
    text: Path, monkeypatch: pytest.MonkeyPatch, started: list[subprocess.Popen[str]]
) -> None:
    play(monkeypatch, "os.kill(os.getpid(), 9)")
    with pytest.raises(TrainingError, match=r"process \d+ of --processes was killed by SIGKILL; wanted") as caught:
        run_ladder(small(text), out=text / "out", work=WorkOptions(processes=2))
    assert "\n" not in str(caught.value)
    assert {process.returncode for process in started} <= {-9, -15, 130}
    assert len(started) == 2


def test_an_error_of_one_process_is_one_line_and_ends_the_others(
    text: Path, monkeypatch: pytest.MonkeyPatch, started: list[subprocess.Popen[str]]
) -> None:
    error = error_to_json(TrainingError("the loss is nan", "a number", "lower it"))
    play(monkeypatch, f"print(json.dumps({ {'error': error} }), flush=True)")
    with pytest.raises(TrainingError, match=r"^the loss is nan; wanted a number: lower it$"):
        run_ladder(small(text), out=text / "out", work=WorkOptions(processes=2))
    assert len(started) == 2


def worker(options: LadderOptions, out: Path) -> subprocess.Popen[str]:
    """One process, which this one has started and told what to train."""
    process = subprocess.Popen(
        [sys.executable, *processes._WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    job = {"options": messages.options_to_json(options), "folder": str(out), "command": "test"}
    assert process.stdin is not None
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    return process


def test_an_error_in_a_process_is_told(text: Path) -> None:
    (text / "out").mkdir()
    (text / "out" / "rows.jsonl").write_text('{"attention": "softmax"}\n')
    with worker(small(text), text / "out") as process:
        assert process.stdout is not None
        error = error_from_json(json.loads(process.stdout.readline())["error"])
        assert process.wait(60) == 1
    assert isinstance(error, DataError)
    assert "rows.jsonl line 1 is damaged" in str(error)


def test_a_process_ends_with_its_caller(text: Path) -> None:
    with worker(small(text, sizes=("7k",), tokens="1M", variants=("softmax",)), text / "out") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert messages.progress_from_json(json.loads(process.stdout.readline())).step is None
        process.stdin.close()
        assert process.wait(60) == 130


@pytest.mark.parametrize(("threads", "count", "each"), [(8, 3, "2"), (1, 2, "1")])
def test_the_threads_are_shared_equally(
    text: Path, monkeypatch: pytest.MonkeyPatch, threads: int, count: int, each: str
) -> None:
    given: list[str] = []

    def start(job: str, environment: dict[str, str], said: object) -> object:
        given.append(environment["OMP_NUM_THREADS"])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(processes, "_Process", start)
    with pytest.raises(KeyboardInterrupt):
        run_ladder(small(text), out=text / "out", work=WorkOptions(processes=count))
    with pytest.raises(KeyboardInterrupt):
        run_ladder(small(text), out=text / "out", work=WorkOptions(processes=count, threads=5))
    assert given == [each, "5"]


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cards = [processes._environment(LadderOptions(), 1, number)["CUDA_VISIBLE_DEVICES"] for number in range(3)]
    assert cards == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    assert processes._environment(LadderOptions(), 1, 1)["CUDA_VISIBLE_DEVICES"] == "GPU-7"
    assert processes._environment(LadderOptions(device="cpu"), 1, 1)["CUDA_VISIBLE_DEVICES"] == "4,GPU-7"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"processes": 0}, "processes is 0; wanted a number from 1"),
        ({"threads": 5000}, "threads is 5000; wanted a number from 1 to 1,024"),
        ({"on": "slurm"}, "on is 'slurm'; wanted here or ray"),
        ({"on": "ray", "processes": 2}, "--processes 2 beside --on ray; wanted one of the two"),
        ({"on": "ray", "wait": True}, "--wait beside --on ray; wanted one of the two"),
        ({"gpus": 0.5}, "--gpus 0.5 without --on ray; wanted --on ray beside it"),
        ({"on": "ray", "gpus": 1.5}, "gpus is 1.5; wanted a share from 0 to 1, or a whole number"),
    ],
)
def test_bad_numbers_are_one_line(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        WorkOptions(**changes)


def test_what_processes_say_comes_back_as_it_was() -> None:
    step = Progress(1, 4, 3.5, 1000.0, 2.5)
    for progress in (LadderProgress("softmax", 7, 0, 1, 6, None), LadderProgress("softmax", 7, 0, 1, 6, 3.5, step)):
        assert messages.progress_from_json(json.loads(json.dumps(messages.progress_to_json(progress)))) == progress
    again: Callable[[Exception], Exception] = lambda error: error_from_json(  # noqa: E731
        json.loads(json.dumps(error_to_json(error)))
    )
    assert (type(again(TrainingError("a", "b", "c"))), str(again(TrainingError("a", "b", "c")))) == (
        TrainingError,
        "a; wanted b: c",
    )
    # A kind that only one room has is of the kind that it is made from.
    assert type(again(InUseError("a", "b", "c"))) is ConfigError
