"""What a person sees of a run, on stderr: notes, one live line per model, the table, how to continue."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import rich.box
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

from diffattn.cli.screen import screen
from diffattn.errors import ConfigError
from diffattn.numbers import seconds
from diffattn.train.callbacks import Progress as Step

if TYPE_CHECKING:
    from diffattn.study.ladder import LadderProgress

RUNS = Path("runs")


class Console:
    """Names the run folder, shows a run's progress where stderr is a terminal, and says how to go on after Ctrl-C."""

    def __init__(
        self, verb: str, out: Path | None, *, resume: bool, kept: Literal["run", "rows", "nothing"] = "run"
    ) -> None:
        self.verb = verb
        self.kept = kept
        self.command = shlex.join(["diffattn", *sys.argv[1:]])
        self.folder = out if out is not None else _newest(verb) if resume else _new(verb)
        self._screen = screen()
        self._live = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            console=self._screen,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Console:
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tasks:
            self._live.stop()
        if kind is KeyboardInterrupt and self.kept != "nothing":
            again = f"diffattn {self.verb} --resume --out {self.folder}" if self.kept == "run" else self.command
            self.note(f"stopped; what was trained is kept, go on with: {again}")

    def note(self, line: str) -> None:
        self._screen.print(line, soft_wrap=True, markup=False)

    def progress(self, name: str, step: Step) -> None:
        """The live line of one model; nothing where stderr is not a terminal."""
        minutes, rest = divmod(round(step.seconds_left), 60)
        text = (
            f"{name:<16} step {step.step}/{step.steps}  loss {step.loss:.3f}  "
            f"{step.tokens_per_second:,.0f} tokens/s  {minutes}:{rest:02d} left"
        )
        self._show(name, text, step.step, step.steps)

    def counted(self, name: str, done: int, all_: int) -> None:
        """The live line of one model, by what is done; nothing where stderr is not a terminal."""
        left = next((task.time_remaining for task in self._live.tasks if task.id == self._tasks.get(name)), None)
        text = f"{name:<16} {done:,} of {all_:,}" + (f"  {left:.0f} s left" if left else "")
        self._show(name, text, done, all_)

    def ladder(self, progress: LadderProgress) -> None:
        """A line at the start of each run of a ladder, and the live line of its steps."""
        name = f"{progress.attention} {progress.size:,} parameters, seed {progress.seed}"
        if progress.step is not None:
            self.progress(name, progress.step)
            return
        left = "" if progress.seconds_left is None else f", about {seconds(progress.seconds_left)} left"
        self.note(f"{progress.done} of {progress.runs} runs done{left}: training {name}")

    def _show(self, name: str, text: str, done: int, all_: int) -> None:
        if not self._screen.is_terminal:
            return
        if not self._tasks:
            self._live.start()
        if name not in self._tasks:
            self._tasks[name] = self._live.add_task(text, total=all_)
        self._live.update(self._tasks[name], completed=done, total=all_, description=text)

    def rows(self, rows: list[list[str]]) -> None:
        """A table; the first row is its header."""
        table = Table(*rows[0], box=rich.box.SIMPLE_HEAD)
        for row in rows[1:]:
            table.add_row(*row)
        self._screen.print(table, markup=False)

    def table(self, result: dict[str, Any]) -> None:
        """The comparison as the report has it, and the verdict of each pair."""
        from diffattn.report.format import compare_rows

        self.rows(compare_rows(result))
        for pair in result["pairs"].values():
            self.note(pair["verdict"])


def print_json(result: object) -> None:
    """One JSON object on stdout."""
    json.dump(result, sys.stdout, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")


def _new(verb: str) -> Path:
    return RUNS / f"{verb}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _newest(verb: str) -> Path:
    found = sorted(path for path in RUNS.glob(f"{verb}-*") if (path / "config.json").exists())
    if not found:
        raise ConfigError(f"no {verb} run in {RUNS}/ to resume; wanted its folder: name it with --out")
    return found[-1]
