"""The words of a plan: its three sentences, its notes, and its rows as tables for a terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from diffattn.humanize import count, flops, seconds, size
from diffattn.plan.activations import AUTO
from diffattn.plan.blocks.block import BlockShape
from diffattn.plan.blocks.estimate import block_notes, inference_need
from diffattn.plan.estimate import Estimate
from diffattn.plan.hardware import MACHINES, GiB
from diffattn.plan.named_model import Model
from diffattn.plan.result import BackendRow, Plan, PlannedModel
from diffattn.plan.search import FitRow, SweepRow
from diffattn.plan.setting import Precision, Setting
from diffattn.plan.shape import BuiltShape
from diffattn.variants import VARIANTS

SMALL_MACHINES = ("RTX 3060 12GB", "Apple M2", "DDR5 desktop", "Raspberry Pi 5")
SMALL_PRECISION = Precision("int4", "bf16", "bf16", "bf16", "bf16")
WRITE = {"size": size, "count": count, "flops": flops, "seconds": seconds}


def memory_sentence(one: PlannedModel, other: PlannedModel | None, backends: Sequence[BackendRow]) -> str:
    """Says if fewer parameters win back the memory of a second map, and under which backends there is any to win."""
    if other is None:
        return _own_memory(one) + _maps(one, backends)
    a, b = one.estimate, other.estimate
    share = a.parameters.total / b.parameters.total
    pairs = [("inference", a.inference_peak, b.inference_peak)]
    if a.training and b.training:
        pairs.insert(0, ("training", a.training.memory.total, b.training.memory.total))
    parts = [f"{size(x)} against {size(y)} in {phase} ({x / y:.2f}×)" for phase, x, y in pairs]
    cheaper = [phase for phase, x, y in pairs if x < y]
    won = "in " + " and in ".join(cheaper) if cheaper else "in neither" if len(pairs) > 1 else "not here"
    text = (
        f"{one.name} has {share:.0%} of the parameters of {other.name} "
        f"({count(a.parameters.total)} of {count(b.parameters.total)}) and needs {' and '.join(parts)}: "
        f"it needs less {won}."
    )
    return text + _maps(one, backends)


def _own_memory(one: PlannedModel) -> str:
    found = one.estimate
    peaks = [f"{size(found.inference_peak)} in inference"]
    if found.training:
        peaks.insert(0, f"{size(found.training.memory.total)} in training")
    return f"{one.name} has {count(found.parameters.total)} parameters and needs {' and '.join(peaks)}."


def _maps(one: PlannedModel, backends: Sequence[BackendRow]) -> str:
    """Says what the second map costs beside a softmax model of the same shape; nothing where there is one map."""
    variant = VARIANTS[one.attention]
    if variant.maps == 1:
        return ""
    rows = [row for row in backends if row.model == one.name and row.attention == one.attention]
    held = [(row.backend, row.score_ratio_to_twin) for row in rows if row.score_ratio_to_twin is not None]
    if not held:
        return ""
    ratio = held[0][1]
    doubled = ", ".join(backend for backend, its_ratio in held if its_ratio > 1.5)
    verdict = f"doubled in {doubled} alone" if doubled else "doubled in no backend"
    because = "has twice as many queries" if variant.query_factor > 1 else "pairs the heads that are there"
    if (shared := variant.signals_per_noise(one.shape)) > 1:
        because = f"has one noise head for {shared} signal heads"
    cache = rows[0].cache_ratio_to_twin
    return (
        f" Beside a softmax model of its own shape, the memory of its attention maps is {verdict}, "
        f"because it {because}: "
        f"{', '.join(backend for backend, _ in held)} holds {ratio:.2f}× the bytes of maps, the others hold "
        f"none in either; its KV cache is {'the same' if cache == 1 else f'{cache:.2f}×'} in every row."
    )


def notes(model: Model, estimate: Estimate) -> list[str]:
    """Says what has to be known before the numbers are read: what a name was taken for, and what is not planned.

    >>> from diffattn.plan.estimate import estimate
    >>> from diffattn.plan.shape import ModelShape
    >>> shape = ModelShape.preset("3M")
    >>> notes(Model("diff_v1:3M", "diff_v1", shape, shape, "3m"), estimate(shape, "diff_v1", Setting()))
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
        total, merged = estimate.parameters.total, dict[str, int]()
        for _, what, number in model.built.extras:
            merged[what] = merged.get(what, 0) + number
        listed = ", ".join(f"{what} ({number:,} parameters)" for what, number in merged.items())
        found.append(
            f"Beside its shape {model.name} has {listed}, {abs(sum(merged.values())) / total:.2%} of it: they are "
            "counted in its parameters and in the bytes of weights, gradients and optimizer state, and left out of its "
            "FLOPs and activations."
        )
    if isinstance(model.built, BlockShape):
        found += block_notes(model.name, model.built)
    found += model.said
    if model.left_out:
        listed = ", ".join(f"{what} ({number:,})" for what, number in model.left_out.items())
        found.append(f"Numbers in the files of {model.name} that are not planned: {listed}.")
    if isinstance(model.built, BuiltShape) and model.built.window is not None:
        layers, width = model.built.window
        found.append(
            f"In {layers} of its {model.built.num_layers} layers a token of {model.name} sees the last {width:,} "
            "tokens alone, and FLOPs and the cache of decoding are counted so; while a prompt is read, the cache holds "
            "all of it."
        )
    return found


