"""Writes what every command tells a person to stderr: tables, sentences and progress."""

from __future__ import annotations

import os
import re
import textwrap

import rich.console

from diffattn.rank import rank_here

# Of a file or a pipe, which has no width of its own; and what is read even where a terminal says that it has less.
WIDTH, LEAST = 80, 30
_GLUED = re.compile(r"(?<=\d) (?=(?:[kMBT]|[KMGT]iB|[kMGTPE]?FLOP|GB|µs|ms|s|min|h)\b)|(?<=\b[^\W\d_]) (?=[−-]?\d)")


def screen() -> rich.console.Console:
    """Returns the terminal, as wide as it is; lines of a file or a pipe have 80 characters, or what COLUMNS says.

    Of several ranks that work together, the first alone writes on it.
    """
    console = rich.console.Console(stderr=True, highlight=False, quiet=not rank_here().is_first)
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        console.width = WIDTH
    console.width = max(console.width, LEAST)
    return console


def wrapped(text: str, width: int, *, indent: str = "") -> str:
    """Returns a text in lines that end between words, each but the first behind ``indent``.

    What has no space stays whole, and so do a number and its unit, or a letter and its number.

    >>> wrapped("one two three 8 GiB", 16, indent="  ")
    'one two three\\n  8 GiB'
    """
    glued = _GLUED.sub("\u00a0", text)
    lines = textwrap.fill(glued, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\u00a0", " ")


def say(*paragraphs: str) -> None:
    """Prints paragraphs on stderr, an empty line between two of them."""
    console = screen()
    text = "\n\n".join(wrapped(paragraph, console.width) for paragraph in paragraphs)
    console.print(text, soft_wrap=True, markup=False, emoji=False)
