"""The three answers of a plan, from its numbers: memory, training against inference, small machines."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from diffattn.humanize import count, seconds, size
from diffattn.plan.activations import ONE_MAP
from diffattn.plan.estimate import inference_peak
from diffattn.plan.hardware import MACHINES, GiB
from diffattn.plan.memory import decoding_memory, prefill_memory
from diffattn.plan.named_model import Model
from diffattn.plan.precision import Precision
from diffattn.plan.shape import BuiltShape

SMALL_MACHINES = ("RTX 3060 12GB", "Apple M2", "DDR5 desktop", "Raspberry Pi 5")
SMALL_PRECISION = Precision("int4", "bf16", "bf16", "bf16", "bf16")


def memory_sentence(result: dict[str, Any], model: Model) -> str:
    """Whether fewer parameters win back the memory of a second map, and where there is any to win back."""
    one, other = result["model"], result["against"]
    if other is None:
        return _own_memory(one) + _maps(result, model)
    a, b = one["estimate"], other["estimate"]
    share = a["parameters"]["total"] / b["parameters"]["total"]
    pairs = [("inference", inference_peak(a), inference_peak(b))]
    if a["training"] and b["training"]:
        pairs.insert(0, ("training", a["training"]["memory"]["total"], b["training"]["memory"]["total"]))
    parts = [f"{size(x)} against {size(y)} in {phase} ({x / y:.2f}×)" for phase, x, y in pairs]
    cheaper = [phase for phase, x, y in pairs if x < y]
    won = "in " + " and in ".join(cheaper) if cheaper else "in neither" if len(pairs) > 1 else "not here"
    text = (
        f"{one['name']} has {share:.0%} of the parameters of {other['name']} "
        f"({count(a['parameters']['total'])} of {count(b['parameters']['total'])}) and needs {' and '.join(parts)}: "
        f"it needs less {won}."
    )
    return text + _maps(result, model)


def _own_memory(one: dict[str, Any]) -> str:
    found = one["estimate"]
    peaks = [f"{size(inference_peak(found))} in inference"]
    if found["training"]:
        peaks.insert(0, f"{size(found['training']['memory']['total'])} in training")
    return f"{one['name']} has {count(found['parameters']['total'])} parameters and needs {' and '.join(peaks)}."


def _maps(result: dict[str, Any], model: Model) -> str:
    """What the second map costs beside a softmax model of the same shape; nothing where there is one map."""
    if model.attention in ONE_MAP:
        return ""
    rows = [row for row in result["backends"] if row["model"] == model.name and row["attention"] == model.attention]
    held = [row for row in rows if row["score_ratio_to_twin"] is not None]
    free = [row["backend"] for row in rows if not row["score_bytes"]]
    ratio = held[0]["score_ratio_to_twin"]
    doubled = ", ".join(row["backend"] for row in held if row["score_ratio_to_twin"] > 1.5)
    verdict = f"doubled in {doubled} alone" if doubled else "doubled in no backend"
    because = "pairs the heads that are there" if model.attention == "diff_v1" else "has twice as many queries"
    cache = rows[0]["cache_ratio_to_twin"]
    return (
        f" Beside a softmax model of its own shape, the memory of its attention maps is {verdict}, "
        f"because it {because}: "
        f"{', '.join(row['backend'] for row in held)} holds {ratio:.2f}× the bytes of maps, {', '.join(free)} hold "
        f"none in either; its KV cache is {'the same' if cache == 1 else f'{cache:.2f}×'} in every row."
    )


def notes(model: Model, estimate: dict[str, Any]) -> list[str]:
    """What has to be known of a model before its numbers are read: what it was taken for, and what is not planned.

    >>> from diffattn.plan.shape import ModelShape
    >>> model = Model("diff_v1:3M", "diff_v1", ModelShape.preset("3M"), ModelShape.preset("3M"), "3m")
    >>> notes(model, {})
    ["'3m' is planned as diff_v1:3M."]
    """
    found = []
    if model.given and model.name != model.given:
        of_file = os.path.exists(model.given)
        found.append(
            f"{model.name} is the {model.attention} model of {model.given}."
            if of_file
            else f"{model.given!r} is planned as {model.name}."
        )
    if isinstance(model.built, BuiltShape) and model.built.extras:
        total, merged = estimate["parameters"]["total"], dict[str, int]()
        for _, what, number in model.built.extras:
            merged[what] = merged.get(what, 0) + number
        listed = ", ".join(f"{what} ({number:,} parameters)" for what, number in merged.items())
        found.append(
            f"Beside its shape {model.name} has {listed}, {abs(sum(merged.values())) / total:.2%} of it: they are "
            "counted in its parameters and in the bytes of weights, gradients and optimizer state, and left out of its "
            "FLOPs and activations."
        )
    if model.left_out:
        listed = ", ".join(f"{what} ({number:,})" for what, number in model.left_out.items())
        found.append(f"Numbers in the files of {model.name} that are not planned: {listed}.")
    if isinstance(model.built, BuiltShape) and model.built.window is not None:
        layers, width = model.built.window
        found.append(
            f"In {layers} of its {model.built.num_layers} layers {model.name} sees the last {width:,} tokens alone; "
            f"cache and FLOPs are planned as if it saw all, which is too much where the context is above {width:,}."
        )
    return found


def phase_sentence(result: dict[str, Any]) -> str:
    """Whether what is won differs between training and inference; of one model, what fills its memory in each."""
    name, other = result["model"]["name"], result["against"]
    a = result["model"]["estimate"]
    weights = a["prefill"]["memory"]["weights"] / inference_peak(a)
    rest = f"at inference weights are {weights:.0%} of {name}'s peak"
    if not a["training"]:
        return f"These weights are integers, which are not trained, so only inference is planned; {rest}."
    memory = a["training"]["memory"]
    states = sum(memory[part] for part in ("weights", "gradients", "optimizer")) / memory["total"]
    text = (
        "In training weights, gradients and optimizer state, which follow the parameters, are "
        f"{states:.0%} of {name}'s peak; {rest}."
    )
    phases = [phase for phase in ("training", "prefill", "decoding") if a[phase]["tokens_per_second"] is not None]
    speeds = {phase: count(a[phase]["tokens_per_second"]) for phase in phases}
    if other is not None:
        b = other["estimate"]
        training = memory["total"] / b["training"]["memory"]["total"]
        inference = inference_peak(a) / inference_peak(b)
        change = inference - training
        verdict = "hardly changes"
        if abs(change) >= 0.02:
            verdict = f"is {'better' if change < 0 else 'worse'} for {name} at inference"
        text = (
            f"From training to inference the trade {verdict}: {training:.2f}× of the memory becomes {inference:.2f}×. "
            f"{text}"
        )
        speeds = {phase: f"{a[phase]['tokens_per_second'] / b[phase]['tokens_per_second']:.2f}×" for phase in phases}
    if speeds:
        text += f" Tokens per second at most: {', '.join(f'{phase} {said}' for phase, said in speeds.items())}."
    return text


def small_machine_sentence(result: dict[str, Any], models: list[Model]) -> str:
    """Disk, start-up, and which small machines hold the models with int4 weights."""
    found = [result[side]["estimate"] for side in ("model", "against") if result[side] is not None]
    setting = result["setting"]

    def said(values: Sequence[float], written: Callable[[float], str]) -> str:
        return " against ".join(map(written, values))

    disk = [f"{said([each['disk'][dtype]['bytes'] for each in found], size)} as {dtype}" for dtype in ("bf16", "int4")]
    text = f"On disk {models[0].name} takes {' and '.join(disk)}"
    if len(found) > 1:
        text += f" ({found[0]['disk']['int4']['bytes'] / found[1]['disk']['int4']['bytes']:.2f}×)"
    first = [each["first_token_seconds"] for each in found]
    if None not in first:
        text += f". On {setting['machine']['name']} the first token comes after at least {said(first, seconds)}"
    needs = [_small_bytes(model, setting["batch"], setting["context"]) for model in models]
    return (
        f"{text}. With int4 weights and a bf16 cache, {setting['batch']} × {setting['context']:,} tokens need "
        f"{said(needs, size)}, which fits as follows where a tenth of the memory is left to the system: "
        f"{_held(needs, [model.name for model in models])}."
    )


def _held(needs: Sequence[float], names: list[str]) -> str:
    """Which of the small machines hold which of the models."""
    kinds = {(True,): "it fits", (False,): "it does not", (True, True): "both", (False, False): "neither"}
    kinds |= {(True, False): f"only {names[0]}", (False, True): f"only {names[-1]}"}
    fit: dict[tuple[bool, ...], list[str]] = {kind: [] for kind in kinds}
    for name in SMALL_MACHINES:
        memory = MACHINES[name].memory
        assert memory is not None
        fit[tuple(need <= 0.9 * memory for need in needs)].append(f"{name} ({memory // GiB} GiB)")
    order = sorted(fit, key=lambda kind: kind != (True,) * len(needs))
    return "; ".join(f"{', '.join(fit[kind])}: {kinds[kind]}" for kind in order if fit[kind])


def _small_bytes(model: Model, batch: int, context: int) -> int:
    place: dict[str, Any] = {
        "batch": batch, "context": context, "precision": SMALL_PRECISION, "backend": "standard",
    }  # fmt: skip
    return max(peak(model.built, model.attention, **place).total for peak in (prefill_memory, decoding_memory))
