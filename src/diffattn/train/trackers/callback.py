"""Sends the rows of a run to TensorBoard, trackio and W&B by the callbacks of ``transformers``; none can end a run.

Their files lie in the run folder. A tracker that fails is left out from then on, with one line; ``metrics.jsonl`` has
every row anyway.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from diffattn.errors import ConfigError, one_line
from diffattn.names import one_of
from diffattn.train.callbacks import MetricsFile, MetricsRow, warn
from diffattn.train.options import NO_TRACKER, TRACKERS
from diffattn.train.trackers.programs import SHOWN, STARTS, finish_wandb


def check_trackers(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the trackers that are asked for, each by its whole name.

    Raises:
        ConfigError: an unknown name, a name twice, ``none`` beside another, or a package that is not installed.
    """
    found = tuple(one_of(name, TRACKERS, given=f"track holds {name!r}") for name in names)
    if len(set(found)) < len(found) or (NO_TRACKER in found and len(found) > 1):
        given = f"track is {' '.join(found)}"
        raise ConfigError(given, f"each tracker once, or {NO_TRACKER} alone", "change --track")
    found = tuple(name for name in found if name != NO_TRACKER)
    for name in found:
        if importlib.util.find_spec(name) is None:
            given = f"track holds {name}, and its package is not installed"
            raise ConfigError(given, f"the package {name}", f"pip install {name}, or leave it out of --track")
    return found


class Trackers(TrainerCallback):
    """Passes each row of a run's metrics on to its trackers, on the first rank alone; used as a context manager.

    Args:
        names: the trackers, as :func:`check_trackers` takes them.
        folder: the run folder.
        metrics: the file of metrics, whose new rows are passed on.

    Raises:
        ConfigError: as :func:`check_trackers` does.
    """

    def __init__(self, names: Sequence[str], folder: Path, metrics: MetricsFile) -> None:
        names = check_trackers(names)
        first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        self._waiting = names if first else ()
        self._folder = folder
        self._metrics = metrics
        self._sent = len(metrics.rows)
        self._open: dict[str, TrainerCallback] = {}
        self._event: tuple[Any, ...] = ()
        self._model: Any = None

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(failed=kind is not None)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pass_on(args, state, control, kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pass_on(args, state, control, kwargs)

    def _pass_on(self, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        """Passes the rows on that were written since."""
        self._event = (args, state, control)
        self._model = kwargs.get("model")
        while self._sent < len(self._metrics.rows):
            self._open_those_that_wait()
            logs = _logs(self._metrics.rows, self._sent)
            self._sent += 1
            for name, tracker in list(self._open.items()):
                with self._guarded(name):
                    tracker.on_log(*self._event, model=self._model, logs=dict(logs))

    def _open_those_that_wait(self) -> None:
        """Starts the trackers, as late as at the first row: a run that never begins leaves nothing in them."""
        waiting, self._waiting = self._waiting, ()
        for name in waiting:
            with self._guarded(name):
                tracker, where = STARTS[name](self._folder, self._metrics.rows[: self._sent])
                tracker.on_train_begin(*self._event, model=self._model)
                self._open[name] = tracker
            if name in self._open:
                warn(f"the metrics go to {name} too: {where}")

    def _close(self, *, failed: bool) -> None:
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                tracker.on_train_end(*self._event, model=self._model)
                if name == "wandb":
                    # Its callback leaves that to the end of the process.
                    finish_wandb(failed)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Leaves out a tracker that fails; inside ``with``, it prints nothing."""
        try:
            # What they print is none of our results and in other words than ours.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                yield
        except Exception as error:
            self._open.pop(name, None)
            reason = one_line(error, SHOWN)
            warn(f"{name} failed ({reason}); the run goes on without it, and metrics.jsonl has every row")


def _logs(rows: Sequence[MetricsRow], place: int) -> dict[str, float]:
    """Returns what trackers show of a row; ``transformers`` puts a name that begins with ``eval_`` under ``eval/``."""
    row = rows[place]
    if "val_loss" in row:
        return {"eval_val_loss": row["val_loss"], "eval_tokens": row["tokens"]}
    before = next((each for each in reversed(rows[:place]) if "loss" in each), None)
    tokens = row["tokens"] - (before["tokens"] if before else 0)
    seconds = row["seconds"] - (before["seconds"] if before else 0.0)
    named = ("loss", "grad_norm", "learning_rate", "tokens", "mfu")
    return {name: row[name] for name in named if name in row} | {"tokens_per_second": tokens / max(seconds, 1e-4)}  # type: ignore[literal-required]
