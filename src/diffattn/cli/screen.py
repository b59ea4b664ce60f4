"""Where tables and progress of every command are written: stderr."""

from __future__ import annotations

import rich.console


def screen() -> rich.console.Console:
    """The terminal; a file or a pipe, which need not fit into anything, takes lines of 160 characters."""
    console = rich.console.Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = 160
    return console
