"""The options of a verb as one table: what its help shows, and what is held against what a person typed.

The table is made of the verb's signature and docstring. A parameter whose type is a dataclass stands for its fields.
tyro turns the words into values and lays the help out; what it says of a mistake fills a box, so mistakes are found
here before it sees the words, and each is one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import math
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import docstring_parser
import tyro

from diffattn.cli.arguments import remember_named
from diffattn.errors import ConfigError
from diffattn.names import one_of

REQUIRED = inspect.Parameter.empty
WIDTH = 80
_LARGEST = 2**63 - 1
_METAVARS: dict[type, str] = {int: "INT", float: "FLOAT", Path: "FOLDER"}
_FILES = ("png", "html")
_WANTED: dict[type, tuple[str, str]] = {int: ("a whole number", "3"), float: ("a number", "0.5")}
# A word that begins like an option and is none.
_NUMBER = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)


@dataclass(frozen=True)
class Option:
    """One option, as a person writes it and as the function takes it.

    Fields: `name`, such as `--batch-size`, or the word that help has for a value without a name; `annotation`, for
    tyro; `kind`, the type of one value, bool for a switch; `choices`, the values that are allowed, () for any; `many`,
    whether several values may follow, `together` of which belong to each other; `default`, `REQUIRED` for none;
    `owner`, the parameter whose dataclass has it as a field.
    """

    parameter: str
    name: str
    annotation: Any
    kind: type
    choices: tuple[str, ...]
    many: bool
    together: int
    positional: bool
    metavar: str
    default: Any
    help: str
    owner: str | None = None

    @property
    def switch(self) -> bool:
        return self.kind is bool

    @property
    def hint(self) -> str:
        """What help says of the default; nothing where the sentence says it, or where a switch is off."""
        if self.default is REQUIRED:
            return "(required)"
        if self.switch or "Default:" in self.help:
            return ""
        if self.default is None or self.default == ():
            return "(optional)"
        values = self.default if self.many else (self.default,)
        return f"(default: {' '.join(map(str, _flat(values)))})"

    @property
    def example(self) -> str:
        """The option with a value that it takes."""
        if self.default not in (REQUIRED, None, ()):
            values = self.default if self.many else (self.default,)
            return f"{self.name} {' '.join(map(str, _flat(values)))}"
        value = self.choices[0] if self.choices else _WANTED.get(self.kind, ("", self.metavar.split()[0]))[1]
        return f"{self.name} {value}"


def options_of(verb: Callable[..., Any]) -> list[Option]:
    """The table of a verb, in the order of its signature.

    >>> def verb(*, steps: int = 300) -> None:
    ...     '''Train.
    ...
    ...     Args:
    ...         steps: Optimizer steps.
    ...     '''
    >>> [(option.name, option.metavar, option.hint) for option in options_of(verb)]
    [('--steps', 'INT', '(default: 300)')]
    """
    hints = typing.get_type_hints(verb, include_extras=True)
    said = {entry.arg_name: entry.description or "" for entry in _docstring(verb).params}
    found: list[Option] = []
    for name, parameter in inspect.signature(verb).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            found += _fields(hints[name], name)
        else:
            found.append(_option(name, hints[name], parameter.default, said.get(name, "")))
    return found


def _fields(record: Any, owner: str) -> Iterator[Option]:
    hints = typing.get_type_hints(record, include_extras=True)
    said = {entry.arg_name: entry.description or "" for entry in docstring_parser.parse_from_object(record).params}
    for field in dataclasses.fields(record):
        option = _option(field.name, hints[field.name], field.default, said.get(field.name, ""))
        yield dataclasses.replace(option, owner=owner)


def _option(parameter: str, annotation: Any, default: Any, sentence: str) -> Option:
    extras = annotation.__metadata__ if typing.get_origin(annotation) is Annotated else ()
    plain = typing.get_args(annotation)[0] if extras else annotation
    given: dict[str, Any] = {}
    for extra in extras:
        named = {key: getattr(extra, key, None) for key in ("name", "metavar")}
        given |= {key: value for key, value in named.items() if value is not None}
    positional = tyro.conf.Positional in extras
    kind, choices, many, together = _values(plain)
    words = given.get("name", parameter).replace("_", "-")
    usual = "FILE" if parameter in _FILES else _METAVARS.get(kind, words.rpartition("-")[2].upper())
    metavar = given.get("metavar") or ("{" + ",".join(choices) + "}" if choices else usual)
    name = metavar if positional else f"--no-{words}" if kind is bool and default is True else f"--{words}"
    if many:
        metavar = f"{' '.join([metavar] * together)} ..."
    said = " ".join(sentence.split())
    return Option(parameter, name, annotation, kind, choices, many, together, positional, metavar, default, said)


def _values(plain: Any) -> tuple[type, tuple[str, ...], bool, int]:
    """The type of one value, what it may be, whether there may be several, and how many belong together."""
    if typing.get_origin(plain) in (typing.Union, types.UnionType):
        plain = next(part for part in typing.get_args(plain) if part is not type(None))
    many, together = False, 1
    if typing.get_origin(plain) is tuple:
        many, plain = True, typing.get_args(plain)[0]
    if typing.get_origin(plain) is tuple:
        together, plain = len(typing.get_args(plain)), typing.get_args(plain)[0]
    if typing.get_origin(plain) is Literal:
        choices = typing.get_args(plain)
        return type(choices[0]), tuple(map(str, choices)), many, together
    return plain, (), many, together


def parse(title: str, verb: Callable[..., Callable[[], int]], arguments: Sequence[str]) -> Callable[[], int]:
    """What a verb returns for the words behind its name.

    Raises:
        ConfigError: words that the verb does not take, in one line.
    """
    options = options_of(verb)
    words = chosen(options, arguments)
    remember_named(check(title, options, words))
    record, complaint = _record(options), io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            values = vars(tyro.cli(record, args=words, config=_CONFIG))
    except SystemExit:
        said = " ".join(complaint.getvalue().translate(dict.fromkeys(map(ord, "│╭╰╮╯─"), " ")).split())
        raise ConfigError(f"{said}; see diffattn {title} --help") from None
    given: dict[str, Any] = {option.parameter: values[option.parameter] for option in options if option.owner is None}
    hints = typing.get_type_hints(verb)
    for owner in {option.owner for option in options if option.owner is not None}:
        own = [option.parameter for option in options if option.owner == owner]
        given[owner] = hints[owner](**{name: values[name] for name in own})
    return verb(**given)


_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)


def _record(options: Sequence[Option]) -> Any:
    """The table as a dataclass, which is what tyro reads."""
    fields: list[Any] = []
    for option in options:
        said = tyro.conf.arg(metavar=option.metavar, help=option.help, help_behavior_hint=option.hint)
        field = dataclasses.field() if option.default is REQUIRED else dataclasses.field(default=option.default)
        if option.switch:
            said = tyro.conf.arg(help=option.help, help_behavior_hint="")
        fields.append((option.parameter, Annotated[option.annotation, said], field))
    return dataclasses.make_dataclass("options", fields, kw_only=True)


def help_of(title: str, verb: Callable[..., Any]) -> str:
    """The help page of a verb, at most as wide as the terminal."""
    page, record = io.StringIO(), _record(options_of(verb))
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        tyro.cli(record, prog=f"diffattn {title}", description="", args=["--help"], config=_CONFIG)
    usage, _, tables = page.getvalue().partition("\n\n")
    # tyro joins the lines of a description.
    lines = f"{usage}\n\n{description(verb)}\n\n{tables.strip(chr(10))}".replace("positional arguments", "arguments")
    return "\n".join(line.rstrip() for line in lines.splitlines())


def description(verb: Callable[..., Any]) -> str:
    """What a verb does, in lines that fit, and its examples."""
    said = _docstring(verb)
    width = min(WIDTH, shutil.get_terminal_size().columns)
    paragraphs = [said.short_description or "", *(said.long_description or "").split("\n\n")]
    shown = [textwrap.fill(" ".join(paragraph.split()), width) for paragraph in paragraphs if paragraph]
    examples = [textwrap.indent(inspect.cleandoc(entry.description or ""), "  ") for entry in said.examples]
    return "\n\n".join([*shown, *(f"For example:\n{example}" for example in examples)])


def summary(verb: Callable[..., Any]) -> str:
    """The first sentence of a verb's help."""
    return _docstring(verb).short_description or ""


