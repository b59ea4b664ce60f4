"""The options of a verb as one table: what its help shows, and what is held against the words that a person typed.

The table is made of the verb's signature. A parameter whose type is a dataclass stands for the fields of that
dataclass, which belongs to the library; another one has its sentence in the verb's docstring. Keyword-only parameters
are options, the others are words without a name. A field may say more in its ``metadata``, and a parameter in a mapping
behind its type in ``Annotated``: see ``More``.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, cast

import docstring_parser

REQUIRED = inspect.Parameter.empty
WIDTH = 80
EXAMPLES: dict[type, str] = {int: "3", float: "0.5"}
_METAVARS: dict[type, str] = {int: "INT", float: "FLOAT", Path: "FOLDER"}
_FILES = ("png", "html")
# Said once for all verbs that have them and say nothing else.
_HELP = {
    "json": "Print the result as JSON on stdout.",
    "png": "Picture file to write the chart into.",
    "html": "File to write a web page into.",
}
_QUOTED = re.compile(r"``([^`]+)``")


class More(TypedDict, total=False):
    """Facts about an option that its name, its type and its default do not tell."""

    option: str | None
    """The name on the command line, where that is not the name of the field; None for a field that is no option."""
    also: tuple[str, ...]
    """Older names of the option, which are accepted and not shown."""
    choices: Collection[object]
    """The values that are allowed, where the type does not say them."""
    value: str
    """The word that stands for the value in the help, such as SIZE."""


@dataclass(frozen=True)
class Option:
    """One option, as a person writes it and as the verb takes it.

    Attributes:
        parameter: name of the parameter, or of the field of its dataclass.
        name: the option as it is typed, such as ``--batch-size``; for a word without a name, what help calls it.
        words: the name without its dashes.
        also: older names that are accepted, with their dashes.
        type: type of the whole value.
        kind: type of one value; bool for a switch.
        choices: the values that are allowed; empty for any.
        many: whether several values may follow.
        together: how many of these values belong to each other.
        positional: whether it is a word without a name.
        metavar: what help shows for the value.
        default: the default; ``REQUIRED`` for none.
        help: the sentence of the help.
        owner: the parameter whose dataclass has it as a field; None for a parameter of the verb itself.
    """

    parameter: str
    name: str
    words: str
    also: tuple[str, ...]
    type: Any
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
        """True for an option that takes no value."""
        return self.kind is bool

    @property
    def required(self) -> bool:
        """True for an option that has no default."""
        return self.default is REQUIRED

    @property
    def hint(self) -> str:
        """The default as help shows it; empty where the sentence says it, or where a switch is off."""
        if self.required:
            return "(required)"
        if self.switch or "Default:" in self.help:
            return ""
        return f"(default: {self._default})" if self._default else "(optional)"

    @property
    def example(self) -> str:
        """The option with a value that it takes."""
        value = self.choices[0] if self.choices else EXAMPLES.get(self.kind, self.metavar.split()[0])
        return f"{self.name} {self._default or value}"

    @property
    def _default(self) -> str:
        if self.required or self.default is None or self.default == ():
            return ""
        return " ".join(map(str, _flat(self.default if self.many else (self.default,))))


def options_of(verb: Callable[..., object]) -> list[Option]:
    """Returns the table of a verb, in the order of its signature.

    >>> def verb(*, steps: int = 300) -> None:
    ...     '''Train.
    ...
    ...     Args:
    ...         steps: Number of steps.
    ...     '''
    >>> [(option.name, option.metavar, option.hint) for option in options_of(verb)]
    [('--steps', 'INT', '(default: 300)')]
    """
    hints = typing.get_type_hints(verb, include_extras=True)
    said = _HELP | {entry.arg_name: entry.description or "" for entry in _docstring(verb).params}
    found: list[Option] = []
    for name, parameter in inspect.signature(verb).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            found += _fields(hints[name], name)
        else:
            positional = parameter.kind is not parameter.KEYWORD_ONLY
            found.append(_option(name, hints[name], parameter.default, said.get(name, ""), positional=positional))
    # A sentence of the library names another field in quotes of two backticks; here that is an option.
    names = {option.parameter: option.name for option in found}
    return [dataclasses.replace(option, help=_QUOTED.sub(lambda word: names.get(word[1], word[1]), option.help))
            for option in found]  # fmt: skip


def _fields(record: Any, owner: str) -> Iterator[Option]:
    hints = typing.get_type_hints(record, include_extras=True)
    said: dict[str, str] = {}
    for base in reversed(record.__mro__[:-1]):
        said |= {entry.arg_name: entry.description or "" for entry in docstring_parser.parse_from_object(base).params}
    for field in dataclasses.fields(record):
        if field.metadata.get("option", field.name) is not None:
            more = cast(More, field.metadata)
            option = _option(field.name, hints[field.name], field.default, said.get(field.name, ""), more)
            yield dataclasses.replace(option, owner=owner)


def _option(
    parameter: str,
    annotation: Any,
    default: object,
    sentence: str,
    more: More | None = None,
    *,
    positional: bool = False,
) -> Option:
    if typing.get_origin(annotation) is Annotated:
        annotation, more = typing.get_args(annotation)
    more = more or More()
    kind, choices, many, together = _values(annotation)
    choices = choices or tuple(map(str, more.get("choices", ())))
    words = (more.get("option") or parameter).replace("_", "-")
    word = words.rpartition("-")[2].upper()
    usual = "FILE" if parameter in _FILES else _METAVARS.get(kind, word.removesuffix("S") if many else word)
    metavar = more.get("value") or ("{" + ",".join(choices) + "}" if choices else usual)
    name = metavar if positional else f"--no-{words}" if kind is bool and default is True else f"--{words}"
    return Option(
        parameter=parameter,
        name=name,
        words=words,
        also=tuple(f"--{older}" for older in more.get("also", ())),
        type=annotation,
        kind=kind,
        choices=choices,
        many=many,
        together=together,
        positional=positional,
        metavar=f"{' '.join([metavar] * together)} ..." if many else metavar,
        default=REQUIRED if default is dataclasses.MISSING else default,
        help=" ".join(sentence.split()),
    )


def _values(plain: Any) -> tuple[type, tuple[str, ...], bool, int]:
    """Returns the type of one value, what it may be, whether there may be several, and how many belong together."""
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


def help_of(title: str, verb: Callable[..., object]) -> str:
    """Returns the help page of a verb, at most as wide as the terminal."""
    from diffattn.cli.tyro_private import page_of

    usage, tables = page_of(options_of(verb), f"diffattn {title}")
    # tyro joins the lines of a description, so it gets none.
    return "\n".join(line.rstrip() for line in f"{usage}\n\n{description(verb)}\n\n{tables}".splitlines())


def description(verb: Callable[..., object]) -> str:
    """Returns what the docstring of a verb says of it, in lines that fit, and its examples."""
    said = _docstring(verb)
    width = min(WIDTH, shutil.get_terminal_size().columns)
    paragraphs = [said.short_description or "", *(said.long_description or "").split("\n\n")]
    shown = [textwrap.fill(" ".join(paragraph.split()), width) for paragraph in paragraphs if paragraph]
    examples = [textwrap.indent(inspect.cleandoc(entry.description or ""), "  ") for entry in said.examples]
    return "\n\n".join([*shown, *(f"For example:\n{example}" for example in examples)])


def summary(verb: Callable[..., object]) -> str:
    """Returns the first sentence of a verb's help."""
    return _docstring(verb).short_description or ""


def _docstring(verb: Callable[..., object]) -> docstring_parser.Docstring:
    return docstring_parser.parse(verb.__doc__ or "", style=docstring_parser.DocstringStyle.GOOGLE)


def _flat(values: Any) -> Iterator[object]:
    for value in values:
        yield from value if isinstance(value, tuple) else (value,)
