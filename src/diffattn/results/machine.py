"""The row that ``diffattn doctor --benchmark`` writes of one machine, and how a row that somebody posted is read."""

from __future__ import annotations

import datetime
import math
import types
import typing
from dataclasses import dataclass
from typing import Any

from diffattn.errors import ConfigError
from diffattn.results.base import Result
from diffattn.sealed import SEAL, sealed, unbroken
from diffattn.variants import VARIANTS

FORM = 1
"""The number of the form; rows of one form were measured on the same models in the same way."""
ENGINES = ("torch", "onnxruntime")
PHASES = ("prefill", "decoding")
_AGAIN = "run diffattn doctor --benchmark again and post its row as it is"
# No row of a machine has so much of anything.
_MOST, _LONGEST, _TEXT = 1e30, 100, 200


@dataclass(frozen=True, kw_only=True)
class Spread(Result):
    """The middle of several rounds, and a fifth of them below and above."""

    median: float
    """The middle round."""
    p20: float
    """A fifth of the rounds are below it."""
    p80: float
    """A fifth of the rounds are above it."""


@dataclass(frozen=True, kw_only=True)
class Rates(Result):
    """The rates of the machine, each the best of a few runs, with the threads that torch has."""

    read: float
    """Bytes of main memory that a sum reads per second."""
    copy: float
    """Bytes that a copy reads and writes per second."""
    disk: float
    """Bytes that reading a file takes from disk per second; of a folder in memory, from memory."""
    fp32: float
    """FLOP/s of a product of two matrices in float32."""
    bf16: float
    """FLOP/s of the same in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class AttentionTime(Result):
    """One call of an attention operation: 16 softmax heads of 64, or the differential heads that replace them."""

    attention: str
    """The variant."""
    phase: str
    """``prefill``: as many queries as keys; ``decoding``: one query."""
    tokens: int
    """Keys that the queries see."""
    seconds: Spread
    """Seconds of one call."""


@dataclass(frozen=True, kw_only=True)
class Speed(Result):
    """The speed of one model in one engine."""

    engine: str
    """``torch`` or ``onnxruntime``."""
    attention: str
    """The variant."""
    bits: int
    """Bits of a weight."""
    phase: str
    """``prefill``: a prompt is read; ``decoding``: one token after another is written."""
    tokens: int
    """Tokens of the prompt; in decoding, tokens in the cache when it begins."""
    tokens_per_second: Spread
    """Tokens per second, over rounds in which the models of one engine take turns."""
    at_most: float
    """Tokens per second that the planner allows on a machine of the measured rates."""
    reached: float
    """The median as a share of that."""


@dataclass(frozen=True, kw_only=True)
class MachineRow(Result):
    """The row of one machine, as ``diffattn doctor --benchmark`` makes it: no name of a person, a host or a folder."""

    benchmark: str
    """Always ``machine``."""
    form: int
    """``FORM`` of the release that measured."""
    name: str
    """The board or the processor, as the system names it."""
    architecture: str
    """The instruction set, such as ``aarch64``."""
    system: str
    """The operating system and its release."""
    cores: int
    """Cores that the process could use."""
    threads: int
    """Threads of torch and of onnxruntime."""
    memory: int
    """Bytes of main memory."""
    kernel: str
    """The backend that serves attention in float32: ``fused_cpu`` or ``standard``."""
    python: str
    """The version of Python."""
    diffattn: str
    """The version of diffattn."""
    torch: str
    """The version of PyTorch."""
    onnxruntime: str | None
    """The version of onnxruntime; None where it is not installed, and its speeds are then absent."""
    date: str
    """The day, in the year, month and day of ISO 8601."""
    load: float
    """Processes that waited for a core, on average over the minute before."""
    celsius: tuple[float, ...]
    """The processor's temperature before and after; empty where the system does not say it."""
    parameters: dict[str, int]
    """Parameters of the measured model, by variant."""
    rates: Rates
    """The rates of the machine."""
    attention: tuple[AttentionTime, ...]
    """The times of the attention operation alone."""
    speeds: tuple[Speed, ...]
    """The speeds of the models."""
    seconds: float
    """Seconds that the whole measurement took, without compiling the kernel."""
    command: str
    """The command that made the row."""

    def to_json(self) -> dict[str, object]:
        """Returns the row as JSON takes it, with its seal."""
        return sealed(super().to_json())

    @classmethod
    def from_json(cls, values: object) -> MachineRow:
        """Returns the row that an object of JSON holds.

        Raises:
            ConfigError: it is no such object, was changed after it was measured, is of another form, or holds what
                nobody can have measured.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"a row that is {_shown(values)}", "a JSON object", _AGAIN)
        if values.get("benchmark") != "machine" or values.get("form") != FORM:
            given = f"a row of benchmark {_shown(values.get('benchmark'))}, form {_shown(values.get('form'))}"
            raise ConfigError(given, f"one of benchmark 'machine', form {FORM}",
                              "run diffattn doctor --benchmark of this release")  # fmt: skip
        if SEAL not in values or not unbroken(values):
            raise ConfigError("a row that was changed after it was measured", "the row itself, with its seal", _AGAIN)
        row: MachineRow = _read(cls, {key: value for key, value in values.items() if key != SEAL}, "the row")
        row._check()
        return row

    def _check(self) -> None:
        """Raises a ``ConfigError`` for what the types of the fields allow and a measurement cannot give."""
        try:
            datetime.date.fromisoformat(self.date)
        except ValueError:
            raise ConfigError(f"a row of date {self.date!r}", "a day such as 2026-11-27", _AGAIN) from None
        for name in self.parameters:
            _one_of("attention", name, VARIANTS)
        for call in self.attention:
            _one_of("attention", call.attention, VARIANTS)
            _one_of("phase", call.phase, PHASES)
        for speed in self.speeds:
            _one_of("attention", speed.attention, VARIANTS)
            _one_of("phase", speed.phase, PHASES)
            _one_of("engine", speed.engine, ENGINES)
            _one_of("bits", speed.bits, (32, 16, 8, 4))
            if not math.isclose(speed.reached * speed.at_most, speed.tokens_per_second.median, rel_tol=0.01):
                raise ConfigError(
                    f"a speed of {speed.tokens_per_second.median:g} that is {speed.reached:g} of {speed.at_most:g}",
                    "the share that the two make", _AGAIN,
                )  # fmt: skip
        for spread in (*(call.seconds for call in self.attention), *(one.tokens_per_second for one in self.speeds)):
            if not 0 < spread.p20 <= spread.median <= spread.p80:
                given = f"rounds from {spread.p20:g} over {spread.median:g} to {spread.p80:g}"
                raise ConfigError(given, "three numbers above 0, none below the one before", _AGAIN)


def _one_of(key: str, value: object, allowed: typing.Collection[object]) -> None:
    if value not in allowed:
        raise ConfigError(f"a row with {key}={value!r}", f"one of {', '.join(map(str, allowed))}", _AGAIN)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _read(kind: Any, value: object, where: str) -> Any:
    """Returns a value as the type of its field says, or raises a ``ConfigError`` that names it."""
    if isinstance(kind, type) and issubclass(kind, Result) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        if list(value) != list(hints):
            wrong = ", ".join(sorted({*value} ^ {*hints})) or "another order of keys"
            raise ConfigError(f"{where} with {_shown(wrong)}", f"the keys {', '.join(hints)}", _AGAIN)
        return kind(**{key: _read(hints[key], one, f"{where}'s {key}") for key, one in value.items()})
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _read(parts[0], value, where)
    if origin is tuple and isinstance(value, list) and len(value) <= _LONGEST:
        return tuple(_read(parts[0], one, f"{where} number {number}") for number, one in enumerate(value, 1))
    if origin is dict and isinstance(value, dict) and len(value) <= _LONGEST:
        return {_read(parts[0], key, where): _read(parts[1], one, f"{where} of {key!r}") for key, one in value.items()}
    if kind is str and isinstance(value, str) and len(value) <= _TEXT and value.isprintable():
        return value
    number = int if kind is int else (int, float)
    if kind in (int, float) and isinstance(value, number) and not isinstance(value, bool) and 0 <= value <= _MOST:
        return value
    raise ConfigError(f"{where} is {_shown(value)}", _wanted(kind), _AGAIN)


def _wanted(kind: Any) -> str:
    if kind is str:
        return f"a text of at most {_TEXT} characters that can be printed"
    if kind is int:
        return "a whole number from 0"
    return "a number from 0" if kind is float else "what diffattn doctor --benchmark writes there"
