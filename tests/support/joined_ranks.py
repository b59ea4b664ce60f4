"""Functions that tests/train/test_joined.py runs on ranks: they join, agree, wait and fail."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from diffattn.errors import ConfigError, DiffattnError, TrainingError
from diffattn.train.spread import ranks as of_ranks
from diffattn.train.spread.ranks import EndedError, Ranks, joined, ranks, tell


def talked(folder: Path) -> list[object]:
    """Joins twice; returns what rank 0 said, what the ranks have together, and who prepared the file."""
    heard: list[object] = []
    for turn in range(2):
        with joined() as here:
            heard.append(here.share(lambda turn=turn: f"turn {turn} of rank {ranks().rank.number}"))
            heard += [here.any(here.is_first), here.any(False), here.mean(here.rank.number, 1)]
    with joined() as here:
        heard.append(here.first_on_host(lambda: _prepared(folder / "prepared", here)))
    return heard


def _prepared(file: Path, here: Ranks) -> str:
    if not file.exists():
        time.sleep(0.3)
        file.write_text(f"by rank {here.rank.number}")
    return file.read_text()


def ending(options: list[dict[str, object]], act: Callable[[Ranks], None] = lambda here: None) -> tuple[int, str]:
    """Returns the exit status of this rank, and what it says: as the command line does."""
    said: list[str] = []
    of_ranks.PATIENCE = timedelta(seconds=20)
    try:
        with joined(agree=options[int(os.environ["RANK"])]) as here:
            act(here)
    except DiffattnError as error:
        ours = "" if isinstance(error, EndedError) else str(error)
        return tell(1 if isinstance(error, TrainingError) else 2, lambda: said.append(ours)), "".join(said)
    return 0, ""


def rank_1_refuses(here: Ranks) -> None:
    """Raises on rank 1 while the others wait: rank 0 for an operation of all, the rest for rank 0."""
    if here.rank.number == 1:
        time.sleep(0.2)
        raise ConfigError("rank 1 has a bad disk", "a good one", "mend it")
    here.any(True)
    here.share(lambda: None)


def rank_1_is_killed(here: Ranks) -> None:
    """Kills rank 1 while the others wait for an operation of all."""
    if here.rank.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    here.any(True)


def rank_0_is_late(here: Ranks) -> None:
    """Lets the others wait for rank 0 for longer than it may be silent, while it lives."""
    of_ranks.PATIENCE = timedelta(seconds=0.5)
    here.share(lambda: time.sleep(1.2))
