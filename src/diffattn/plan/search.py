"""The plan at several values of an axis, and the largest model, context or batch that a memory holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

from diffattn.errors import ConfigError
from diffattn.names import one_of
from diffattn.plan.blocks.block import BlockShape
from diffattn.plan.blocks.estimate import estimate_model, inference_need
from diffattn.plan.cost import count_parameters, match_parameters
from diffattn.plan.memory import training_memory
from diffattn.plan.named_model import Model, named
from diffattn.plan.rule import shape_about
from diffattn.plan.setting import DEFAULT_SETTING, FAR, Setting, parse_tokens
from diffattn.plan.shape import ModelShape
from diffattn.quantities import short, whole
from diffattn.variants import BASELINE, DEFAULT, VARIANTS

AXES = ("context", "batch")
# Halvings of the range in which the largest shape is looked for.
_STEPS = 30
_BYTES = {"b": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("kmgtp", start=1)
    for unit, base in (("", 1024), ("ib", 1024), ("b", 1000))
}


@dataclass(frozen=True)
class Sweep:
    """One axis and its values, each twice the one before; the last may be nearer."""

    axis: str
    """``"context"`` or ``"batch"``."""
    values: tuple[int, ...]
    """Tokens or sequences, ascending."""


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One model at one value of an axis."""

    axis: str
    """``"context"`` or ``"batch"``."""
    value: int
    """The tokens or sequences of it."""
    model: str
    """The model's name."""
    training_bytes: int | None
    """Bytes at the peak of a training step; None where the weights are integers."""
    prefill_bytes: int
    """Bytes at the peak of prefill."""
    decoding_bytes: int
    """Bytes at the peak of decoding."""
    training_tokens_per_second: float | None
    """Tokens per second at most; None without a machine or without training."""
    decoding_tokens_per_second: float | None
    """Tokens per second at most; None without a machine."""
    fits_training: bool | None
    """True where the machine's memory holds training; None where the memory is unknown or there is no training."""
    fits_inference: bool | None
    """True where the machine's memory holds inference; None where the memory is unknown."""

    def to_json(self) -> dict[str, object]:
        """Returns the fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class FitRow:
    """The most of one thing that a memory holds."""

    phase: str
    """``"training"`` or ``"inference"``."""
    what: str
    """``"parameters"``, ``"context"`` or ``"batch"``: what is as large as it can be."""
    attention: str
    """The variant."""
    model: str | None
    """The name of the shape or model; None where not even the least shape fits."""
    value: int | None
    """Parameters, tokens or sequences at most; None where not even the least fits."""
    bytes: int | None
    """Bytes at the peak there; None where nothing fits."""
    limit: int
    """Bytes of the memory."""

    def to_json(self) -> dict[str, object]:
        """Returns the fields by name."""
        return asdict(self)


def parse_sweep(text: str) -> Sweep:
    """Reads an axis with its first and last value, such as ``context=1k:128k`` or ``batch=1:64``.

    Raises:
        ConfigError: another axis, no two values, or a last one below the first.

    >>> parse_sweep("batch=1:6").values
    (1, 2, 4, 6)
    """
    name, equals, ends = text.partition("=")
    first, colon, last = ends.partition(":")
    if not (equals and colon and name.strip() and first.strip() and last.strip()):
        raise ConfigError(
            f"sweep {short(text)}", "an axis and its two ends", "write it such as context=1k:128k or batch=1:64"
        )
    axis = one_of(name.strip(), AXES, given=f"sweep {short(text)}")
    values = [parse_tokens(first, axis)]
    end = parse_tokens(last, axis)
    if end < values[0]:
        raise ConfigError(f"sweep {short(text)}", "a last value of at least the first", "swap the two")
    while values[-1] < end:
        values.append(min(end, 2 * values[-1]))
    return Sweep(axis, tuple(values))


def parse_size(text: str | int) -> int:
    """Reads bytes as people write them: 8GiB, 8GB, 512MiB, 8000000000B. G alone is GiB; an int is bytes.

    Raises:
        ConfigError: no number of bytes from 1 to 10^18, or a text without a unit.

    >>> parse_size("8GiB"), parse_size("1.5 GB"), parse_size("512B"), parse_size(512)
    (8589934592, 1500000000, 512, 512)
    """
    value = whole(text if isinstance(text, str) else f"{text}B", _BYTES)
    if value is None:
        bare = isinstance(text, str) and whole(text, {"": 1}) is not None
        wanted = "a number with its unit" if bare else "a whole number of bytes"
        raise ConfigError(f"memory {short(text)}", wanted, "write it such as 8GiB or 24GB")
    return value


def sweep(
    along: Sweep | str,
    model: str | Model | None = None,
    against: str | Model | None = None,
    setting: Setting = DEFAULT_SETTING,
) -> list[SweepRow]:
    """Plans one model or both at each value of an axis; everything else is as in ``plan``, on one rank.

    Args:
        along: the axis and its values, or text such as ``"context=1k:128k"``.
        model, against: as in ``plan``.
        setting: how both are run but for the axis.

    Returns:
        A row for each value and model.

    Raises:
        ConfigError: what ``parse_sweep`` and ``plan`` raise.

    >>> [row.value for row in sweep("context=1k:2k", "diff_v1:3M", "softmax:3M")]
    [1024, 1024, 2048, 2048]
    """
    along = parse_sweep(along) if isinstance(along, str) else along
    models = named(model, against)
    memory = None if setting.machine is None else setting.machine.memory
    rows = []
    for value in along.values:
        at = _at(setting.alone, along.axis, value)
        for each in models:
            found = estimate_model(each.built, each.attention, at)
            peak = None if found.training is None else found.training.memory.total
            rows.append(
                SweepRow(
                    axis=along.axis,
                    value=value,
                    model=each.name,
                    training_bytes=peak,
                    prefill_bytes=found.prefill.memory.total,
                    decoding_bytes=found.decoding.memory.total,
                    training_tokens_per_second=None if found.training is None else found.training.tokens_per_second,
                    decoding_tokens_per_second=found.decoding.tokens_per_second,
                    fits_training=None if memory is None or peak is None else peak <= memory,
                    fits_inference=None if memory is None else found.inference_peak <= memory,
                )
            )
    return rows


def fits(memory: int | str, model: str | Model | None = None, setting: Setting = DEFAULT_SETTING) -> list[FitRow]:
    """Returns what a memory holds: the largest shapes by the rule, and the model's longest context and largest batch.

    Peaks grow with each of the three, so a bisection finds the last that fits: exactly for context and batch, and for
    shapes to the step of the rule.

    Args:
        memory: bytes, or text such as ``"8GiB"``; leave out of it what the system takes.
        model: as in ``parse_model``; its variant is the DIFF one of the shapes (V1 where it is softmax).
        setting: how it is run, on one rank; what is asked for is the only part of it to change.

    Raises:
        ConfigError: bytes that cannot be read, what ``estimate`` raises, or a memory that holds nothing of all this.

    Source: ``shape_about``.

    >>> rows = fits("1GiB", "diff_v1:3M", Setting(context=256))
    >>> [row.attention for row in rows if row.what == "parameters" and row.phase == "training"]
    ['diff_v1', 'softmax']
    """
    limit = parse_size(memory)
    given = named(model, None)[0]
    differ = isinstance(given.built, BlockShape)
    variant = DEFAULT if differ or given.attention == BASELINE else given.attention
    # Noise heads are shared where several query heads share a key/value head.
    group = given.shape.num_heads // given.shape.num_kv_heads if VARIANTS[variant].shares_noise else 1
    rows = []
    for phase, need in _PEAKS.items():
        if phase == "training" and not setting.precision.trains:
            continue
        for attention in (variant, BASELINE):
            found = _largest_shape(need, attention, setting, limit, group)
            if found is None:
                rows.append(FitRow(phase, "parameters", attention, None, None, None, limit))
                continue
            total, peak = count_parameters(found, attention).total, need(found, attention, setting)
            rows.append(FitRow(phase, "parameters", attention, found.name, total, peak, limit))
        for axis in () if differ and phase == "training" else AXES:
            by = partial(_need_at, need, given, setting, axis)
            last = _last(by, limit)
            most, peak_there = (last, by(last)) if last else (None, None)
            rows.append(FitRow(phase, axis, given.attention, given.name, most, peak_there, limit))
    if all(each.value is None for each in rows):
        raise ConfigError(
            f"memory {memory!r}",
            f"more, for neither {given.name} nor the smallest shape of the rule fits with context {setting.context} "
            f"and batch {setting.batch}",
            "give more, or lower one of the two",
        )
    return rows


def _training_bytes(shape: ModelShape, attention: str, setting: Setting) -> int:
    return training_memory(shape, attention, setting).total


Need = Callable[[ModelShape, str, Setting], int]
_PEAKS: dict[str, Need] = {"training": _training_bytes, "inference": inference_need}


def _at(setting: Setting, axis: str, value: int) -> Setting:
    """Returns the setting at another value of an axis."""
    return replace(setting, context=value) if axis == "context" else replace(setting, batch=value)


def _need_at(need: Need, model: Model, setting: Setting, axis: str, value: int) -> int:
    return need(model.built, model.attention, _at(setting, axis, value))


def _last(need: Callable[[int], int], limit: int) -> int:
    """Returns the largest integer from 1 whose need is within the limit; 0: none is."""
    if need(1) > limit:
        return 0
    low, high = 1, 2
    while high < FAR and need(high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if need(middle) <= limit else (low, middle)
    return low


def _largest_shape(need: Need, attention: str, setting: Setting, limit: int, group: int) -> ModelShape | None:
    """Returns the largest shape by the rule, matched for V2, within the limit; None: not even the smallest is."""
    best: ModelShape | None = None
    # The rule's smallest shape is wider where more heads share a key/value head.
    low, high = math.log(2e6 * group), math.log(2e12)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        shape = match_parameters(shape_about(math.exp(middle), group=group), attention)
        if need(shape, attention, setting) <= limit:
            low, best = middle, shape
        else:
            high = middle
    return best
