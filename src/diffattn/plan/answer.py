"""Does a smaller DIFF model win back what its second map costs? Two models side by side, in numbers and sentences."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffattn.errors import ConfigError
from diffattn.plan.activations import BACKENDS, check_backend
from diffattn.plan.checkpoint_shape import read_checkpoint
from diffattn.plan.cost import match_parameters
from diffattn.plan.estimate import DISK_DTYPES, estimate, resolve_precision
from diffattn.plan.hardware import MACHINES, GiB, Machine, load_machine
from diffattn.plan.memory import decoding_memory, prefill_memory
from diffattn.plan.precision import Precision
from diffattn.plan.rule import parse_count, shape_about
from diffattn.plan.shape import VARIANTS, ModelShape, presets

SMALL_MACHINES = ("RTX 3060 12GB", "Apple M2", "DDR5 desktop", "Raspberry Pi 5")
SMALL_PRECISION = Precision("int4", "bf16", "bf16", "bf16", "bf16")


@dataclass(frozen=True)
class Model:
    """A model to plan: what it is called, its variant, the softmax shape, and the shape that is built.

    ``built`` is ``shape`` but for V2, whose feed-forward network is narrowed to as many parameters as softmax has.

    >>> parse_model("diff_v2:3M").built.intermediate_size
    448
    """

    name: str
    attention: str
    shape: ModelShape
    built: ModelShape


def parse_model(text: str) -> Model:
    """A model as it is written on the command line: ``variant:size``.

    Size is a preset, the path of a ``.toml`` file, a checkpoint's folder or ``config.json``, or a count such as 11B:
    the shape nearest to it by the rule of ``shape_about``. A checkpoint alone brings its own variant.

    Args:
        text: such as ``"diff_v1:6.8B"``, ``"softmax:11B"``, ``"diff_v2:shape.toml"`` or ``"runs/my-model"``.

    Raises:
        ConfigError: an unknown variant, a size that is none of these, or a shape that cannot carry the variant.

    Source: V2's width is that of ``match_parameters``.

    >>> model = parse_model("softmax:11B")
    >>> model.attention, model.shape == shape_about(11e9)
    ('softmax', True)
    """
    variant, colon, size = text.partition(":")
    if not colon or (variant not in VARIANTS and Path(text).exists()):
        if not Path(text).exists():
            raise ConfigError(
                f"model {text!r} given; a variant and a size are wanted, such as diff_v1:6.8B or softmax:11B; "
                f"put one of {', '.join(VARIANTS)} and a colon before it"
            )
        shape, variant = read_checkpoint(text)
    elif variant not in VARIANTS:
        near = difflib.get_close_matches(variant, VARIANTS, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"model {text!r} given; one of {', '.join(VARIANTS)} is wanted before the colon{meant}")
    else:
        shape = _shape(size)
    shape.check_variant(variant)
    return Model(text, variant, shape, match_parameters(shape, variant))


def _shape(size: str) -> ModelShape:
    if size in presets() or size.endswith(".toml"):
        return ModelShape.load(size)
    if size and Path(size).exists():
        return read_checkpoint(size)[0]
    try:
        count = parse_count(size)
    except ConfigError:
        raise ConfigError(
            f"size {size!r} given; a preset ({', '.join(presets())}), a .toml file, a checkpoint's folder or a count "
            "such as 11B is wanted; there is no such file: check the path"
        ) from None
    return shape_about(count)


def plan(
    model: str | Model = "diff_v1:6.8B",
    against: str | Model = "softmax:11B",
    *,
    context: int = 4096,
    batch: int = 1,
    machine: str | Machine | None = "H100 SXM",
    precision: str | Precision = "mixed",
    backend: str = "standard",
    checkpointing: bool = False,
    fsdp: int = 1,
    tp: int = 1,
    command: str = "",
) -> dict[str, Any]:
    """Plan two models on one machine and put them side by side.

    Args:
        model, against: as in ``parse_model``. Defaults: the paper's 6.8B V1 and the 11B softmax model that it equals.
        context: tokens in a sequence. Default: 4096.
        batch: sequences. Default: 1.
        machine: a name in ``MACHINES``, a JSON file, or None for no times. Default: ``"H100 SXM"``.
        precision: a name in ``PRECISIONS`` or a ``Precision``. Default: ``"mixed"``, bfloat16 with a float32 master.
        backend: how attention is computed, of both. Default: ``"standard"``, the one call of every engine.
        checkpointing, fsdp, tp: as in ``estimate``.
        command: what reproduces this; kept as it is. Default: empty.

    Returns:
        ``model`` and ``against``: each ``name``, ``attention``, ``shape`` and ``estimate``; ``ratios``: rows of
        ``key``, ``label``, ``format``, ``unit``, both values and their ratio; ``backends``: a row for each backend that
        a variant has; ``sentences``: three; ``setting``; ``command``. JSON-able.

    Raises:
        ConfigError: what ``parse_model``, ``load_machine`` and ``estimate`` raise.

    Source: the question is that of arXiv 2410.05258v2, section 3.2; the sizes that are equal are its Figure 3a.

    >>> result = plan("diff_v1:3M", "softmax:3M", context=256, machine=None)
    >>> [row["ratio"] for row in result["ratios"] if row["key"] == "cache_bytes_per_token"]
    [1.0]
    """
    dtypes = resolve_precision(precision)
    one, other = (parse_model(text) if isinstance(text, str) else text for text in (model, against))
    rates = load_machine(machine) if isinstance(machine, str) else machine
    place: dict[str, Any] = {
        "context": context,
        "batch": batch,
        "precision": dtypes,
        "machine": rates,
        "fsdp": fsdp,
        "tp": tp,
        "checkpointing": checkpointing,
    }
    found: list[dict[str, Any]] = [
        {
            "name": each.name,
            "attention": each.attention,
            "shape": asdict(each.built),
            "estimate": estimate(each.built, each.attention, backend=backend, **place),
        }
        for each in (one, other)
    ]
    rows = [row for each in (one, other) for row in _backend_rows(each, place)]
    result: dict[str, Any] = {
        "model": found[0],
        "against": found[1],
        "ratios": _ratio_rows(found[0]["estimate"], found[1]["estimate"], parallel=fsdp * tp > 1),
        "backends": rows,
        "setting": {
            "context": context,
            "batch": batch,
            "precision": asdict(dtypes),
            "backend": backend,
            "checkpointing": checkpointing,
            "machine": None if rates is None else asdict(rates),
            "fsdp": fsdp,
            "tp": tp,
        },
        "command": command,
    }
    result["sentences"] = [
        _memory_sentence(result, one),
        _phase_sentence(result),
        _small_machine_sentence(result, one, other),
    ]
    return result


# Key, label, how it is written, unit, where it is in an estimate.
_ROWS = (
    ("parameters", "Parameters", "count", "", "parameters total"),
    ("attention_parameters", "Attention parameters", "count", "", "parameters attention"),
    ("training_bytes", "Training peak memory", "size", "", "training memory total"),
    *(
        (f"training_{part}", f"  of it {label}", "size", "", f"training memory {part}")
        for part, label in (
            ("weights", "weights"),
            ("gradients", "gradients so far"),
            ("optimizer", "optimizer state"),
            ("activations", "activations"),
            ("scores", "score maps at the peak"),
            ("workspace", "workspace"),
        )
    ),
    ("training_all_gradients", "All gradients", "size", "", "gradient_bytes"),
    ("training_bytes_checkpointing", "Training peak, checkpointing", "size", "", "training peak_with_checkpointing"),
    ("prefill_bytes", "Prefill peak memory", "size", "", "prefill memory total"),
    ("decoding_bytes", "Decoding peak memory", "size", "", "decoding memory total"),
    ("decoding_weights", "  of it weights", "size", "", "decoding memory weights"),
    ("decoding_cache", "  of it cache", "size", "", "decoding memory cache"),
    ("cache_bytes_per_token", "KV cache", "size", "per token", "cache_bytes_per_token"),
    ("score_bytes", "Score maps in training", "size", "", "score_bytes"),
    ("rank_training_bytes", "Training, one rank", "size", "", "rank training total"),
    ("rank_decoding_bytes", "Decoding, one rank", "size", "", "rank decoding total"),
    ("training_model_flops", "Training, model FLOPs", "flops", "per token", "training flops_per_token model"),
    ("training_executed_flops", "Training, executed FLOPs", "flops", "per token", "training flops_per_token executed"),
    ("prefill_executed_flops", "Prefill, executed FLOPs", "flops", "per token", "prefill flops_per_token executed"),
    ("decoding_executed_flops", "Decoding, executed FLOPs", "flops", "per token", "decoding flops_per_token executed"),
    ("training_intensity", "Training intensity", "count", "FLOPs/byte", "training intensity"),
    ("decoding_intensity", "Decoding intensity", "count", "FLOPs/byte", "decoding intensity"),
    ("training_seconds", "Training step, at least", "seconds", "", "training seconds"),
    ("train_tokens_per_second", "Training, at most", "count", "tokens/s", "training tokens_per_second"),
    ("prefill_tokens_per_second", "Prefill, at most", "count", "tokens/s", "prefill tokens_per_second"),
    ("decoding_tokens_per_second", "Decoding, at most", "count", "tokens/s", "decoding tokens_per_second"),
    *((f"disk_bytes_{dtype}", f"Disk, {dtype}", "size", "", f"disk {dtype} bytes") for dtype in DISK_DTYPES),
    ("read_seconds", "Reading the weights, at least", "seconds", "", "read_seconds"),
    ("first_token_seconds", "First token, at least", "seconds", "", "first_token_seconds"),
)


def _ratio_rows(one: dict[str, Any], other: dict[str, Any], *, parallel: bool) -> list[dict[str, Any]]:
    rows = []
    for key, label, written, unit, path in _ROWS:
        if key.startswith("rank_") and not parallel:
            continue
        values = [_at(found, path) for found in (one, other)]
        ratio = values[0] / values[1] if None not in values and values[1] else None
        rows.append(
            {"key": key, "label": label, "format": written, "unit": unit, "model": values[0], "against": values[1],
             "ratio": ratio}
        )  # fmt: skip
    return rows


def _at(found: Any, path: str) -> Any:
    for step in path.split():
        if found is None:
            return None
        found = found[step]
    return found


def _backend_rows(model: Model, place: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What each backend of the variant costs, and its maps beside those of a softmax model of the same shape."""
    for backend in backends_of(model.attention):
        found = estimate(model.built, model.attention, backend=backend, **place)
        twin = estimate(model.shape, "softmax", backend=backend, **(dict(place) | {"tp": 1}))
        training = found["training"]
        yield {
            "model": model.name,
            "attention": model.attention,
            "backend": backend,
            "score_bytes": found["score_bytes"],
            "score_ratio_to_twin": found["score_bytes"] / twin["score_bytes"] if twin["score_bytes"] else None,
            "cache_bytes": found["decoding"]["memory"]["cache"],
            "cache_ratio_to_twin": found["decoding"]["memory"]["cache"] / twin["decoding"]["memory"]["cache"],
            "training_flops_per_token": None if training is None else training["flops_per_token"]["executed"],
            "decoding_flops_per_token": found["decoding"]["flops_per_token"]["executed"],
            "training_bytes": None if training is None else training["memory"]["total"],
            "inference_bytes": _inference(found),
        }


