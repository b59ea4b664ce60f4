"""The page of `diffattn plan`: one file that opens offline and whose sliders compute what Python computes.

Every quantity is a polynomial in the batch B and the context T for each precision, backend and checkpointing. Python
solves for its exact coefficients and the page's script evaluates them: nothing is approximated, nothing is repeated.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

from diffattn import humanize as written
from diffattn.plan import memory
from diffattn.plan.activations import resolve
from diffattn.plan.answer import backends_of
from diffattn.plan.cost import count_parameters, weight_bytes
from diffattn.plan.estimate import DISK_DTYPES, Estimate, estimate
from diffattn.plan.hardware import MACHINES, Machine
from diffattn.plan.inference import Inference
from diffattn.plan.result import BackendRow, Plan, RatioRow
from diffattn.plan.setting import PRECISIONS, Precision, Setting
from diffattn.plan.shape import ModelShape
from diffattn.report import charts
from diffattn.report.page import render_scripted

# Five points to solve at, two to see that the solution holds elsewhere.
POINTS = ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 5), (7, 4093))


@functools.cache
def solve(name: str, values: tuple[int | Fraction, ...]) -> tuple[int, ...]:
    """The exact coefficients of 1, B, T, B·T and B·T², after the denominator that they share.

    Args:
        name: what the quantity is called, for the error.
        values: what it is at each (batch, context) of ``POINTS``.

    Raises:
        ValueError: no such polynomial has these values.

    >>> solve("cache", tuple(3 * batch * context + 1 for batch, context in POINTS))
    (1, 1, 0, 0, 3, 0)
    """
    one, two, three, other, another = map(Fraction, values[:5])
    # At B = 1: p + q·T + e·T². At B = 2 the same with 2e: two equations for p and q there.
    e = (three - 2 * two + one) / 2
    q, q_twice = two - one - 3 * e, another - other - 6 * e
    p, p_twice = one - q - e, other - q_twice - 2 * e
    coefficients = (2 * p - p_twice, p_twice - p, 2 * q - q_twice, q_twice - q, e)
    for (batch, context), value in zip(POINTS, values, strict=True):
        terms = (1, batch, context, batch * context, batch * context * context)
        if sum(c * term for c, term in zip(coefficients, terms, strict=True)) != value:
            raise ValueError(f"{name} is no polynomial in 1, B, T, B·T and B·T²: at B={batch}, T={context} it departs")
    shared = math.lcm(*(coefficient.denominator for coefficient in coefficients))
    return (shared, *(int(coefficient * shared) for coefficient in coefficients))


class Polynomials:
    """The different polynomials of a page, each kept once and known by its place."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, ...], int] = {}

    def add(self, name: str, values: Iterable[int | Fraction]) -> int:
        """The place of the polynomial that has these values at ``POINTS``."""
        return self.places.setdefault(solve(name, tuple(values)), len(self.places))

    def add_moments(self, name: str, at_points: Iterable[Iterable[Any]]) -> list[dict[str, int]]:
        """For each moment the places of its parts, from the moments at ``POINTS``; parts that are 0 are left out."""
        found = [
            {part: self.add(f"{name}, {part}", [getattr(moment, part) for moment in same]) for part in vars(same[0])}
            for same in zip(*at_points, strict=True)
        ]
        nothing = self.places.get((1, 0, 0, 0, 0, 0))
        return [{part: place for part, place in moment.items() if place != nothing} for moment in found]


CHECKPOINTING = {"off": "off", "on": "on"}
LIMITS = {"context": (128, 1_048_576), "batch": (1, 1024)}
# Tints that tell parts apart for the colour-blind too; the models keep their own colours.
PARTS = {
    "weights": ("weights", "#56b4e9"),
    "gradients": ("gradients", "#009e73"),
    "optimizer": ("optimizer state", "#8a6a00"),
    "cache": ("key/value cache", "#b0548a"),
    "activations": ("activations", "#e69f00"),
    "scores": ("score matrices", "#d1242f"),
    "workspace": ("workspace", "#afb8c1"),
}


# What a key of the result's rows begins with, by the part of the table that it belongs to; the rest is the model.
GROUPS = {
    "Model": (),
    "Training": ("train", "score"),
    "Inference": ("prefill", "decoding", "cache"),
    "Disk and start": ("disk", "read", "first"),
}
BACKEND_CELLS = {
    "score_bytes": "size",
    "cache_bytes": "size",
    "training_flops_per_token": "flops",
    "training_bytes": "size",
    "inference_bytes": "size",
}
SIDES = ("model", "against")
NO_MACHINE = Machine("none: no times")