def phase_sentence(one: PlannedModel, other: PlannedModel | None) -> str:
    """Says if what is won differs between training and inference; of one model, what fills its memory in each."""
    name, a = one.name, one.estimate
    weights = a.prefill.memory.weights / a.inference_peak
    rest = f"at inference weights are {weights:.0%} of {name}'s peak"
    if a.training is None and isinstance(one.shape, BlockShape):
        return f"Of {name} only inference is planned; {rest}."
    if a.training is None:
        return f"These weights are integers, which are not trained, so only inference is planned; {rest}."
    memory = a.training.memory
    states = (memory.weights + memory.gradients + memory.optimizer) / memory.total
    text = (
        "In training weights, gradients and optimizer state, which follow the parameters, are "
        f"{states:.0%} of {name}'s peak; {rest}."
    )
    rates = _rates(a)
    speeds = {phase: count(rate) for phase, rate in rates.items()}
    if other is not None and other.estimate.training is not None:
        b = other.estimate
        training = memory.total / other.estimate.training.memory.total
        inference = a.inference_peak / b.inference_peak
        change = inference - training
        verdict = "hardly changes"
        if abs(change) >= 0.02:
            verdict = f"is {'better' if change < 0 else 'worse'} for {name} at inference"
        text = (
            f"From training to inference the trade {verdict}: {training:.2f}× of the memory becomes {inference:.2f}×. "
            f"{text}"
        )
        speeds = {phase: f"{rates[phase] / rate:.2f}×" for phase, rate in _rates(b).items()}
    if speeds:
        text += f" Tokens per second at most: {', '.join(f'{phase} {said}' for phase, said in speeds.items())}."
    return text


def _rates(found: Estimate) -> dict[str, float]:
    """Returns tokens per second at most by phase, for the phases of which it is known."""
    phases = {"training": found.training, "prefill": found.prefill, "decoding": found.decoding}
    rates = {name: None if phase is None else phase.tokens_per_second for name, phase in phases.items()}
    return {name: rate for name, rate in rates.items() if rate is not None}


