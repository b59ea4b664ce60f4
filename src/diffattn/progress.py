"""How work that takes long says what it does: stages, handed to a callback; the library itself prints nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """What is being done, and how much of it is done.

    A stage begins with the first report of its name and ends with the first report of another one. Further reports of
    the same name say how far it is.

    Fields: `name`, for a person, such as `"training the tokenizer"`; `done` of `total`, in any unit; `total` None where
    nobody knows how much there is.
    """

    name: str
    done: int = 0
    total: int | None = None


OnStage = Callable[[Stage], None]


def unseen(stage: Stage) -> None:
    """The default of every `on_stage`: nobody looks."""


def counted(on_stage: OnStage, name: str) -> Callable[[int, int], None]:
    """A callback of two numbers, done and in all, that reports them as one stage.

    >>> counted(print, "reading text")(1, 4)
    Stage(name='reading text', done=1, total=4)
    """

    def report(done: int, total: int) -> None:
        on_stage(Stage(name, done, total))

    return report