def backends_of(attention: str) -> list[str]:
    """The backends that a variant has.

    >>> backends_of("diff_v2")
    ['definition', 'fused', 'standard', 'materialised']
    """

    def has(backend: str) -> bool:
        try:
            check_backend(attention, backend)
        except ConfigError:
            return False
        return True

    return [backend for backend in BACKENDS if has(backend)]


def _inference(found: dict[str, Any]) -> int:
    return max(found["prefill"]["memory"]["total"], found["decoding"]["memory"]["total"])


def _memory_sentence(result: dict[str, Any], model: Model) -> str:
    """Whether fewer parameters win back the memory of a second map, and where there is any to win back."""
    one, other = result["model"], result["against"]
    a, b = one["estimate"], other["estimate"]
    share = a["parameters"]["total"] / b["parameters"]["total"]
    pairs = [("inference", _inference(a), _inference(b))]
    if a["training"] and b["training"]:
        pairs.insert(0, ("training", a["training"]["memory"]["total"], b["training"]["memory"]["total"]))
    parts = [f"{_size(x)} against {_size(y)} in {phase} ({x / y:.2f}×)" for phase, x, y in pairs]
    cheaper = [phase for phase, x, y in pairs if x < y]
    won = "in " + " and in ".join(cheaper) if cheaper else "in neither" if len(pairs) > 1 else "not here"
    text = (
        f"{one['name']} has {share:.0%} of the parameters of {other['name']} "
        f"({_count(a['parameters']['total'])} of {_count(b['parameters']['total'])}) and needs {' and '.join(parts)}: "
        f"it needs less {won}."
    )
    if model.attention == "softmax":
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


