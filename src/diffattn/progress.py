"""The stages that long work reports to a callback, so that the library itself prints nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A stage of long work, and how much of it is done.

    A stage begins with the first report of its name and ends with the first report of another one. Further reports of
    the same name say how much is done.
    """

    name: str
    """The work in words, such as ``training the tokenizer``."""
    done: int = 0
    """The part that is done, in the unit of ``total``."""
    total: int | None = None
    """The whole work in any unit; None where it is not known."""


OnStage = Callable[[Stage], None]


def unseen(stage: Stage) -> None:
    """Does nothing; it is the default of every ``on_stage``."""


def counted(on_stage: OnStage, name: str) -> Callable[[int, int], None]:
    """Returns a callback that takes two numbers, done and in all, and reports them as one stage.

    >>> counted(print, "reading text")(1, 4)
    Stage(name='reading text', done=1, total=4)
    """

    def report(done: int, total: int) -> None:
        on_stage(Stage(name, done, total))

    return report
