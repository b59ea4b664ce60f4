"""A run that is killed with SIGKILL and resumed gives to the last bit what a run gives that nothing cut."""

import dataclasses
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from support.killed_run import POINTS, run_slowly, run_until
from support.small_run import RECIPE, assert_same_run, rows, run

from diffattn.data.packing import PreparedData

LONG = dataclasses.replace(RECIPE, steps=60, evaluations=13, checkpoints=25)


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that are forked from one that has imported what they need, and has trained nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.killed_run"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        # That process looks for the modules before it is told this one's path.
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        start(context, str, "").join()
    return context


def start(context: ForkServerContext, function: Callable[..., object], *arguments: object) -> BaseProcess:
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def wait_until(what: Callable[[], bool], process: BaseProcess) -> None:
    end = time.monotonic() + 60
    while not what():
        assert process.is_alive(), f"the run ended by itself: {process.exitcode}"
        assert time.monotonic() < end


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


def kill_at_a_random_moment(process: BaseProcess, folder: Path, draw: random.Random) -> None:
    start = len(rows(folder))
    wait_until(lambda: len(rows(folder)) >= start + 4, process)
    time.sleep(draw.uniform(0, 0.1))
    kill(process)


def kill_while_a_checkpoint_is_written(process: BaseProcess, folder: Path) -> None:
    """Stop the process as soon as the folder is seen; where it was completed in between, look for the next."""

    def half_written() -> bool:
        return any(name.startswith("checkpoint-") for name in partials_at_top(folder))

    while True:
        wait_until(half_written, process)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.01)
        if half_written():
            break
        os.kill(process.pid, signal.SIGCONT)
    kill(process)
    assert half_written()


def partials_at_top(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".partial")] if folder.exists() else []


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(
    processes: ForkServerContext, text: Path, data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, draw = tmp_path / "killed", random.Random()
    for number in range(6):
        process = start(processes, run_slowly, text, folder, LONG)
        if number % 2:
            kill_while_a_checkpoint_is_written(process, folder)
        else:
            kill_at_a_random_moment(process, folder, draw)
    assert not (folder / "result.json").exists()
    run(data, folder, LONG, resume=True)
    assert ".partial: the run ended while it was being written" in capsys.readouterr().err
    run(data, tmp_path / "whole", LONG)
    assert_same_run(folder, tmp_path / "whole")
    steps = [row["step"] for row in rows(folder) if "loss" in row]
    assert steps == list(range(1, LONG.steps + 1))


@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_at_a_point_and_resumed_ends_as_if_it_had_not_been(
    point: str, processes: ForkServerContext, text: Path, data: PreparedData, whole: Path, tmp_path: Path
) -> None:
    process = start(processes, run_until, point, text, tmp_path, RECIPE)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "result.json").exists()
    run(data, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    "points",
    [
        ("half a row written", "before the first row"),
        ("half a row written", "before the first file appears", "half a row written"),
        ("before the last held-out loss", "behind the last held-out loss"),
        ("behind the last held-out loss", "behind the last held-out loss"),
    ],
)
def test_a_run_killed_in_resuming_too(
    points: tuple[str, ...], processes: ForkServerContext, text: Path, data: PreparedData, whole: Path, tmp_path: Path
) -> None:
    for point in points:
        process = start(processes, run_until, point, text, tmp_path, RECIPE)
        process.join(60)
    assert not (tmp_path / "result.json").exists()
    run(data, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)
