"""A command of diffattn on ranks that tests start, as torchrun would start them."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from pathlib import Path
from typing import Any

from diffattn.cli.main import main
from diffattn.train.callbacks import RunCallback


def command(words: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str, str]:
    """Returns the exit status of ``diffattn WORDS`` in a working folder, and what it said on stdout and on stderr."""
    os.chdir(folder)
    os.environ |= environment
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    return status, out.getvalue(), err.getvalue()


def killed(words: list[str], folder: Path, environment: dict[str, str], step: int) -> None:
    """Does the same on ranks that are all killed by SIGKILL as a step begins."""
    inner = RunCallback.on_step_begin

    def on_step_begin(self: RunCallback, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        inner(self, args, state, control, **more)

    RunCallback.on_step_begin = on_step_begin  # type: ignore[method-assign]
    command(words, folder, environment)
