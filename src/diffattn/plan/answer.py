"""Does a smaller DIFF model win back what its second map costs? Two models side by side, in numbers and sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from diffattn.errors import ConfigError
from diffattn.plan.activations import BACKENDS, ONE_MAP, check_backend, find_backend
from diffattn.plan.estimate import DISK_DTYPES, estimate, inference_peak
from diffattn.plan.hardware import Machine, load_machine
from diffattn.plan.named_model import Model, parse_model
from diffattn.plan.precision import Precision, resolve_dtype, resolve_precision
from diffattn.plan.sentences import memory_sentence, notes, phase_sentence, small_machine_sentence

# The paper's V1, and the softmax model that it equals.
PAIR = ("diff_v1:6.8B", "softmax:11B")


def plan(
    model: str | Model | None = None,
    against: str | Model | None = None,
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
    """Plan one model on one machine, or two of them side by side.

    Args:
        model, against: as in ``parse_model``; a size alone is V1's, and of ``against`` softmax's. A model alone is
            planned alone. Defaults: the paper's 6.8B V1, and where neither is given the 11B softmax model that it
            equals.
        context: tokens in a sequence. Default: 4096.
        batch: sequences. Default: 1.
        machine: a name in ``MACHINES``, a JSON file, or None for no times. Default: ``"H100 SXM"``.
        precision: a name in ``PRECISIONS`` or a ``Precision``. Default: ``"mixed"``, bfloat16 with a float32 master.
        backend: how attention is computed, of both. Default: ``"standard"``, the one call of every engine.
        checkpointing, fsdp, tp: as in ``estimate``.
        command: what reproduces this; kept as it is. Default: empty.

    Returns:
        ``model`` and ``against`` (None where one model is planned): each ``name``, ``attention``, ``shape``,
        ``left_out`` and ``estimate``; ``ratios``: rows of ``key``, ``label``, ``format``, ``unit``, both values and
        their ratio (None without a second model); ``backends``: a row for each backend that a variant has;
        ``sentences``: three; ``notes``: what a name was taken for, and what of a checkpoint is not planned;
        ``setting``; ``command``. JSON-able.

    Raises:
        ConfigError: what ``parse_model``, ``load_machine`` and ``estimate`` raise.

    Source: the question is that of arXiv 2410.05258v2, section 3.2; the sizes that are equal are its Figure 3a.

    >>> result = plan("diff_v1:3M", "softmax:3M", context=256, machine=None)
    >>> [row["ratio"] for row in result["ratios"] if row["key"] == "cache_bytes_per_token"]
    [1.0]
    """
    dtypes = resolve_precision(precision)
    backend = find_backend(backend)
    models = named(model, against)
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
            "left_out": each.left_out,
            "estimate": estimate(each.built, each.attention, backend=backend, **place),
        }
        for each in models
    ]
    second = found[1] if len(found) > 1 else None
    estimates = [each["estimate"] for each in found]
    result: dict[str, Any] = {
        "model": found[0],
        "against": second,
        "ratios": _ratio_rows(estimates, parallel=fsdp * tp > 1),
        "backends": [row for each in models for row in _backend_rows(each, place)],
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
        memory_sentence(result, models[0]),
        phase_sentence(result),
        small_machine_sentence(result, models),
    ]
    result["notes"] = [note for each, own in zip(models, estimates, strict=True) for note in notes(each, own)]
    return result


def named(model: str | Model | None, against: str | Model | None) -> list[Model]:
    """The one or two models of a plan; two that have one name are called as they were written.

    Raises:
        ConfigError: as of ``parse_model``.

    >>> [model.name for model in named(None, None)], [model.name for model in named("3M", None)]
    (['diff_v1:6.8B', 'softmax:11B'], ['diff_v1:3M'])
    """
    if model is None and against is None:
        against = PAIR[1]
    found = [
        parse_model(each, variant=each_variant) if isinstance(each, str) else each
        for each, each_variant in ((PAIR[0] if model is None else model, "diff_v1"), (against, "softmax"))
        if each is not None
    ]
    if len(found) > 1 and found[0].name == found[1].name and found[0].built != found[1].built:
        found = [replace(each, name=each.given or each.name) for each in found]
    return found


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


def _ratio_rows(estimates: list[dict[str, Any]], *, parallel: bool) -> list[dict[str, Any]]:
    rows = []
    for key, label, written, unit, path in _ROWS:
        if key.startswith("rank_") and not parallel:
            continue
        value, *others = (_at(found, path) for found in estimates)
        other = others[0] if others else None
        ratio = None if value is None or not other else value / other
        rows.append(
            {"key": key, "label": label, "format": written, "unit": unit, "model": value, "against": other,
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
    # Softmax has nothing to subtract, so its other backends are the standard call by other names.
    alike = ("standard", "materialised") if model.attention in ONE_MAP else backends_of(model.attention)
    for backend in alike:
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
            "inference_bytes": inference_peak(found),
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


def precision_of(name: str, **dtypes: str | None) -> Precision:
    """A precision by name, with the dtypes that are given put in place of its own.

    Raises:
        ConfigError: an unknown precision or dtype.

    >>> precision_of("bf16", weights="int4", cache=None).weights
    'int4'
    """
    chosen = {key: resolve_dtype(value, key) for key, value in dtypes.items() if value is not None}
    return replace(resolve_precision(name), **chosen)
