"""Functions that tests/train/test_commands.py runs on ranks: the command line, as torchrun starts it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

from diffattn.cli.main import main
from diffattn.train.callbacks import MetricsFile
from diffattn.train.spread import ranks


def commanded(lists: list[list[str]], folder: Path, kill: tuple[int, int] | None = None) -> tuple[int, str, str]:
    """Returns the exit status of this rank's command, and what it wrote on stdout and on stderr.

    Args:
        lists: the words behind ``diffattn`` of each rank, or of all.
        folder: the working directory.
        kill: a rank, and the number of rows of metrics after which it is killed as by ``kill -9``.
    """
    ranks.PATIENCE = timedelta(seconds=60)
    number = int(os.environ["RANK"])
    os.chdir(folder)
    if kill is not None and kill[0] in (number, -1):
        kill_after(kill[1])
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = main(lists[number % len(lists)])
    return status, out.getvalue(), error.getvalue()


def kill_after(rows: int) -> None:
    """Has this process killed as it has so many rows of metrics."""
    append = MetricsFile.append

    def counted(self: MetricsFile, row: object) -> None:
        append(self, row)  # type: ignore[arg-type]
        if len(self.rows) == rows:
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsFile.append = counted  # type: ignore[method-assign]


def interrupted(words: list[str], folder: Path, rows: int) -> tuple[int, str, str]:
    """Does as ``commanded``, and sends SIGTERM to this process once it has so many rows, on rank 1 alone."""
    append = MetricsFile.append

    def counted(self: MetricsFile, row: object) -> None:
        append(self, row)  # type: ignore[arg-type]
        if len(self.rows) == rows and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)

    MetricsFile.append = counted  # type: ignore[method-assign]
    return commanded([words], folder)
