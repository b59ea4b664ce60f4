"""The terminal of a verb that several ranks do together: rank 0 alone speaks, and all use one folder."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffattn.rank import rank_here

if TYPE_CHECKING:
    from diffattn.cli.terminal.console import Console


@contextlib.contextmanager
def console_of_ranks(
    verb: str, out: Path | None, resume: bool, device: str, options: Sequence[object]
) -> Iterator[Console]:
    """Opens the terminal of a run, and joins the other ranks if there are any; the block does the work.

    Args:
        verb: the verb, such as ``"train"``.
        out: the folder that was given; without one rank 0 chooses.
        resume: the run goes on.
        device: the device that was given, ``"auto"``, ``"cpu"`` or ``"cuda"``.
        options: the dataclasses of the verb's options, which must be equal on all ranks.
    """
    from diffattn.cli.terminal.console import Console

    rank = rank_here()
    if rank.world == 1:
        with Console(verb, out, resume=resume) as console:
            console.importing()
            yield console
        return
    if not rank.is_first:
        warnings.simplefilter("ignore")
    from diffattn.train.recipe import Recipe
    from diffattn.train.spread.ranks import joined

    agree = {name: value for record in options for name, value in vars(record).items()}
    with joined(Recipe(device=device).resolved().device, agree | {"out": out, "resume": resume}) as ranks:
        folder = ranks.share(lambda: str(Console(verb, out, resume=resume).folder))
        with Console(verb, Path(folder), resume=resume) as console:
            console.importing()
            yield console
