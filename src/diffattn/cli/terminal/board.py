"""Shows what is being done, on stderr: live lines on a terminal; elsewhere a line a stage, and more while it lasts.

Lines for a file or a pipe wait a while, so that a mistake that is found at once is one line alone.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import threading
import time
from types import TracebackType

import rich.progress

from diffattn.cli.terminal.screen import screen
from diffattn.humanize import seconds
from diffattn.progress import Stage

# How long they wait: while the libraries are imported, before which no mistake in their part can be found; and then.
IMPORT_SECONDS, HELD_SECONDS = 20.0, 6.0
IMPORTING = "importing "
# Between two lines where nobody looks: at first, and at last, where it lasts for hours.
SOONEST, LATEST = 10.0, 60.0
# A stage that is over sooner leaves no line on a terminal.
WORTH_A_LINE = 1.0


class Board:
    """Shows stages, and lines that stay; inside ``with``, and as an ``on_stage``.

    Args:
        keep: False leaves no line of a stage that is over, where it was over soon.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self.keep = keep
        self.screen = screen()
        self._lines = _Live(self.screen, keep) if self.screen.is_terminal else _Plain(self.screen, keep)
        self._began = 0.0
        self._before = 0
        self._stage = ""

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def __call__(self, stage: Stage) -> None:
        """Begins a stage, or says how far it is; the library calls this."""
        now = time.monotonic()
        if stage.name != self._stage:
            self._stage, self._began, self._before = stage.name, now, stage.done
        text = ""
        if stage.total and stage.done:
            # What was done before, as by a process that was killed, took no time here.
            new = stage.done - self._before
            left = (now - self._began) * (stage.total - stage.done) / new if new else 0.0
            text = f"{stage.name}: {100 * stage.done / stage.total:.0f}%"
            # An estimate before anything is timed would be a guess.
            text += f", about {seconds(round(left))} left" if now - self._began > 1 and left >= 1 else ""
        self._lines.show(stage.name, text, first=stage.name, passing=True)

    def run(self, name: str, text: str, done: int, total: int, *, first: str) -> None:
        """Shows the line of work that has numbers of its own; ``first`` begins it where lines do not change."""
        self._stage = ""
        self._lines.show(name, text, first=first, whole=done >= total)

    def note(self, line: str) -> None:
        """Prints a line that stays."""
        self._lines.release()
        self.screen.print(line, soft_wrap=True, markup=False)

    def importing(self) -> None:
        """Says what is waited for in the first seconds, and keeps the libraries from showing bars and warnings."""
        self(Stage(f"{IMPORTING}torch and transformers"))
        if os.environ.get("WANDB_MODE") == "offline":
            # The library says so on stdout as it is imported, and stdout is for results.
            with contextlib.redirect_stdout(io.StringIO()):
                importlib.import_module("transformers.integrations.integration_utils")
        from diffattn.train.callbacks import quiet

        quiet()

    def close(self, *, failed: bool = False) -> None:
        """Ends the lines that change; others may follow on the same terminal."""
        self._lines.close(failed)


class _Live:
    """The lines of a terminal, which change in their place."""

    def __init__(self, console: rich.console.Console, keep: bool) -> None:
        self._keep = keep
        self._progress = rich.progress.Progress(
            rich.progress.SpinnerColumn(finished_text="✓"),
            rich.progress.TextColumn("{task.description}", markup=False),
            console=console,
            transient=not keep,
        )
        self._tasks: dict[str, rich.progress.TaskID] = {}
        self._passing = ""
        self._began = 0.0

    def show(self, name: str, text: str, *, first: str, passing: bool = False, whole: bool = False) -> None:
        if not self._tasks:
            self._progress.start()
        if name != self._passing:
            self._pass()
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(text or name, total=1)
            if passing:
                self._passing, self._began = name, time.monotonic()
        if text or whole:
            self._progress.update(self._tasks[name], description=text or name, completed=int(whole))

    def _pass(self) -> None:
        """Ends the stage that was shown."""
        if not self._passing:
            return
        task, took = self._tasks.pop(self._passing), time.monotonic() - self._began
        # Beside the line of a run, what it stops for comes again and again.
        if took < WORTH_A_LINE or self._tasks:
            self._progress.remove_task(task)
        else:
            self._progress.update(task, description=f"{self._passing}: {seconds(took)}", completed=1)
        self._passing = ""

    def release(self) -> None:
        """Does nothing, since nothing is held back on a terminal."""

    def close(self, failed: bool) -> None:
        if failed and self._passing:
            self._progress.remove_task(self._tasks.pop(self._passing))
            self._passing = ""
        self._pass()
        self._progress.stop()
        self._tasks.clear()


class _Plain:
    """The lines of a file or a pipe."""

    def __init__(self, console: rich.console.Console, keep: bool) -> None:
        self._console, self._keep = console, keep
        self._held: list[str] | None = []
        self._seen: set[str] = set()
        self._name = self._text = ""
        self._opened = self._began = self._said = time.monotonic()
        self._held_until = 0.0
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._clock: threading.Thread | None = None

    def show(self, name: str, text: str, *, first: str, passing: bool = False, whole: bool = False) -> None:
        with self._lock:
            if self._clock is None:
                self._opened = time.monotonic()
                self._clock = threading.Thread(target=self._watch, daemon=True)
                self._clock.start()
            if name != self._name:
                self._hold(name)
                self._name, self._began = name, time.monotonic()
                if name not in self._seen:
                    self._seen.add(name)
                    self._say(first)
            self._text = text
            self._look()

    def _hold(self, name: str) -> None:
        """Decides, as a stage begins, until when lines are held back."""
        if name.startswith(IMPORTING):
            self._held_until = time.monotonic() + IMPORT_SECONDS
        elif not self._name or self._name.startswith(IMPORTING):
            self._held_until = time.monotonic() + HELD_SECONDS

    def release(self) -> None:
        """Prints the lines that were held back, and holds back no more."""
        with self._lock:
            held, self._held = self._held, None
            for line in held or ():
                self._console.print(line, soft_wrap=True, markup=False)

    def close(self, failed: bool) -> None:
        with self._lock:
            if self._keep and not failed:
                self.release()
            self._held, self._name = [], ""
        self._ended.set()
        if self._clock is not None:
            self._clock.join()
            self._clock, self._ended = None, threading.Event()

    def _watch(self) -> None:
        while not self._ended.wait(0.25):
            with self._lock:
                self._look()

    def _look(self) -> None:
        """Prints the line that is due, also of a stage that reports nothing."""
        now = time.monotonic()
        if self._held is not None:
            if now < self._held_until:
                return
            self.release()
        pause = min(LATEST, max(SOONEST, (now - self._opened) / 10))
        if self._name and now - self._said >= pause:
            lasted = round(now - self._began)
            # A stage that was named before may begin again as a line is due.
            self._say(self._text or (f"{self._name}: {seconds(lasted)} so far" if lasted else self._name))

    def _say(self, line: str) -> None:
        if not line:
            return
        self._said = time.monotonic()
        if self._held is not None:
            self._held.append(line)
        else:
            self._console.print(line, soft_wrap=True, markup=False)
