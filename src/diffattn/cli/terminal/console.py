"""Shows a person how a run goes, on stderr: stages, a line of each model, the table, how to continue."""

from __future__ import annotations

import datetime
import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from diffattn.cli.arguments import command_line
from diffattn.cli.terminal.board import Board
from diffattn.cli.terminal.screen import say
from diffattn.cli.terminal.table import show
from diffattn.errors import ConfigError
from diffattn.files import resume_command
from diffattn.humanize import seconds
from diffattn.rank import rank_here

if TYPE_CHECKING:
    from diffattn.results.comparison import ComparisonResult
    from diffattn.scaling.runs import LadderProgress
    from diffattn.train.callbacks import Progress as Step

RUNS = Path("runs")


class Console(Board):
    """Names the run folder, shows a run's progress, and says how to go on after Ctrl-C."""

    def __init__(
        self, verb: str, out: Path | None, *, resume: bool, kept: Literal["run", "rows", "nothing"] = "run"
    ) -> None:
        super().__init__()
        self.verb = verb
        self.kept = kept
        self.command = command_line()
        self.folder = out if out is not None else _newest(verb) if resume else _new(verb)
        self._counts: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if kind is KeyboardInterrupt and self.kept != "nothing":
            self.note(self._how_to_go_on())

    def _how_to_go_on(self) -> str:
        if self.kept == "rows":
            return f"stopped; what was trained is kept, go on with: {self.command}"
        if not (self.folder / "config.json").exists():
            return f"stopped before anything was trained; start again with: {self.command}"
        return f"stopped; what was trained is kept, go on with: {resume_command(self.verb, self.folder)}"

    def progress(self, name: str, step: Step, *, first: str | None = None) -> None:
        """Shows the line of one model that is trained."""
        text = f"{name:<16} step {step.step}/{step.steps}  loss {step.loss:.3f}  {step.tokens_per_second:,.0f} tokens/s"
        text += "" if step.mfu is None else f"  MFU {step.mfu:.1%}"
        # Behind the last step comes the held-out loss, which is a stage of its own.
        if step.step < step.steps:
            minutes, rest = divmod(round(step.seconds_left), 60)
            text += f"  {minutes}:{rest:02d} left"
        first = f"training {name}: {step.steps:,} steps" if first is None else first
        self.run(name, text, step.step, step.steps, first=first)

    def counted(self, name: str, done: int, total: int) -> None:
        """Shows the line of one model that is measured, by how much is done."""
        now = time.monotonic()
        began, before = self._counts.setdefault(name, (now, done))
        text = f"{name:<16} {done:,} of {total:,}"
        if done > before and done < total:
            text += f"  about {seconds(round((now - began) * (total - done) / (done - before)))} left"
        self.run(name, text, done, total, first=f"measuring {name}")

    def ladder(self, progress: LadderProgress) -> None:
        """Prints a line at the start of each run of a ladder, and shows the live line of its steps."""
        name = f"{progress.arm} {progress.size:,} parameters, seed {progress.seed}"
        if progress.step is not None:
            self.progress(name, progress.step, first="")
            return
        left = "" if progress.seconds_left is None else f", about {seconds(progress.seconds_left)} left"
        self.note(f"{progress.done} of {progress.runs} runs done{left}: training {name}")

    def rows(self, rows: list[list[str]]) -> None:
        """Prints a table; the first row is its header."""
        show(rows, self.screen)

    def table(self, result: ComparisonResult) -> None:
        """Prints the comparison as the report has it, and the verdict of each pair."""
        from diffattn.report.compare_table import compare_rows

        self.rows(compare_rows(result))
        for pair in result.pairs.values():
            say(pair.verdict)


def print_json(result: object) -> None:
    """Prints one JSON object on stdout; of several ranks the first does."""
    if not rank_here().is_first:
        return
    text = json.dumps(result, indent=1, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        # A name that is no UTF-8, or a terminal that has not all characters: JSON can say each without them.
        text = json.dumps(result, indent=1)
    print(text)


def _new(verb: str) -> Path:
    return RUNS / f"{verb}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _newest(verb: str) -> Path:
    found = sorted(path for path in RUNS.glob(f"{verb}-*") if (path / "config.json").exists())
    if not found:
        raise ConfigError(f"--resume, and no {verb} run in {RUNS}/", "a run to resume", "name its folder with --out")
    return found[-1]