def _phase_sentence(result: dict[str, Any]) -> str:
    """Whether what is won differs between training and inference."""
    a, b = (result[side]["estimate"] for side in ("model", "against"))
    inference = _inference(a) / _inference(b)
    weights = a["prefill"]["memory"]["weights"] / _inference(a)
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


def _small_machine_sentence(result: dict[str, Any], one: Model, other: Model) -> str:
    """Disk, start-up, and which small machines hold the models with int4 weights."""
    a, b = (result[side]["estimate"] for side in ("model", "against"))
    setting = result["setting"]
    disk = [
        f"{_size(a['disk'][dtype]['bytes'])} against {_size(b['disk'][dtype]['bytes'])} as {dtype}"
        for dtype in ("bf16", "int4")
    ]
    ratio = a["disk"]["int4"]["bytes"] / b["disk"]["int4"]["bytes"]
    text = f"On disk {one.name} takes {' and '.join(disk)} ({ratio:.2f}×)."
    if a["first_token_seconds"] is not None and b["first_token_seconds"] is not None:
        text += (
            f" On {setting['machine']['name']} the first token comes after at least "
            f"{_seconds(a['first_token_seconds'])} against {_seconds(b['first_token_seconds'])}."
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
        f"{_size(needs[0])} against {_size(needs[1])}, which fits as follows where a tenth of the "
        f"memory is left to the system: {held}."
    )