def small_machine_sentence(models: Sequence[PlannedModel], setting: Setting) -> str:
    """Says what disk and start-up cost, and which small machines hold the models with int4 weights."""
    found = [each.estimate for each in models]

    def said(values: Sequence[float], written: Callable[[float], str]) -> str:
        return " against ".join(map(written, values))

    disk = [f"{said([each.disk[dtype].bytes for each in found], size)} as {dtype}" for dtype in ("bf16", "int4")]
    text = f"On disk {models[0].name} takes {' and '.join(disk)}"
    if len(found) > 1:
        text += f" ({found[0].disk['int4'].bytes / found[1].disk['int4'].bytes:.2f}×)"
    first = [each.first_token_seconds for each in found if each.first_token_seconds is not None]
    if setting.machine is not None and len(first) == len(found):
        text += f". On {setting.machine.name} the first token comes after at least {said(first, seconds)}"
    # The standard call, which serves on all of them, so that one number is said.
    small = Setting(batch=setting.batch, context=setting.context, precision=SMALL_PRECISION, backend="standard")
    needs = [inference_need(each.shape, each.attention, small) for each in models]
    return (
        f"{text}. With int4 weights and a bf16 cache, {setting.batch} × {setting.context:,} tokens need "
        f"{said(needs, size)}, which fits as follows where a tenth of the memory is left to the system: "
        f"{_held(needs, [model.name for model in models])}."
    )


def _held(needs: Sequence[float], names: list[str]) -> str:
    """Says which of the small machines hold which of the models."""
    kinds = {(True,): "it fits", (False,): "it does not", (True, True): "both", (False, False): "neither"}
    kinds |= {(True, False): f"only {names[0]}", (False, True): f"only {names[-1]}"}
    fit: dict[tuple[bool, ...], list[str]] = {kind: [] for kind in kinds}
    for name in SMALL_MACHINES:
        memory = MACHINES[name].memory
        assert memory is not None
        fit[tuple(need <= 0.9 * memory for need in needs)].append(f"{name} ({memory // GiB} GiB)")
    order = sorted(fit, key=lambda kind: kind != (True,) * len(needs))
    return "; ".join(f"{', '.join(fit[kind])}: {kinds[kind]}" for kind in order if fit[kind])


def table(plan: Plan) -> list[list[str]]:
    """Returns the models side by side as text: a header, then a row per quantity, with the ratio of two at the end.

    >>> from diffattn.plan.answer import plan
    >>> rows = table(plan("diff_v1:3M", "softmax:3M", Setting(context=256, machine=None)))
    >>> rows[0], [row for row in rows if row[0].startswith("KV")]
    (['', 'diff_v1:3M', 'softmax:3M', 'ratio'], [['KV cache (per token)', '3.75 KiB', '3.75 KiB', '1.00×']])
    """
    two = plan.against is not None
    rows = [["", *(each.name for each in plan.models), *(["ratio"] if two else [])]]
    for row in plan.ratios:
        label = f"{row.label} ({row.unit})" if row.unit else row.label
        values = [row.model, row.against] if two else [row.model]
        rows.append([label, *map(WRITE[row.format], values)])
        if two:
            rows[-1].append("" if row.ratio is None else f"{row.ratio:.2f}×")
    return rows


def setting_line(plan: Plan) -> str:
    """Says what the numbers hold for, in one line.

    >>> from diffattn.plan.answer import plan
    >>> setting_line(plan("diff_v1:3M", setting=Setting(machine="rtx 3060", context=256)))
    'machine: RTX 3060 12GB; context: 256; batch: 1; precision: mixed; backend: auto (diff_v1:3M: fused_triton)'
    """
    setting = plan.setting
    listed = ", ".join(f"{part} {dtype}" for part, dtype in setting.precision.to_json().items() if dtype is not None)
    parts = {
        "machine": "none, so no times" if setting.machine is None else setting.machine.name,
        "context": f"{setting.context:,}",
        "batch": f"{setting.batch:,}",
        "precision": setting.precision.name or listed,
        "backend": backend_words(plan),
    }
    parts |= {"checkpointing": "on"} if setting.checkpointing else {}
    if setting.ranks > 1:
        parts |= {"ranks": f"{setting.ranks} by {setting.wrapper}", "shard": setting.shard}
    parts |= {"tp": str(setting.tp)} if setting.tp > 1 else {}
    return "; ".join(f"{key}: {value}" for key, value in parts.items())