def _docstring(verb: Callable[..., Any]) -> docstring_parser.Docstring:
    return docstring_parser.parse(verb.__doc__ or "", style=docstring_parser.DocstringStyle.GOOGLE)


def chosen(options: Sequence[Option], arguments: Sequence[str]) -> list[str]:
    """The words behind a verb, with each choice as the table has it, however it was written.

    What is no choice stays as it is, for :func:`check` to refuse.
    """
    named = {option.name: option for option in options if option.choices and not option.positional}
    found: list[str] = []
    option: Option | None = None
    for place, word in enumerate(arguments):
        if word == "--":
            return [*found, *arguments[place:]]
        if _is_option(word):
            typed, equals, value = word.partition("=")
            option = named.get(typed.replace("_", "-"))
            found.append(f"{typed}={_choice(option, value)}" if option and equals else word)
            option = None if equals else option
        else:
            found.append(_choice(option, word) if option else word)
            option = option if option and option.many else None
    return found


def _choice(option: Option, value: str) -> str:
    try:
        return one_of(value, option.choices)
    except ConfigError:
        return value


def check(title: str, options: Sequence[Option], arguments: Sequence[str]) -> set[str]:
    """Hold the words behind a verb against its table.

    Returns:
        The parameters whose options stand there by name.

    Raises:
        ConfigError: the first word that is wrong: what was typed, what is wanted.
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
            hint = f"perhaps you meant {near}; " if near else ""
            raise ConfigError(f"{typed} is no option of diffattn {title}; {hint}{see}")
        if option.name in seen:
            once = "give all its values behind one" if option.many else "leave one out"
            raise ConfigError(f"{typed} is given twice; {once}")
        seen.add(option.name)
        if option.switch:
            if equals:
                raise ConfigError(f"{shortened(word)} given; {typed} takes no value: leave out what stands behind it")
            continue
        values = [value] if equals else []
        while not equals and words and not _is_option(words[0]) and (option.many or not values):
            values.append(words.pop(0))
        _check_values(option, typed, values)
    _check_places(title, places, loose)
    for option in options:
        if option.default is REQUIRED and not option.positional and option.name not in seen:
            raise ConfigError(f"{option.name} is missing; wanted: {option.name} {option.metavar}; {see}")
    return {named[name].parameter for name in seen}


def _check_values(option: Option, typed: str, values: list[str]) -> None:
    if not values or len(values) % option.together:
        given = shortened(" ".join([typed, *values]))
        behind = "a value is" if option.together == 1 else f"values in groups of {option.together} are"
        raise ConfigError(f"{given} given; {behind} wanted behind it, as in {option.example}")
    for value in values:
        if (wanted := _wanted(option, value)) is not None:
            raise ConfigError(f"{typed} {shortened(value)!r} given; {wanted} is wanted, as in {option.example}")


def _check_places(title: str, places: list[Option], loose: list[str]) -> None:
    """Values without a name: as many as the verb takes."""
    several = any(option.many for option in places)
    if len(loose) > len(places) and not several:
        takes = " ".join(option.name for option in places) if places else "options alone"
        raise ConfigError(
            f"{shortened(loose[len(places)])!r} is one word too many; diffattn {title} takes {takes}: put a text with "
            f"spaces into quotes; see diffattn {title} --help"
        )
    missing = [option.name for option in places if option.default is REQUIRED][len(loose) :]
    if missing:
        takes = " ".join(option.metavar for option in places)
        raise ConfigError(f"{missing[0]} is missing; wanted: diffattn {title} {takes}; see diffattn {title} --help")
    for option, value in zip(places, loose, strict=False):
        if (wanted := _wanted(option, value)) is not None:
            raise ConfigError(f"{option.name} {shortened(value)!r} given; {wanted} is wanted")


def _wanted(option: Option, value: str) -> str | None:
    """None for a value that the option takes, else what it would take."""
    if option.choices:
        return None if value in option.choices else f"one of {', '.join(option.choices)}"
    if option.kind not in _WANTED:
        return None
    try:
        number = option.kind(value)
    except ValueError:
        return _WANTED[option.kind][0]
    if option.kind is float and not math.isfinite(number):
        return "a finite number"
    return f"a number up to {_LARGEST:,}" if option.kind is int and abs(number) > _LARGEST else None


def _is_option(word: str) -> bool:
    # A single sign is a value: what comes from stdin.
    return word.startswith("-") and word != "-" and not _NUMBER.match(word) and " " not in word.split("=")[0]


def nearest(typed: str, known: Sequence[str] | dict[str, Any]) -> str | None:
    """The known word that a typed one most likely stands for, or None.

    >>> nearest("--stepz", ["--seed", "--steps"]), nearest("--out", ["--html", "--text"])
    ('--steps', None)
    """
    # The signs that all of them begin with would make all of them alike.
    bare = {name.lstrip("-"): name for name in known}
    found = difflib.get_close_matches(typed.lstrip("-").replace("_", "-").lower(), bare, n=1, cutoff=0.6)
    return bare[found[0]] if found else None


def shortened(text: str, length: int = 60) -> str:
    """A text that a line has room for."""
    return text if len(text) <= length else f"{text[:length]}…"


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, tuple) else (value,)