def _small_bytes(model: Model, batch: int, context: int) -> int:
    place: dict[str, Any] = {
        "batch": batch, "context": context, "precision": SMALL_PRECISION, "backend": "standard",
    }  # fmt: skip
    return max(peak(model.built, model.attention, **place).total for peak in (prefill_memory, decoding_memory))


def precision_of(name: str, **dtypes: str | None) -> Precision:
    """A precision by name, with the dtypes that are given put in place of its own.

    Raises:
        ConfigError: an unknown precision or dtype.

    >>> precision_of("bf16", weights="int4", cache=None).weights
    'int4'
    """
    return replace(resolve_precision(name), **{key: value for key, value in dtypes.items() if value is not None})


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """The two models side by side as text: a header, then one row per quantity, with the ratio at the end.

    >>> rows = table(plan("diff_v1:3M", "softmax:3M", context=256, machine=None))
    >>> rows[0], rows[7]
    (['', 'diff_v1:3M', 'softmax:3M', 'ratio'], ['KV cache (per token)', '3.75 KiB', '3.75 KiB', '1.00×'])
    """
    rows = [["", result["model"]["name"], result["against"]["name"], "ratio"]]
    for row in result["ratios"]:
        label = f"{row['label']} ({row['unit']})" if row["unit"] else row["label"]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}×"
        rows.append([label, *(_WRITE[row["format"]](row[side]) for side in ("model", "against")), ratio])
    return rows


def backend_table(result: Mapping[str, Any]) -> list[list[str]]:
    """What each backend costs, as text; the first row is the header.

    ``maps`` are bytes of T × T maps in training, ``to twin`` their ratio to those of a softmax model of the same shape,
    ``FLOPs/token`` what training executes, ``training`` and ``inference`` peaks of memory.

    >>> [row[:3] for row in backend_table(plan("diff_v2:3M", "softmax:3M", context=256, machine=None))][4]
    ['diff_v2:3M', 'materialised', '22.5 MiB']
    """
    rows = [["model", "backend", "maps", "to twin", "cache", "FLOPs/token", "training", "inference"]]
    for row in result["backends"]:
        ratio = row["score_ratio_to_twin"]
        rows.append(
            [row["model"], row["backend"], _size(row["score_bytes"]), "–" if ratio is None else f"{ratio:.2f}×",
             _size(row["cache_bytes"]), _flops(row["training_flops_per_token"]), _size(row["training_bytes"]),
             _size(row["inference_bytes"])]
        )  # fmt: skip
    return rows


def _scaled(value: float | None, base: float, prefixes: tuple[str, ...]) -> str:
    """Three significant digits with a prefix."""
    if value is None:
        return "–"
    scaled, place = float(value), 0
    while abs(scaled) >= base * 0.9995 and place < len(prefixes) - 1:
        scaled, place = scaled / base, place + 1
    if place == 0 and scaled.is_integer():
        return f"{int(scaled)} {prefixes[0]}".strip()
    digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
    return f"{scaled:.{digits}f} {prefixes[place]}".strip()


def _size(value: float | None) -> str:
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _count(value: float | None) -> str:
    return _scaled(value, 1000, ("", "k", "M", "B", "T"))


def _flops(value: float | None) -> str:
    return _scaled(value, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def _seconds(value: float | None) -> str:
    if value is None or value >= 1:
        return _scaled(value, float("inf"), ("s",))
    return _scaled(value * 1e6, 1000, ("µs", "ms", "s"))


_WRITE = {"size": _size, "count": _count, "flops": _flops, "seconds": _seconds}


def written(kind: str, value: float | None) -> str:
    """A number as the tables here write it; ``kind`` is ``size``, ``count``, ``flops`` or ``seconds``.

    >>> written("size", 8 * GiB), written("count", 3_021_312), written("flops", None), written("seconds", 0.0351)
    ('8.00 GiB', '3.02 M', '–', '35.1 ms')
    """
    return _WRITE[kind](value)
