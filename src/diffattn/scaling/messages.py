"""Turns options, progress and errors into plain JSON and back, for the processes that train a ladder together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffattn import errors
from diffattn.errors import DiffattnError
from diffattn.scaling.options import LadderOptions
from diffattn.scaling.runs import LadderProgress
from diffattn.train.callbacks import Progress


def options_to_json(options: LadderOptions) -> dict[str, Any]:
    """Returns the options of a ladder as JSON takes them."""
    return dataclasses.asdict(options)


def options_from_json(content: Mapping[str, Any]) -> LadderOptions:
    """Returns the options of a ladder from their JSON, which has no tuples.

    >>> options_from_json(options_to_json(LadderOptions(seeds=2))) == LadderOptions(seeds=2)
    True
    """
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value
                              for name, value in content.items()}  # fmt: skip
    return LadderOptions(**values)


def progress_to_json(progress: LadderProgress) -> dict[str, Any]:
    """Returns the progress of a ladder as JSON takes it."""
    return dataclasses.asdict(progress)


def progress_from_json(content: Mapping[str, Any]) -> LadderProgress:
    """Returns the progress of a ladder from its JSON."""
    step = content["step"]
    return LadderProgress(**{**content, "step": None if step is None else Progress(**step)})


def error_to_json(error: DiffattnError) -> list[str]:
    """Returns the kind and the three parts of an error.

    >>> error_to_json(errors.ConfigError("no text", "some", "give it"))
    ['ConfigError', 'no text', 'some', 'give it']
    """
    # A kind that a room defines is one of those of the whole package.
    kind = next(base.__name__ for base in type(error).__mro__ if hasattr(errors, base.__name__))
    return [kind, error.given, error.wanted, error.way_out]


def error_from_json(content: list[str]) -> DiffattnError:
    """Returns the error that another process met."""
    kind, *parts = content
    error: DiffattnError = getattr(errors, kind)(*parts)
    return error
