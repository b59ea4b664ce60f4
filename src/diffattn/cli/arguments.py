"""The words of the command line: held against the table of a verb, turned into values, and remembered for what is
printed of them.

Mistakes are found here, before tyro sees the words, so that each is one line.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path

from diffattn.cli.options import EXAMPLES, Option, options_of
from diffattn.errors import ConfigError
from diffattn.files import command
from diffattn.names import SHORT_DTYPES, one_of

_LARGEST = 2**63 - 1
_WANTED: dict[type, str] = {int: "a whole number", float: "a number"}
# A word that begins like an option and is none.
_NUMBER = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)

_words: ContextVar[list[str] | None] = ContextVar("words", default=None)
_named: ContextVar[frozenset[str]] = ContextVar("named", default=frozenset())


def remember(words: list[str]) -> None:
    """Takes these for the words behind ``diffattn`` from now on."""
    _words.set(list(words))


def command_line() -> str:
    """Returns the command that was typed, as a person would type it again."""
    kept = _words.get()
    return command(["diffattn", *(sys.argv[1:] if kept is None else kept)])


def parse(title: str, verb: Callable[..., int], arguments: Sequence[str]) -> Callable[[], int]:
    """Returns the call of a verb that the words behind its name ask for.

    Raises:
        ConfigError: words that the verb does not take.
    """
    options = options_of(verb)
    words = chosen(options, arguments)
    _named.set(frozenset(check(title, options, words)))
    # It takes a while to import, and a mistake is told of without it.
    from diffattn.cli.tyro_private import values_of

    hints, given, fields = typing.get_type_hints(verb), dict[str, object](), dict[str, dict[str, object]]()
    for option, value in zip(options, values_of(options, words), strict=True):
        (given if option.owner is None else fields.setdefault(option.owner, {}))[option.parameter] = value

    def call() -> int:
        records = {name: hints[name](**fields.get(name, {})) for name in inspect.signature(verb).parameters
                   if name not in given}  # fmt: skip
        return verb(**given, **records)

    return call


def chosen(options: Sequence[Option], arguments: Sequence[str]) -> list[str]:
    """Returns the words behind a verb, with each option and each choice as the table has it.

    A word that is no choice stays as it is, for :func:`check` to refuse.
    """
    named = {option.name: option for option in options if not option.positional}
    older = {name: option.name for option in options for name in option.also}
    found: list[str] = []
    option: Option | None = None
    for place, word in enumerate(arguments):
        if word == "--":
            return [*found, *arguments[place:]]
        if _is_option(word):
            typed, equals, value = word.partition("=")
            typed = older.get(typed.replace("_", "-"), typed)
            option = named.get(typed.replace("_", "-"))
            found.append(f"{typed}={_choice(option, value)}" if option and equals else f"{typed}{equals}{value}")
            option = None if equals else option
        else:
            found.append(_choice(option, word) if option else word)
            option = option if option and option.many else None
    return found


def _choice(option: Option, value: str) -> str:
    if not option.choices:
        return value
    short = {name: dtype for name, dtype in SHORT_DTYPES.items() if dtype in option.choices}
    try:
        return one_of(value, option.choices, also=short)
    except ConfigError:
        return value


def check(title: str, options: Sequence[Option], arguments: Sequence[str]) -> set[str]:
    """Holds the words behind a verb against its table.

    Returns:
        The parameters whose options stand there by name.

    Raises:
        ConfigError: the first word that is wrong.
    """
    see = f"see diffattn {title} --help"
    named = {option.name: option for option in options if not option.positional}
    places = [option for option in options if option.positional]
    seen: set[str] = set()
    loose: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "--":
            loose += words
            break
        if not _is_option(word):
            loose.append(word)
            continue
        typed, equals, value = word.partition("=")
        option = named.get(typed.replace("_", "-"))
        if option is None:
            near = nearest(typed, named)
            raise ConfigError(shortened(typed), f"an option of diffattn {title}",
                              f"perhaps you meant {near}; {see}" if near else see)  # fmt: skip
        if option.name in seen:
            once = "give all its values behind one" if option.many else "leave one out"
            raise ConfigError(f"{typed} twice", "it once", once)
        seen.add(option.name)
        if option.switch:
            if equals:
                raise ConfigError(shortened(word), f"{typed} without a value", "leave out what stands behind it")
            continue
        values = [value] if equals else []
        while not equals and words and not _is_option(words[0]) and (option.many or not values):
            values.append(words.pop(0))
        _check_values(option, typed, values)
    _check_places(title, places, loose)
    for option in options:
        if option.required and not option.positional and option.name not in seen:
            raise ConfigError(f"no {option.name}", f"{option.name} {option.metavar}", see)
    return {named[name].parameter for name in seen}


def _check_values(option: Option, typed: str, values: list[str]) -> None:
    example = f"write {option.example}, for example"
    if not values:
        raise ConfigError(f"{typed} without a value", "a value behind it", example)
    if len(values) % option.together:
        given = shortened(" ".join([typed, *values]))
        raise ConfigError(given, f"values in groups of {option.together}", example)
    for value in values:
        if (wanted := _wanted(option, value)) is not None:
            raise ConfigError(f"{typed} {shortened(value)!r}", wanted, example)


def _check_places(title: str, places: list[Option], loose: list[str]) -> None:
    """Holds the words without a name against what the verb takes."""
    takes = " ".join(["diffattn", title, *(option.metavar for option in places)])
    see = f"see diffattn {title} --help"
    if len(loose) > len(places) and not any(option.many for option in places):
        wanted = takes if places else f"options behind diffattn {title}"
        given = f"the word {shortened(loose[len(places)])!r} too many"
        raise ConfigError(given, wanted, f"put a text with spaces into quotes; {see}")
    missing = [option.name for option in places if option.required][len(loose) :]
    if missing:
        raise ConfigError(f"no {missing[0]}", takes, see)
    for option, value in zip(places, loose, strict=False):
        if (other := _wanted(option, value)) is not None:
            raise ConfigError(f"{option.name} {shortened(value)!r}", other, see)


def _wanted(option: Option, value: str) -> str | None:
    """Returns None for a value that the option takes, else what it would take."""
    if option.choices:
        return None if value in option.choices else f"one of {', '.join(option.choices)}"
    if option.kind not in EXAMPLES:
        return None
    try:
        number = option.kind(value)
    except ValueError:
        return _WANTED[option.kind]
    if option.kind is float and not math.isfinite(number):
        return "a finite number"
    return f"a number up to {_LARGEST:,}" if option.kind is int and abs(number) > _LARGEST else None


def _is_option(word: str) -> bool:
    # A single sign is a value: what comes from stdin.
    return word.startswith("-") and word != "-" and not _NUMBER.match(word) and " " not in word.split("=")[0]


def nearest(typed: str, known: Iterable[str]) -> str | None:
    """Returns the known word that a typed one most likely stands for, or None.

    >>> nearest("--stepz", ["--seed", "--steps"]), nearest("--out", ["--html", "--text"])
    ('--steps', None)
    """
    # The signs that all of them begin with would make all of them alike.
    bare = {name.lstrip("-"): name for name in known}
    found = difflib.get_close_matches(typed.lstrip("-").replace("_", "-").lower(), bare, n=1, cutoff=0.6)
    return bare[found[0]] if found else None


def shortened(text: str, length: int = 60) -> str:
    """Returns a text that a line has room for."""
    return text if len(text) <= length else f"{text[:length]}…"


def given(*records: object) -> dict[str, object]:
    """Returns the fields of a verb's dataclasses that were given on the command line, with their values."""
    return {name: value for record in records for name, value in vars(record).items() if name in _named.get()}


def check_given(folder: Path, beside: Mapping[str, object], own: Mapping[str, object], **names: str) -> None:
    """Raises where an option that was given beside ``--resume`` is not what the run was started with.

    Args:
        folder: folder of the run.
        beside: the values that were given, by parameter.
        own: the values that the run was started with, by the same names; None where it has no such option.
        names: names of options that differ from their parameters.

    Raises:
        ConfigError: the first option that differs.
    """
    for name, value in beside.items():
        then = own.get(name)
        # With auto the machine chose then.
        if value != then and not (value == "auto" and then is not None):
            option = f"--{names.get(name, name).replace('_', '-')}"
            began = f"without {option}" if then is None or then is False else f"with {option}{_shown(then)}"
            raise ConfigError(
                f"{folder} was started {began}, now {option}{_shown(value)}",
                "the options that it was started with",
                f"leave {option} out, or choose another --out",
            )


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return ""
    return " " + command(map(str, value if isinstance(value, tuple) else (value,)))
