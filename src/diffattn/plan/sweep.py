"""The plan along one axis, and turned around: what is the largest model, context or batch that a memory holds?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffattn.errors import ConfigError
from diffattn.humanize import count, size
from diffattn.names import one_of
from diffattn.plan.activations import find_backend
from diffattn.plan.answer import named
from diffattn.plan.cost import count_parameters, match_parameters
from diffattn.plan.estimate import estimate
from diffattn.plan.hardware import Machine, load_machine
from diffattn.plan.memory import decoding_memory, prefill_memory, training_memory
from diffattn.plan.named_model import Model
from diffattn.plan.precision import Precision, resolve_precision
from diffattn.plan.rule import shape_about
from diffattn.plan.shape import ModelShape
from diffattn.quantities import short, whole

AXES = ("context", "batch")
# Beyond these nothing is looked for: a context or batch above 2^40, more parameters than the rule reaches.
_FAR = 1 << 40
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
    values: tuple[int, ...]


def parse_tokens(text: str | int, name: str = "context") -> int:
    """A context or a batch: 4096, or 4k, where k is 1024 and M its square, as contexts are named.

    Raises:
        ConfigError: text that is no whole number from 1 to 2^40.

    >>> parse_tokens("4k"), parse_tokens("1M"), parse_tokens(4096)
    (4096, 1048576, 4096)
    """
    value = whole(text, {"": 1, "k": 1024, "m": 1024**2}, most=_FAR)
    if value is None:
        raise ConfigError(
            f"{name} {short(text)} given; a whole number of at least 1 (and at most 2^40) is wanted, such as 4096 or "
            "4k (k is 1024)"
        )
    return value


def parse_sweep(text: str) -> Sweep:
    """An axis with its first and last value, such as ``context=1k:128k`` or ``batch=1:64``.

    Raises:
        ConfigError: another axis, no two values, or a last one below the first.

    >>> parse_sweep("batch=1:6").values
    (1, 2, 4, 6)
    """
    name, equals, ends = text.partition("=")
    first, colon, last = ends.partition(":")
    if not (equals and colon and name.strip() and first.strip() and last.strip()):
        raise ConfigError(
            f"sweep {short(text)} given; context=1k:128k or batch=1:64 is wanted; write an axis and two ends"
        )
    axis = one_of(name.strip(), AXES, given=f"sweep {short(text)} given")
    values = [parse_tokens(first, axis)]
    end = parse_tokens(last, axis)
    if end < values[0]:
        raise ConfigError(f"sweep {short(text)} given; a last value of at least the first is wanted; swap the two")
    while values[-1] < end:
        values.append(min(end, 2 * values[-1]))
    return Sweep(axis, tuple(values))


def parse_size(text: str | int) -> int:
    """Bytes as people write them: 8GiB, 8GB, 512MiB, 8000000000B; G alone is GiB. A text has a unit, an int is bytes.

    Raises:
        ConfigError: no number of bytes from 1 to 10^18, or a text without a unit.

    >>> parse_size("8GiB"), parse_size("1.5 GB"), parse_size("512B"), parse_size(512)
    (8589934592, 1500000000, 512, 512)
    """
    value = whole(text if isinstance(text, str) else f"{text}B", _BYTES)
    if value is None:
        bare = isinstance(text, str) and whole(text, {"": 1}) is not None
        raise ConfigError(
            f"memory {short(text)} given; {'its unit is wanted too' if bare else 'a whole number of bytes is wanted'}, "
            "such as 8GiB or 24GB"
        )
    return value


def sweep(
    along: Sweep | str,
    model: str | Model | None = None,
    against: str | Model | None = None,
    *,
    context: int = 4096,
    batch: int = 1,
    machine: str | Machine | None = "H100 SXM",
    precision: str | Precision = "mixed",
    backend: str = "standard",
    checkpointing: bool = False,
) -> list[dict[str, Any]]:
    """One model or both at each value of an axis, everything else as in ``plan``.

    Returns:
        A row for each value and model: ``axis``, ``value``, ``model``, ``training_bytes`` (None where the weights are
        integers), ``prefill_bytes``, ``decoding_bytes``, ``training_tokens_per_second`` and
        ``decoding_tokens_per_second`` (None without a machine), ``fits_training`` and ``fits_inference`` (in the
        machine's memory; None where it is unknown).

    Raises:
        ConfigError: what ``parse_sweep`` and ``plan`` raise.

    >>> [row["value"] for row in sweep("context=1k:2k", "diff_v1:3M", "softmax:3M")]
    [1024, 1024, 2048, 2048]
    """
    along = parse_sweep(along) if isinstance(along, str) else along
    models, backend = named(model, against), find_backend(backend)
    rates = load_machine(machine) if isinstance(machine, str) else machine
    memory = None if rates is None else rates.memory
    rows: list[dict[str, Any]] = []
    for value in along.values:
        place: dict[str, Any] = {"context": context, "batch": batch} | {along.axis: value}
        for each in models:
            found = estimate(
                each.built, each.attention, precision=precision, backend=backend, checkpointing=checkpointing,
                machine=rates, **place,
            )  # fmt: skip
            training = found["training"] or {"memory": {"total": None}, "tokens_per_second": None}
            peak = training["memory"]["total"]
            prefill, decoding = (found[phase]["memory"]["total"] for phase in ("prefill", "decoding"))
            rows.append(
                {
                    "axis": along.axis,
                    "value": value,
                    "model": each.name,
                    "training_bytes": peak,
                    "prefill_bytes": prefill,
                    "decoding_bytes": decoding,
                    "training_tokens_per_second": training["tokens_per_second"],
                    "decoding_tokens_per_second": found["decoding"]["tokens_per_second"],
                    "fits_training": None if memory is None or peak is None else peak <= memory,
                    "fits_inference": None if memory is None else max(prefill, decoding) <= memory,
                }
            )
    return rows


def fits(
    memory: int | str,
    model: str | Model | None = None,
    *,
    context: int = 4096,
    batch: int = 1,
    precision: str | Precision = "mixed",
    backend: str = "standard",
    checkpointing: bool = False,
) -> list[dict[str, Any]]:
    """What a memory holds: the largest shapes by the rule, and the given model's longest context and largest batch.

    Peaks grow with each of the three, so a bisection finds the last that fits: exactly for context and batch, and for
    shapes to the step of the rule.

    Args:
        memory: bytes, or text such as ``"8GiB"``; leave out of it what the system takes.
        model: as in ``parse_model``; its variant is the DIFF one of the shapes (V1 where it is softmax).
        context, batch, precision, backend, checkpointing: as in ``plan``; what is asked for is the only one to change.

    Returns:
        Rows of ``phase`` (``"training"`` or ``"inference"``), ``what`` (``"parameters"``, ``"context"`` or
        ``"batch"``), ``attention``, ``model`` (the shape's or the model's name), ``value`` (None: not even the least
        fits), ``bytes`` (its peak) and ``limit`` (the memory's bytes).

    Raises:
        ConfigError: bytes that cannot be read, what ``estimate`` raises, or a memory that holds nothing of all this.

    Source: ``shape_about``.

    >>> rows = fits("1GiB", "diff_v1:3M", context=256)
    >>> [row["attention"] for row in rows if row["what"] == "parameters" and row["phase"] == "training"]
    ['diff_v1', 'softmax']
    """
    limit = parse_size(memory)
    given = named(model, None)[0]
    dtypes, backend = resolve_precision(precision), find_backend(backend)
    place: dict[str, Any] = {"precision": dtypes, "backend": backend}
    variant = "diff_v1" if given.attention == "softmax" else given.attention

    def training(shape: ModelShape, attention: str, batch: int, context: int) -> int:
        return training_memory(
            shape, attention, batch=batch, context=context, checkpointing=checkpointing, **place
        ).total

    def inference(shape: ModelShape, attention: str, batch: int, context: int) -> int:
        return max(
            peak(shape, attention, batch=batch, context=context, **place).total
            for peak in (prefill_memory, decoding_memory)
        )

    phases: dict[str, Callable[..., int]] = {"training": training, "inference": inference}
    if dtypes.weights.startswith("int"):
        del phases["training"]
    rows: list[dict[str, Any]] = []
    for phase, need in phases.items():
        for attention in (variant, "softmax"):
            bytes_of = partial(need, attention=attention, batch=batch, context=context)
            found = _largest_shape(attention, bytes_of, limit)
            row: dict[str, Any] = {"phase": phase, "what": "parameters", "attention": attention}
            if found is None:
                rows.append(row | {"model": None, "value": None, "bytes": None})
                continue
            rows.append(
                row
                | {
                    "model": found.name,
                    "value": count_parameters(found, attention).total,
                    "bytes": need(found, attention, batch, context),
                }
            )
        for what, by in (
            ("context", lambda value, n=need: n(given.built, given.attention, batch, value)),
            ("batch", lambda value, n=need: n(given.built, given.attention, value, context)),
        ):
            last = _last(by, limit)
            rows.append(
                {"phase": phase, "what": what, "attention": given.attention, "model": given.name, "value": last or None,
                 "bytes": by(last) if last else None}
            )  # fmt: skip
    if all(row["value"] is None for row in rows):
        raise ConfigError(
            f"memory {memory!r} given; more is wanted: neither {given.name} nor the smallest shape of the rule fits "
            f"with context {context} and batch {batch}; give more, or lower one of the two"
        )
    return [row | {"limit": limit} for row in rows]


def _last(need: Callable[[int], int], limit: int) -> int:
    """The largest integer from 1 whose need is within the limit; 0: none is."""
    if need(1) > limit:
        return 0
    low, high = 1, 2
    while high < _FAR and need(high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if need(middle) <= limit else (low, middle)
    return low


def _largest_shape(attention: str, need: Callable[[ModelShape], int], limit: int) -> ModelShape | None:
    """The largest shape by the rule, matched for V2, that is within the limit; None: not even the smallest is."""
    best: ModelShape | None = None
    low, high = math.log(2e6), math.log(2e12)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        shape = match_parameters(shape_about(math.exp(middle)), attention)
        if need(shape) <= limit:
            low, best = middle, shape
        else:
            high = middle
    return best


def sweep_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The rows of ``sweep`` as text; the first is the header.

    ``trained/s`` and ``decoded/s`` are tokens per second at most; ``fits``: whether training and inference fit. The
    last two columns chart the memory of both, each to its own largest.

    >>> sweep_table(sweep("context=1k:1k", "diff_v1:3M", "softmax:3M"))[0][:3]
    ['context', 'model', 'training']
    """
    header = [
        rows[0]["axis"],
        "model",
        "training",
        "prefill",
        "decoding",
        "trained/s",
        "decoded/s",
        "fits",
        "training",
        "inference",
    ]
    found = [header]
    for row in rows:
        sizes = [size(row[f"{phase}_bytes"]) for phase in ("training", "prefill", "decoding")]
        speeds = [count(row[f"{phase}_tokens_per_second"]) for phase in ("training", "decoding")]
        held = ", ".join({True: "yes", False: "no", None: "–"}[row[f"fits_{way}"]] for way in ("training", "inference"))
        bars = [_bar(_peak(row, way), max(_peak(other, way) for other in rows)) for way in ("training", "inference")]
        found.append([f"{row['value']:,}", row["model"], *sizes, *speeds, held, *bars])
    return found


def _peak(row: dict[str, Any], way: str) -> int:
    phases = ("training",) if way == "training" else ("prefill", "decoding")
    return max(row[f"{phase}_bytes"] or 0 for phase in phases)


def _bar(value: int, most: int, *, width: int = 16) -> str:
    """Eighths of a block, as many as ``value`` is of ``most``.

    >>> _bar(100, 200, width=3), _bar(0, 0)
    ('█▌', '')
    """
    eighths = round(8 * width * value / most) if most else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def fits_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The rows of ``fits`` as text; the first is the header.

    >>> fits_table(fits("1GiB", "diff_v1:3M", context=256))[1][:3]
    ['training', 'most parameters', 'diff_v1']
    """
    names = {"parameters": "most parameters", "context": "longest context", "batch": "largest batch"}
    found = [["phase", "what", "attention", "model", "at most", "memory"]]
    for row in rows:
        most = row["value"] if row["value"] is not None else "nothing fits"
        if isinstance(most, int):
            most = count(most) if row["what"] == "parameters" else f"{most:,}"
        found.append(
            [
                row["phase"],
                names[row["what"]],
                row["attention"],
                row["model"] or "–",
                most,
                size(row["bytes"]),
            ]
        )
    return found
