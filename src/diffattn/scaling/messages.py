"""Turns options and progress into plain JSON and back, for the processes that train a ladder together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

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
