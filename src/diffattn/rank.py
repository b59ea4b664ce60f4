"""Says which of several processes this one is, from the environment that torchrun, Ray or Slurm gives it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from diffattn.errors import ConfigError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Rank:
    """One of the processes that train one model together."""

    number: int = 0
    """The number among all ranks, from 0."""
    world: int = 1
    """All ranks."""
    local: int = 0
    """The number among the ranks of this host, from 0, which is also the number of its GPU."""
    per_host: int = 1
    """The ranks of this host."""

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes the run folder and speaks to the person."""
        return self.number == 0


def rank_here(environment: Mapping[str, str] = os.environ) -> Rank:
    """Returns the rank of this process; a process that nothing started as a rank is the only one.

    Raises:
        ConfigError: variables that are no numbers, or that do not fit each other.

    >>> rank_here({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    Rank(number=1, world=2, local=1, per_host=2)
    >>> rank_here({})
    Rank(number=0, world=1, local=0, per_host=1)
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return Rank()
    said = {name: environment[name] for name in _NAMES if name in environment}
    try:
        numbers = {name: int(text) for name, text in said.items()}
        number, world = numbers["RANK"], numbers["WORLD_SIZE"]
        rank = Rank(number, world, numbers.get("LOCAL_RANK", number), numbers.get("LOCAL_WORLD_SIZE", world))
        if not (0 <= rank.number < rank.world and 0 <= rank.local < rank.per_host <= rank.world):
            raise ValueError
    except ValueError:
        raise ConfigError(
            " ".join(f"{name}={text}" for name, text in said.items()) + " in the environment",
            "the number of a rank and of all ranks, as torchrun sets them",
            "start with torchrun, or unset RANK and WORLD_SIZE",
        ) from None
    return rank