def backend_words(plan: Plan) -> str:
    """Returns the name of the backend, and for ``auto`` what it is for each model.

    >>> from diffattn.plan.answer import plan
    >>> backend_words(plan("diff_v1:3M", "softmax:3M", Setting(context=256)))
    'auto (diff_v1:3M: fused_triton, softmax:3M: standard)'
    """
    if plan.setting.backend != AUTO:
        return plan.setting.backend
    return f"{AUTO} ({', '.join(f'{model.name}: {model.estimate.backend}' for model in plan.models)})"


def backend_table(rows: Sequence[BackendRow]) -> list[list[str]]:
    """Returns what each backend costs, as text; the first row is the header.

    ``maps`` are bytes of T × T maps in training, ``to twin`` their ratio to those of a softmax model of the same shape,
    ``FLOPs/token`` what training executes, ``training`` and ``inference`` peaks of memory.

    >>> from diffattn.plan.answer import plan
    >>> result = plan("diff_v2:3M", "softmax:3M", Setting(context=256, machine=None))
    >>> [row[:3] for row in backend_table(result.backends)][5]
    ['diff_v2:3M', 'materialised', '22.5 MiB']
    """
    found = [["model", "backend", "maps", "to twin", "cache", "FLOPs/token", "training", "inference"]]
    for row in rows:
        ratio = row.score_ratio_to_twin
        found.append(
            [row.model, row.backend, size(row.score_bytes), "–" if ratio is None else f"{ratio:.2f}×",
             size(row.cache_bytes), flops(row.training_flops_per_token), size(row.training_bytes),
             size(row.inference_bytes)]
        )  # fmt: skip
    return found


def sweep_table(rows: Sequence[SweepRow]) -> list[list[str]]:
    """Returns the rows of ``sweep`` as text; the first is the header.

    ``trained/s`` and ``decoded/s`` are tokens per second at most; ``fits`` says if training and inference fit. The last
    two columns chart the memory of both, each to its own largest.

    >>> from diffattn.plan.search import sweep
    >>> sweep_table(sweep("context=1k:1k", "diff_v1:3M", "softmax:3M"))[0][:3]
    ['context', 'model', 'training']
    """
    peaks = ("training", "prefill", "decoding")
    found = [[rows[0].axis, "model", *peaks, "trained/s", "decoded/s", "fits", "training", "inference"]]
    training = [row.training_bytes or 0 for row in rows]
    inference = [max(row.prefill_bytes, row.decoding_bytes) for row in rows]
    for row, trained, inferred in zip(rows, training, inference, strict=True):
        sizes = [size(peak) for peak in (row.training_bytes, row.prefill_bytes, row.decoding_bytes)]
        speeds = [count(rate) for rate in (row.training_tokens_per_second, row.decoding_tokens_per_second)]
        held = ", ".join(
            {True: "yes", False: "no", None: "–"}[fits] for fits in (row.fits_training, row.fits_inference)
        )
        bars = [_bar(trained, max(training)), _bar(inferred, max(inference))]
        found.append([f"{row.value:,}", row.model, *sizes, *speeds, held, *bars])
    return found


def _bar(value: int, most: int, *, width: int = 16) -> str:
    """Returns eighths of a block, as many as ``value`` is of ``most``.

    >>> _bar(100, 200, width=3), _bar(0, 0)
    ('█▌', '')
    """
    eighths = round(8 * width * value / most) if most else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def fits_table(rows: Sequence[FitRow]) -> list[list[str]]:
    """Returns the rows of ``fits`` as text; the first is the header.

    >>> from diffattn.plan.search import fits
    >>> fits_table(fits("1GiB", "diff_v1:3M", Setting(context=256)))[1][:3]
    ['training', 'most parameters', 'diff_v1']
    """
    names = {"parameters": "most parameters", "context": "longest context", "batch": "largest batch"}
    found = [["phase", "what", "attention", "model", "at most", "memory"]]
    for row in rows:
        most = "nothing fits"
        if row.value is not None:
            most = count(row.value) if row.what == "parameters" else f"{row.value:,}"
        found.append([row.phase, names[row.what], row.attention, row.model or "–", most, size(row.bytes)])
    return found