_NOTES = {
    "table_note": "“×” is the first model's number over the second's.",
    "speed_note": "What the machine's peak rates allow: the longer of the arithmetic and the bytes moved. Real "
    "runs reach a part of it; the ratio of the two models is what to read.",
    "backends_note": "“To softmax”: beside a softmax model of the same shape. "
    "A score matrix is T × T for each query head. Backends that work in tiles never write one out; "
    "“materialised” does, and keeps it for the backward pass.",
    "made": "The script in this page evaluates polynomials in batch and context that Python solved for exactly; a "
    "setting's address can be shared, for it ends in the setting.",
}


class Given(NamedTuple):
    """What the page takes from a result: by side the name, variant and shape of a model, and what can be chosen."""

    names: dict[str, str]
    attentions: dict[str, str]
    shapes: dict[str, ModelShape]
    state: dict[str, Any]
    precisions: dict[str, Precision]
    machines: dict[str, Machine]
    backends: list[str]


def render_plan(result: Plan) -> str:
    """The page of a plan, as HTML.

    Args:
        result: what ``diffattn.plan.answer.plan`` returned.

    Raises:
        ValueError: a quantity that is no polynomial in batch and context.
    """
    given = _given(result)
    rows = [row for row in result.ratios if not row.key.startswith("rank_")]
    data = page_data(given, rows)
    options = _options(given)
    return render_scripted(
        "plan.html",
        "plan.js",
        data,
        title=" against ".join(given.names.values()),
        colour=data["models"][0]["colour"],
        answers=[*result.sentences, *result.notes],
        setting=_setting(given.state, options),
        limits=data["limits"],
        options=options,
        state=given.state,
        models=data["models"],
        groups=_groups(rows, list(given.names)),
        parts=data["parts"].values(),
        backends=_backends(result.backends, data["models"]),
        command=result.command,
        **_NOTES,
    )


def page_data(given: Given, rows: Sequence[RatioRow]) -> dict[str, Any]:
    """What the page's script computes with."""
    polynomials = Polynomials()
    costs = [_costs(given, side, polynomials) for side in given.names]
    state = given.state
    limits = {key: [min(low, state[key]), max(high, state[key])] for key, (low, high) in LIMITS.items()}
    low, high = limits["context"]
    doublings = (2**power for power in range(low.bit_length(), high.bit_length()))
    return {
        "limits": limits,
        "state": state,
        "contexts": sorted({low, high, *doublings}),
        "machines": {name: _rates(machine) for name, machine in given.machines.items()},
        "dtypes": {name: precision.activations for name, precision in given.precisions.items()},
        "models": _models(given),
        "parts": {key: {"label": label, "colour": colour} for key, (label, colour) in PARTS.items()},
        "formats": {row.key: row.format for row in rows},
        "costs": costs,
        "polynomials": list(polynomials.places),
    }


def _models(given: Given) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for side in given.names:
        shape, attention = given.shapes[side], given.attentions[side]
        look = charts.look(attention, list(charts.LOOKS))
        if found and attention == given.attentions["model"]:
            look = charts.MORE_LOOKS[0]
        counted = count_parameters(shape, attention)
        found.append(
            {
                "side": side,
                "name": given.names[side],
                "colour": look.colour,
                "dash": "" if look.line == "-" else " ".join(str(2 * length) for length in look.line[1]),
                "constants": {
                    "parameters": counted.total,
                    "attention_parameters": counted.attention,
                    **{f"disk_bytes_{dtype}": weight_bytes(shape, attention, dtype=dtype) for dtype in DISK_DTYPES},
                },
            }
        )
    return found


def _rates(machine: Machine) -> dict[str, Any]:
    keys = ("name", "flops", "bandwidth", "memory", "disk")
    return {key: getattr(machine, key) for key in keys}


def _costs(given: Given, side: str, polynomials: Polynomials) -> dict[str, dict[str, Any]]:
    """What one model costs, as places of polynomials: by phase, and by what is chosen besides batch and context."""
    shape, name = given.shapes[side], given.attentions[side]
    found: dict[str, dict[str, Any]] = {"training": {}, "prefill": {}, "decoding": {}, "work": {}}
    for backend, (key, precision) in itertools.product(backends_of(name), given.precisions.items()):
        choice = f"{key} {backend}"
        chosen = Setting(precision=precision, backend=backend, machine=None)
        points = [replace(chosen, batch=batch, context=context) for batch, context in POINTS]
        inference = [Inference(shape, name, point) for point in points]
        found["prefill"][choice] = polynomials.add_moments(f"prefill of {name}", [one.prefill() for one in inference])
        found["decoding"][choice] = polynomials.add_moments(
            f"decoding of {name}", [one.decoding() for one in inference]
        )
        for checkpointing in CHECKPOINTING:
            choice = f"{key} {backend} {checkpointing}"
            again = [replace(point, checkpointing=checkpointing == "on") for point in points]
            if precision.trains:
                moments = [memory.training_moments(shape, name, point).values() for point in again]
                found["training"][choice] = polynomials.add_moments(f"training of {name}", moments)
            work = [_work(estimate(shape, name, point)) for point in again]
            found["work"][choice] = {
                quantity: polynomials.add(f"{quantity} of {name}", [at_point[quantity] for at_point in work])
                for quantity in work[0]
            }
    return found


