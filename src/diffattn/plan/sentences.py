"""The three answers of a plan, from its numbers: memory, training against inference, small machines."""

from __future__ import annotations

from typing import Any

from diffattn.numbers import count, seconds, size
from diffattn.plan.activations import ONE_MAP
from diffattn.plan.estimate import inference_peak
from diffattn.plan.hardware import MACHINES, GiB
from diffattn.plan.memory import decoding_memory, prefill_memory
from diffattn.plan.named_model import Model
from diffattn.plan.precision import Precision

SMALL_MACHINES = ("RTX 3060 12GB", "Apple M2", "DDR5 desktop", "Raspberry Pi 5")
SMALL_PRECISION = Precision("int4", "bf16", "bf16", "bf16", "bf16")


def memory_sentence(result: dict[str, Any], model: Model) -> str:
    """Whether fewer parameters win back the memory of a second map, and where there is any to win back."""
    one, other = result["model"], result["against"]
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
    if model.attention in ONE_MAP:
        return text
    rows = [row for row in result["backends"] if row["model"] == model.name and row["attention"] == model.attention]
    held = [row for row in rows if row["score_ratio_to_twin"] is not None]
    free = [row["backend"] for row in rows if not row["score_bytes"]]
    ratio = held[0]["score_ratio_to_twin"]
    doubled = ", ".join(row["backend"] for row in held if row["score_ratio_to_twin"] > 1.5)
    verdict = f"doubled in {doubled} alone" if doubled else "doubled in no backend"
    because = "pairs the heads that are there" if model.attention == "diff_v1" else "has twice as many queries"
    cache = rows[0]["cache_ratio_to_twin"]
    return (
        f"{text} Beside a softmax model of its own shape, the memory of its attention maps is {verdict}, "
        f"because it {because}: "
        f"{', '.join(row['backend'] for row in held)} holds {ratio:.2f}× the bytes of maps, {', '.join(free)} hold "
        f"none in either; its KV cache is {'the same' if cache == 1 else f'{cache:.2f}×'} in every row."
    )


def left_out_sentence(entry: dict[str, Any]) -> str:
    """What a checkpoint has and its plan has not.

    >>> found = {"name": "my-model", "left_out": {"biases": 300, "DEX": 20}}
    >>> left_out_sentence(found | {"estimate": {"parameters": {"total": 10_000}}})
    'Not planned of my-model: biases (300 parameters), DEX (20 parameters), 3.10% of it.'
    """
    parts, total = entry["left_out"], entry["estimate"]["parameters"]["total"]
    listed = ", ".join(f"{name} ({number:,} parameters)" for name, number in parts.items())
    missing = sum(parts.values())
    return f"Not planned of {entry['name']}: {listed}, {abs(missing) / (total + missing):.2%} of it."


def phase_sentence(result: dict[str, Any]) -> str:
    """Whether what is won differs between training and inference."""
    a, b = (result[side]["estimate"] for side in ("model", "against"))
    inference = inference_peak(a) / inference_peak(b)
    weights = a["prefill"]["memory"]["weights"] / inference_peak(a)
    rest = f"at inference weights are {weights:.0%} of {result['model']['name']}'s peak"
    if not (a["training"] and b["training"]):
        return f"These weights are integers, which are not trained, so only inference is planned; {rest}."
    training = a["training"]["memory"]["total"] / b["training"]["memory"]["total"]
    memory = a["training"]["memory"]
    states = sum(memory[part] for part in ("weights", "gradients", "optimizer")) / memory["total"]
    change = inference - training
    verdict = (
        "hardly changes"
        if abs(change) < 0.02
        else f"is {'better' if change < 0 else 'worse'} for {result['model']['name']} at inference"
    )
    text = (
        f"From training to inference the trade {verdict}: {training:.2f}× of the memory becomes {inference:.2f}×. In "
        f"training weights, gradients and optimizer state, which follow the parameters, are {states:.0%} of "
        f"{result['model']['name']}'s peak; {rest}."
    )
    speeds = [
        (phase, a[phase]["tokens_per_second"] / b[phase]["tokens_per_second"])
        for phase in ("training", "prefill", "decoding")
        if a[phase]["tokens_per_second"] is not None
    ]
    if speeds:
        text += f" Tokens per second at most: {', '.join(f'{phase} {ratio:.2f}×' for phase, ratio in speeds)}."
    return text


def small_machine_sentence(result: dict[str, Any], one: Model, other: Model) -> str:
    """Disk, start-up, and which small machines hold the models with int4 weights."""
    a, b = (result[side]["estimate"] for side in ("model", "against"))
    setting = result["setting"]
    disk = [
        f"{size(a['disk'][dtype]['bytes'])} against {size(b['disk'][dtype]['bytes'])} as {dtype}"
        for dtype in ("bf16", "int4")
    ]
    ratio = a["disk"]["int4"]["bytes"] / b["disk"]["int4"]["bytes"]
    text = f"On disk {one.name} takes {' and '.join(disk)} ({ratio:.2f}×)."
    if a["first_token_seconds"] is not None and b["first_token_seconds"] is not None:
        text += (
            f" On {setting['machine']['name']} the first token comes after at least "
            f"{seconds(a['first_token_seconds'])} against {seconds(b['first_token_seconds'])}."
        )
    needs = [_small_bytes(model, setting["batch"], setting["context"]) for model in (one, other)]
    fit: dict[str, list[str]] = {"both": [], f"only {one.name}": [], f"only {other.name}": [], "neither": []}
    words = {(True, True): 0, (True, False): 1, (False, True): 2, (False, False): 3}
    for name in SMALL_MACHINES:
        memory = MACHINES[name].memory
        assert memory is not None
        kind = list(fit)[words[(needs[0] <= 0.9 * memory, needs[1] <= 0.9 * memory)]]
        fit[kind].append(f"{name} ({memory // GiB} GiB)")
    held = "; ".join(f"{', '.join(names)}: {kind}" for kind, names in fit.items() if names)
    return (
        f"{text} With int4 weights and a bf16 cache, {setting['batch']} × {setting['context']:,} tokens need "
        f"{size(needs[0])} against {size(needs[1])}, which fits as follows where a tenth of the "
        f"memory is left to the system: {held}."
    )


def _small_bytes(model: Model, batch: int, context: int) -> int:
    place: dict[str, Any] = {
        "batch": batch, "context": context, "precision": SMALL_PRECISION, "backend": "standard",
    }  # fmt: skip
    return max(peak(model.built, model.attention, **place).total for peak in (prefill_memory, decoding_memory))
