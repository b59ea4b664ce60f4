"""Trains a ladder on a Ray cluster: each run is a task with its resources, and this process alone writes the rows.

A task whose worker or machine dies is started again, up to three times. It goes on from the last checkpoint where the
machines share the folder, and from the first step where they do not. The text has to be found on each machine under
the same name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diffattn.errors import (
    DataError,
    DiffattnError,
    TrainingError,
    UnsupportedError,
    error_from_json,
    error_to_json,
    one_line,
)
from diffattn.model.options import Dtype
from diffattn.progress import OnStage, Stage
from diffattn.results.ladder import LadderRow
from diffattn.scaling.messages import options_from_json, options_to_json
from diffattn.scaling.options import LadderOptions, WorkOptions
from diffattn.scaling.rows import ROWS, by_key
from diffattn.scaling.runs import LadderProgress, Missing, Run, progress_of, runs_of
from diffattn.sealed import append_row
from diffattn.train.callbacks import Interruption, Progress, quiet
from diffattn.train.lock import InUseError
from diffattn.train.single import new_folder
from diffattn.train.spread.ray_cluster import at_once, cluster, mailbox, resources, taken, variables

# How often a task is started again whose worker or machine died.
RETRIES = 3
# Between two looks at the tasks; and for tasks that were stopped, to save their steps.
_PAUSE, _PATIENCE = 0.5, 60.0


def train_on_ray(
    options: LadderOptions,
    work: WorkOptions,
    folder: Path,
    command: str,
    on_progress: Callable[[LadderProgress], None],
    on_stage: OnStage,
    on_note: Callable[[str], None],
) -> tuple[list[Run], list[Missing]]:
    """Trains what has no row, and appends each row as its task ends.

    Args:
        options, work, folder, command, on_progress, on_stage, on_note: those of
            :func:`diffattn.scaling.ladder.run_ladder`.

    Returns:
        All runs of the ladder, and those that other processes train.

    Raises:
        ConfigError: no machine has the threads or GPUs of a run.
        UnsupportedError: Ray is not installed or not reached, or its machines have another diffattn.
        DiffattnError: the first error of a run; the others have saved their steps and ended.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the runs have saved their steps and ended.
    """
    on_stage(Stage("reaching Ray"))
    with cluster(on_note) as ray:
        threads = work.threads or 1
        takes: dict[str, Any] = dict(resources(ray, threads, work.gpus, wants_gpu=options.device != "cpu"))
        takes["runtime_env"] = {"env_vars": variables(threads)}
        on_stage(Stage("starting the first process on Ray"))
        options = dataclasses.replace(options, dtype=_dtype(ray, takes, options))
        runs = runs_of(options, on_stage=on_stage, on_note=on_note)
        rows = by_key(folder)
        left = {run.name: run for run in runs if run.facts.key not in rows}
        if not left:
            return runs, []
        board = mailbox(ray)
        task = ray.remote(train_one).options(max_retries=RETRIES, **takes)
        job = {"options": json.dumps(options_to_json(options)), "folder": str(folder.absolute()), "command": command,
               "digest": runs[0].data.facts["digest"], "cwd": os.getcwd(), "threads": threads}  # fmt: skip
        running = {task.remote({**job, "name": name}, board): name for name in left}
        together = min(len(left), at_once(ray, takes))
        begun: set[str] = set()
        missing = []
        try:
            with Interruption():
                while running:
                    ended, _ = ray.wait(list(running), timeout=_PAUSE)
                    for name, step in taken(ray, board).items():
                        first = [] if name in begun else [None]
                        begun.add(name)
                        for seen in [*first, *([Progress(**step)] if step else [])]:
                            progress = progress_of(left[name], runs, by_key(folder).values(), seen)
                            seconds = progress.seconds_left
                            on_progress(dataclasses.replace(progress, seconds_left=seconds and seconds / together))
                    for one in ended:
                        run = left[running.pop(one)]
                        by = _collect(ray, one, run, folder)
                        if by is not None:
                            missing.append(Missing(run.name, by, run.facts.key))
        finally:
            _stop(ray, list(running))
    return runs, missing


def _dtype(ray: Any, takes: Mapping[str, Any], options: LadderOptions) -> Dtype:
    """Returns the number format that a task finds best, which the runs share then; checks its release of diffattn."""
    try:
        found = ray.get(ray.remote(settle).options(**takes).remote(json.dumps(options_to_json(options))))
    except ray.exceptions.RayError as error:
        raise UnsupportedError(
            f"the machines of the Ray cluster cannot import diffattn ({_why(error)})", "the same release on each",
            "install it there, with the same Python",
        ) from None  # fmt: skip
    if found["version"] != version("diffattn"):
        raise UnsupportedError(
            f"the machines of the Ray cluster have diffattn {found['version']}", f"{version('diffattn')}, as here",
            "install the same release on each",
        )  # fmt: skip
    dtype: Dtype = found["dtype"]
    return dtype


def _collect(ray: Any, ended: Any, run: Run, folder: Path) -> str | None:
    """Appends the row of a task that ended; returns who trains its run if another process does.

    Raises:
        DiffattnError: the task met an error, or was lost too often.
    """
    try:
        answer = ray.get(ended)
    except ray.exceptions.RayError as error:
        raise TrainingError(
            f"{run.name} on Ray ended without a row ({_why(error)})", f"a task that lives, or one of {RETRIES} more",
            "see the memory of its machine; run it again to go on",
        ) from None  # fmt: skip
    if "error" in answer:
        raise error_from_json(answer["error"])
    if "row" in answer and run.facts.key not in by_key(folder):
        append_row(folder / ROWS, LadderRow.from_json(answer["row"]).to_json())
    by: str | None = answer.get("by")
    return by


def _why(error: Exception) -> str:
    """Returns the reason of an error of Ray, which may be that of a task and then has its traceback as text."""
    cause = getattr(error, "cause", None)
    kind = type(error if cause is None else cause).__name__
    # The first line of Ray's is a sentence; tables of addresses follow.
    words = str(error if cause is None else cause).strip().partition("\n")[0]
    return one_line(f"{kind}: {words}", 200)


def _stop(ray: Any, running: list[Any]) -> None:
    """Stops tasks and waits until they have saved their steps; a second Ctrl-C ends the waiting."""
    if not running:
        return
    for one in running:
        ray.cancel(one)
    with contextlib.suppress(KeyboardInterrupt):
        ray.wait(running, num_returns=len(running), timeout=_PATIENCE)


def settle(options: str) -> dict[str, str]:
    """Says, on a machine of the cluster, which number format is best there, and which release it has."""
    ladder = options_from_json(json.loads(options))
    return {"dtype": ladder.recipe(ladder.shapes()[0], 0).dtype, "version": version("diffattn")}


def train_one(job: Mapping[str, Any], board: Any) -> dict[str, Any]:
    """Trains one run on a machine of the cluster and returns its row, who else trains it, or an error, each as JSON."""
    quiet()
    torch.set_num_threads(job["threads"])
    # Names of files are those of the caller where the machines share them.
    with contextlib.suppress(OSError):
        os.chdir(job["cwd"])
    said = 0.0

    def report(step: Progress | None) -> None:
        nonlocal said
        if step is None or step.step == step.steps or time.monotonic() - said > _PAUSE:
            said = time.monotonic()
            board.put.remote(job["name"], None if step is None else dataclasses.asdict(step))

    try:
        run = next(run for run in _runs(job["options"]) if run.name == job["name"])
        if run.data.facts["digest"] != job["digest"]:
            raise DataError(
                f"the text or its tokenizer on {socket.gethostname()} is another one", "the same text on all machines",
                "put it into a folder that they share",
            )  # fmt: skip
        with new_folder(Path(job["folder"]) / run.name) as folder:
            report(None)
            return {"row": run.row(folder, job["command"], report).to_json()}
    except InUseError as error:
        return {"by": error.by}
    except DiffattnError as error:
        return {"error": error_to_json(error)}


@functools.lru_cache(maxsize=1)
def _runs(options: str) -> Sequence[Run]:
    """Returns the runs of a ladder; a worker that trains several prepares their text once."""
    return runs_of(options_from_json(json.loads(options)))
