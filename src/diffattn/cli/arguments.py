"""The words of the command line, for what is printed of them and for what was given rather than left at its default."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from diffattn.errors import ConfigError
from diffattn.files import command

_words: ContextVar[list[str] | None] = ContextVar("words", default=None)
_named: ContextVar[frozenset[str]] = ContextVar("named", default=frozenset())


def remember(words: list[str]) -> None:
    """Take these for the words behind ``diffattn`` from now on."""
    _words.set(list(words))


def remember_named(parameters: Iterable[str]) -> None:
    """Take these parameters of the verb for those that stand in its words."""
    _named.set(frozenset(parameters))


def words() -> list[str]:
    """The words behind ``diffattn``."""
    kept = _words.get()
    return sys.argv[1:] if kept is None else kept


def command_line() -> str:
    """What was typed, as a person would type it again."""
    return command(["diffattn", *words()])


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Of the values of a verb's parameters, those that were given rather than left at their defaults."""
    return {name: value for name, value in values.items() if name in _named.get()}


def check_given(folder: Path, beside: dict[str, Any], own: dict[str, Any], **names: str) -> None:
    """Raise where an option that was given beside ``--resume`` is not what the run was started with.

    Args:
        folder: of the run.
        beside: what was given, by parameter.
        own: what the run says of itself, by the same names; None where it has no such option.
        names: of options that are called otherwise than their parameters.

    Raises:
        ConfigError: the first option that is another.
    """
    for name, value in beside.items():
        then = own.get(name)
        # The machine chose then.
        if value != then and not (value == "auto" and then is not None):
            option = f"--{names.get(name, name).replace('_', '-')}"
            began = f"without {option}" if then is None or then is False else f"with {option}{_shown(then)}"
            raise ConfigError(
                f"{folder} was started {began}, now {option}{_shown(value)} is given; resume without it, or choose "
                "another --out"
            )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return ""
    return " " + command(map(str, value if isinstance(value, tuple) else (value,)))
