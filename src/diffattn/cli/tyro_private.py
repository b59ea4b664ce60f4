"""All that is used of tyro, which lays out help pages and turns words into values, and what it does not promise.

The page of ``--help`` begins with its usage, up to the first empty line, and calls words without a name "positional
arguments". A mistake fills a box that is drawn with the characters in ``_BOX``. A test asserts both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from diffattn.errors import ConfigError
from diffattn.private_names import PrivateName

if TYPE_CHECKING:
    from diffattn.cli.options import Option

_BOX = "│╭╰╮╯─"
_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)


def values_of(options: Sequence[Option], words: Sequence[str]) -> list[object]:
    """Returns the value of each option, in their order.

    Raises:
        ConfigError: words that tyro does not take.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            values = tyro.cli(_record(options), args=words, config=_CONFIG)
    except SystemExit:
        said = " ".join(complaint.getvalue().translate(dict.fromkeys(map(ord, _BOX), " ")).split())
        raise ConfigError(said, "the options of this verb", "see its --help") from None
    return [getattr(values, field.name) for field in dataclasses.fields(values)]


def page_of(options: Sequence[Option], program: str) -> tuple[str, str]:
    """Returns the usage of a verb and the tables of its options, as lines that fit the terminal."""
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        tyro.cli(_record(options), prog=program, description="", args=["--help"], config=_CONFIG)
    usage, _, tables = page.getvalue().partition("\n\n")
    return usage, tables.strip("\n").replace("positional arguments", "arguments")


def _record(options: Sequence[Option]) -> Any:
    """Returns the options as a dataclass, which is what tyro reads."""
    fields: list[Any] = []
    for number, option in enumerate(options):
        hint = "" if option.switch else option.hint
        metavar = None if option.switch else option.metavar
        said = tyro.conf.arg(name=option.words, metavar=metavar, help=option.help, help_behavior_hint=hint)
        marks = (tyro.conf.Positional,) if option.positional else ()
        field = dataclasses.field() if option.required else dataclasses.field(default=option.default)
        fields.append((f"option_{number}", Annotated[option.type, said, *marks], field))
    return dataclasses.make_dataclass("options", fields, kw_only=True)


_TESTED = ">=1.0.17,<1.1"
NAMES = (
    PrivateName(
        "tyro._backends._tyro_help_formatting:format_help", _TESTED,
        "diffattn VERB --help: the description of the verb would stand at another place of its page",
        "tyro keeps the lines of a description as they are given",
    ),
    PrivateName(
        "tyro._fmtlib:_Box", _TESTED,
        "the one line of a mistake that tyro alone finds: it would hold parts of the box",
        "tyro returns a mistake instead of printing it",
    ),
)  # fmt: skip
