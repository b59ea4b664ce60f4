"""A run in a process of its own that is killed: from outside, or by itself at an exact point."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from support.small_run import prepare, run

from diffattn import files
from diffattn.train import callbacks, trainer
from diffattn.train import run as running
from diffattn.train.checkpoints import saving
from diffattn.train.recipe import Recipe


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in(owner: Any, name: str, call: int, act: Callable[..., object] = lambda *args, **kwargs: None) -> None:
    """Let the call of that number do something else, then kill the process."""
    original, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < call:
            return original(*args, **kwargs)
        act(*args, **kwargs)
        return kill()

    setattr(owner, name, counted)


def half_a_row(metrics: callbacks.MetricsFile, row: dict[str, Any]) -> None:
    metrics._stream.write('{"step": 7, "tokens": 8')
    metrics._stream.flush()


def half_a_file(tensors: dict[str, torch.Tensor], path: Path, header: dict[str, str]) -> None:
    assert path.parents[1].name.startswith("checkpoint-9.")
    whole = save(tensors, header)
    path.write_bytes(whole[: len(whole) // 2])


def half_a_folder(folder: Path, keep: int) -> None:
    (folder / "checkpoint-3" / "state.json").unlink()


def without_result(path: Path, content: object) -> None:
    assert path.name == "result.json"


# Each call is chosen to fall into the second half of the run, behind good checkpoints, or to its end.
POINTS: dict[str, Callable[[], None]] = {
    "before the first file appears": lambda: kill_in(os, "replace", 1),
    "before the first row": lambda: kill_in(callbacks.MetricsFile, "append", 1),
    "half a row written": lambda: kill_in(callbacks.MetricsFile, "append", 8, half_a_row),
    "before a held-out loss": lambda: kill_in(callbacks.RunCallback, "on_evaluate", 2),
    "between a held-out loss and its checkpoint": lambda: kill_in(trainer.RunTrainer, "_save_checkpoint", 4),
    "half of the tensors written": lambda: kill_in(saving, "save_file", 3, half_a_file),
    "before the manifest": lambda: kill_in(saving, "seal", 3),
    "before the files are flushed": lambda: kill_in(files, "sync", 23),
    "before the older checkpoints go": lambda: kill_in(saving, "prune", 3),
    "an older checkpoint half gone": lambda: kill_in(saving, "prune", 3, half_a_folder),
    "before the last held-out loss": lambda: kill_in(callbacks.RunCallback, "on_evaluate", 4),
    "behind the last held-out loss": lambda: kill_in(running, "_finish", 1),
    "between the model and the result": lambda: kill_in(running, "write_json", 2, without_result),
}


def run_until(point: str, text: Path, out: Path, recipe: Recipe) -> None:
    torch.set_num_threads(1)
    POINTS[point]()
    run(prepare(text), out, recipe, resume=True)


def run_slowly(text: Path, out: Path, recipe: Recipe, pause: float = 0.0) -> None:
    """Until a signal comes."""
    torch.set_num_threads(1)
    run(prepare(text), out, recipe, resume=True, on_progress=lambda progress: time.sleep(pause))