def _work(found: Estimate) -> dict[str, int]:
    """What the script needs besides memory, of an estimate."""
    work: dict[str, Any] = {}
    for name, phase in (("training", found.training), ("prefill", found.prefill), ("decoding", found.decoding)):
        if phase is not None:
            work |= {f"{name}_flops": phase.flops, f"{name}_bytes_moved": phase.bytes_moved}
    if found.training is not None:
        work["gradient_bytes"] = found.gradient_bytes
        work |= {f"training_{key}_flops": value for key, value in vars(found.training.flops_per_token).items()}
    return work | {"score_bytes": found.score_bytes}


def _groups(rows: Sequence[RatioRow], sides: list[str]) -> list[dict[str, Any]]:
    def title(key: str) -> str:
        return next((title for title, starts in GROUPS.items() if key.startswith(starts)), "Model")

    def cells(row: RatioRow) -> dict[str, Any]:
        own = [_cell(row.format, getattr(row, side)) | {"model": side} for side in sides]
        return {**row.to_json(), "cells": own, "ratio": _ratio(row.model, row.against)}

    found = {name: [cells(row) for row in rows if title(row.key) == name] for name in GROUPS}
    return [{"title": name, "rows": of_group} for name, of_group in found.items()]


def _cell(form: str, value: float | None) -> dict[str, Any]:
    return {
        "value": "" if value is None else value,
        "exact": written.exact(value),
        "text": getattr(written, form)(value),
    }


def _ratio(value: float | None, reference: float | None) -> str:
    if value is None or not reference:
        return ""
    ratio = value / reference
    return "same" if value == reference else f"{ratio:.{2 if abs(ratio - 1) >= 0.005 else 4}f}×"


def _backends(rows: Sequence[BackendRow], models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The result's rows, each for the first model of its name; backends that are another by a second name left out."""
    found = {}
    for row in rows:
        if resolve(row.attention, row.backend) != row.backend:
            continue
        model = next(model for model in models if model["name"] == row.model)
        twin = row.score_ratio_to_twin
        found[model["side"], row.backend] = {
            **model,
            "backend": row.backend,
            "twin": written.MISSING if twin is None else f"{twin:.2f}×",
            "cells": {key: _cell(form, getattr(row, key)) for key, form in BACKEND_CELLS.items()},
        }
    return list(found.values())


def _options(given: Given) -> dict[str, list[tuple[str, str]]]:
    return {
        "precision": [(name, name) for name in given.precisions],
        "machine": [(key, machine.name) for key, machine in given.machines.items()],
        "backend": [(name, name) for name in given.backends],
        "checkpointing": list(CHECKPOINTING.items()),
    }


def _setting(state: Mapping[str, Any], options: Mapping[str, list[tuple[str, str]]]) -> str:
    """The setting in words, as the page's script writes it too."""
    labels = {
        "context": "context",
        "batch": "batch",
        "precision": "precision",
        "machine": "machine",
        "backend": "attention backend",
        "checkpointing": "gradient checkpointing",
    }
    words = {key: dict(options[key])[state[key]] if key in options else f"{state[key]:,}" for key in labels}
    return " · ".join(f"{label} {words[key]}" for key, label in labels.items())


def _given(result: Plan) -> Given:
    setting = result.setting
    sides = dict(zip(SIDES, result.models, strict=False))
    attentions = {side: each.attention for side, each in sides.items()}
    precisions = dict(PRECISIONS)
    chosen = setting.precision.name or "as given"
    precisions[chosen] = setting.precision
    machine = NO_MACHINE if setting.machine is None else setting.machine
    key = machine.name if MACHINES.get(machine.name, machine) == machine else f"{machine.name} (given)"
    shared = set.intersection(*(set(backends_of(attention)) for attention in attentions.values()))
    # The definition is what fused computes.
    backend = "fused" if setting.backend == "definition" else setting.backend
    return Given(
        names={side: each.name for side, each in sides.items()},
        attentions=attentions,
        shapes={side: each.shape for side, each in sides.items()},
        state={
            "context": setting.context,
            "batch": setting.batch,
            "precision": chosen,
            "machine": key,
            "backend": backend,
            "checkpointing": "on" if setting.checkpointing else "off",
        },
        precisions=precisions,
        machines={**MACHINES, key: machine},
        backends=[name for name in backends_of(attentions["model"]) if name in shared - {"definition"}],
    )
