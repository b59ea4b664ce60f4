"""Ctrl-C and SIGTERM: the run ends at once, keeps every step that it made, and resumes to the last bit."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.small_run import RECIPE, assert_same_run, at, checkpoint_steps, rows, run

from diffattn.data.packing import PreparedData
from diffattn.train import run as running
from diffattn.train.callbacks import Interruption, RunCallback, read_metrics
from diffattn.train.checkpoints import saving
from diffattn.train.checkpoints.saving import Saver
from diffattn.train.checkpoints.sealing import defect


def signal_in(owner: Any, name: str, call: int, number: int = signal.SIGINT) -> Callable[[pytest.MonkeyPatch], None]:
    """At the start of the call of that number, the signal arrives."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        original, calls = getattr(owner, name), 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                signal.raise_signal(number)
            return original(*args, **kwargs)

        patch.setattr(owner, name, counted)

    return apply


# What is interrupted, and the last step that was made.
MOMENTS = {
    "before the first step": (signal_in(RunCallback, "on_step_begin", 1), 0),
    "between two steps": (signal_in(RunCallback, "on_step_begin", 6), 5),
    "before an optimizer step": (signal_in(RunCallback, "on_pre_optimizer_step", 6), 5),
    "in an optimizer step": (signal_in(RunCallback, "on_optimizer_step", 6), 6),
    "behind an optimizer step": (signal_in(RunCallback, "on_step_end", 7), 7),
    "as a row is written": (signal_in(RunCallback, "on_log", 3), 3),
    "in an evaluation": (signal_in(RunCallback, "on_prediction_step", 2), 8),
    "as a held-out loss is written": (signal_in(RunCallback, "on_evaluate", 2), 8),
    "as a checkpoint is begun": (signal_in(Saver, "save", 2), 6),
    "in the last step": (signal_in(RunCallback, "on_step_end", 11), 11),
    "in the last evaluation": (signal_in(RunCallback, "on_evaluate", 4), 11),
    "SIGTERM between two steps": (signal_in(RunCallback, "on_step_begin", 6, signal.SIGTERM), 5),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_every_step_that_was_made_is_kept(
    moment: str, data: PreparedData, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, step = MOMENTS[moment]
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        apply(patch)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == list(range(1, step + 1))
    assert not (tmp_path / "result.json").exists()
    if step:
        newest = checkpoint_steps(tmp_path)[-1]
        assert newest == step
        assert defect(tmp_path / f"checkpoint-{newest}") is None
    seen: list[int] = []
    run(data, tmp_path, resume=True, on_progress=lambda progress: seen.append(progress.step))
    assert seen == list(range(step + 1, RECIPE.steps + 1))
    assert_same_run(tmp_path, whole)


def test_an_interruption_in_resuming_and_in_the_step_that_is_shown(
    data: PreparedData, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path, on_progress=at(4, lambda: signal.raise_signal(signal.SIGINT)))
    assert checkpoint_steps(tmp_path) == [3, 4]
    # Step 4 was to be evaluated: resuming makes up for it, and is interrupted there.
    with monkeypatch.context() as patch:
        signal_in(RunCallback, "on_evaluate", 1)(patch)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path, resume=True)
    assert checkpoint_steps(tmp_path) == [3, 4]
    run(data, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_a_checkpoint_that_is_being_written_at_an_interruption_is_completed(
    data: PreparedData, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps go on while it is written, so that the one of step 3 is not there yet in step 5."""
    interrupted, original = threading.Event(), saving.seal

    def slowly(*args: Any) -> None:
        assert interrupted.wait(60)
        original(*args)

    def interrupt() -> None:
        assert checkpoint_steps(tmp_path) == []
        interrupted.set()
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "seal", slowly)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path, on_progress=at(5, interrupt))
    assert checkpoint_steps(tmp_path) == [3, 5]
    run(data, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_an_interruption_while_the_result_is_written_comes_after_it(
    data: PreparedData, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a comparison would go on with the next run as if nobody had asked it to stop."""
    signal_in(running, "_finish", 1)(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_shield_holds_a_signal_back_until_it_is_lowered() -> None:
    with Interruption() as interruption:
        interruption.shield()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interruption.lower()
        interruption.lower()


def test_ctrl_c_ends_a_process_in_two_seconds(text: Path, data: PreparedData, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, steps=40, evaluations=2, checkpoints=2)
    tests, folder = Path(__file__).parents[1], tmp_path / "run"
    script = (
        "from pathlib import Path\n"
        "from support.killed_run import run_slowly\n"
        "from support.small_run import *\n"
        f"run_slowly(Path({str(text)!r}), Path({str(folder)!r}), Recipe(**{recipe.to_dict()!r}), pause=0.1)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 60
    while not any(row["step"] == 5 for row in read_metrics(folder / "metrics.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    took = time.monotonic() - sent
    assert took < 2.0
    assert process.returncode != 0
    assert errors.rstrip().endswith("KeyboardInterrupt")
    kept = checkpoint_steps(folder)
    assert kept == [len([row for row in rows(folder) if "loss" in row])]
    run(data, folder, recipe, resume=True)
    run(data, tmp_path / "whole", recipe)
    assert_same_run(folder, tmp_path / "whole")
