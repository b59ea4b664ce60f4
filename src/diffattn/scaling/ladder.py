"""A ladder: pairs of growing size, trained on the same number of tokens; one row of JSON a run.

The rows are what a scaling law is fitted to (``scaling/fit.py``). A run whose row exists is skipped, a run that was
cut goes on from its last checkpoint, and several processes may work on one ladder: each takes runs that no other has.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from diffattn.data.mixture import check_share
from diffattn.files import writable_folder
from diffattn.folders import LADDER, own_folder
from diffattn.progress import OnStage, Stage, unseen
from diffattn.results.ladder import LadderRow
from diffattn.scaling.arms import ARMS
from diffattn.scaling.options import LadderOptions, WorkOptions
from diffattn.scaling.rows import ROWS, by_key, read_rows
from diffattn.scaling.runs import LadderProgress, Missing, Run, progress_of, runs_of
from diffattn.sealed import append_row
from diffattn.train.callbacks import Progress
from diffattn.train.lock import InUseError, check_locks
from diffattn.train.single import new_folder

# Between two looks at runs that other processes train.
_PATIENCE = 2.0


def run_ladder(
    options: LadderOptions | None = None,
    *,
    out: str | Path,
    work: WorkOptions | None = None,
    command: str = "diffattn.run_ladder(...)",
    on_progress: Callable[[LadderProgress], None] = lambda progress: None,
    on_stage: OnStage = unseen,
    on_note: Callable[[str], None] = lambda line: None,
    on_missing: Callable[[Sequence[Missing]], None] = lambda missing: None,
) -> list[LadderRow]:
    """Trains every variant, size and seed that has no row yet, smallest first, and appends a row for each.

    Call it again, or in several processes of one machine at once, with the same ``out``: what is done is skipped. The
    run folders in ``out`` may be deleted once their rows exist; a copy of ``rows.jsonl`` in a new folder is enough to
    go on.

    Args:
        options: the sizes, variants and seeds; default: those of :class:`LadderOptions`.
        out: folder of ``rows.jsonl`` and of the run folders.
        work: where the runs are trained, and how many at once; default: one after another in this process.
        command: the command that made the rows, to be named in each.
        on_progress: called at the start of each run and after each step.
        on_stage: called with what is done beside the steps, and how much of it is.
        on_note: called with a line about the text or the machines that a person should see.
        on_missing: called once, before this returns, with the runs that have no row since other processes train them.

    Returns:
        The rows of this ladder, in order of size, seed and variant.

    Raises:
        ConfigError, DataError: options, text or rows that cannot be used; or a folder on a file system whose locks do
            not hold, so that processes could train one run twice.
        UnsupportedError: Ray was asked for and is not installed, or cannot be reached.
        TrainingError: a run diverged, a process died or the disk is full; other rows are kept.
        KeyboardInterrupt: Ctrl-C; the runs go on from their last steps the next time.
    """
    options, work = options or LadderOptions(), work or WorkOptions()
    _check(options)
    folder = own_folder(out, LADDER)
    # A damaged row is named before any work.
    read_rows(folder / ROWS)
    writable_folder(folder)
    if work.on == "ray":
        from diffattn.scaling.ray_tasks import train_on_ray

        runs, missing = train_on_ray(options, work, folder, command, on_progress, on_stage, on_note)
    else:
        check_locks(folder)
        runs = runs_of(options, on_stage=on_stage, on_note=on_note)
        rows = by_key(folder)
        if work.processes > 1 and (left := sum(run.facts.key not in rows for run in runs)):
            from diffattn.scaling.processes import train_in_processes

            train_in_processes(options, work, folder, command, on_progress, at_most=left)
        # Also behind other processes: what one of them left for a process of somebody else is taken or told of here.
        missing = _train_here(runs, folder, command, on_progress, on_stage, wait=work.wait)
    rows = by_key(folder)
    on_missing([run for run in missing if run.key not in rows])
    return [rows[run.facts.key] for run in runs if run.facts.key in rows]


def _check(options: LadderOptions) -> None:
    """Refuses what could not be trained, before anything is read or written."""
    check_share(options.needles)
    for shape in options.shapes():
        for name in options.variants:
            ARMS[name].config(shape, options.match)


def _train_here(
    runs: Sequence[Run],
    folder: Path,
    command: str,
    on_progress: Callable[[LadderProgress], None],
    on_stage: OnStage,
    *,
    wait: bool,
) -> list[Missing]:
    """Trains what nobody else trains, again and again until each run has a row or is somebody else's.

    With ``wait``, it also waits for those, and takes over what a process left that ended before its run did.
    """
    while True:
        missing, trained = [], False
        for run in runs:
            if run.facts.key in by_key(folder):
                continue
            try:
                trained |= _train_one(run, runs, folder, command, on_progress, on_stage)
            except InUseError as error:
                missing.append(Missing(run.name, error.by, run.facts.key))
        if not missing or not (trained or wait):
            return missing
        if not trained:
            on_stage(Stage(f"waiting for {len(missing)} runs that others train, such as {missing[0]}"))
            time.sleep(_PATIENCE)


def _train_one(
    run: Run,
    runs: Sequence[Run],
    folder: Path,
    command: str,
    on_progress: Callable[[LadderProgress], None],
    on_stage: OnStage,
) -> bool:
    """Trains a run and appends its row; returns whether it had none."""
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(new_folder(folder / run.name))
        # Read again: the process that had the folder until now may have written its row.
        rows = by_key(folder)
        if run.facts.key in rows:
            return False

        def report(step: Progress | None) -> None:
            on_progress(progress_of(run, runs, rows.values(), step))

        report(None)
        append_row(folder / ROWS, run.row(own, command, report, on_stage).to_json())
    return True
