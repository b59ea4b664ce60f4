"""Two models side by side: does a smaller DIFF model win back what its second map costs?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from diffattn.plan import text
from diffattn.plan.activations import resolve
from diffattn.plan.blocks.block import BlockShape
from diffattn.plan.blocks.estimate import estimate_model
from diffattn.plan.estimate import DISK_DTYPES, Estimate
from diffattn.plan.named_model import Model, named
from diffattn.plan.result import BackendRow, Plan, PlannedModel, RatioRow
from diffattn.plan.setting import DEFAULT_SETTING, Setting
from diffattn.variants import BASELINE, VARIANTS


def plan(
    model: str | Model | None = None,
    against: str | Model | None = None,
    setting: Setting = DEFAULT_SETTING,
    *,
    command: str = "",
) -> Plan:
    """Plans one model on one machine, or two of them side by side.

    Args:
        model, against: as in ``parse_model``; a size alone is V1's, and of ``against`` softmax's. A model alone is
            planned alone. Defaults: the paper's 6.8B V1, and where neither is given the 11B softmax model that it
            equals.
        setting: how both are run.
        command: the command that makes the plan again; kept as it is. Default: empty.

    Raises:
        ConfigError: what ``parse_model`` and ``estimate`` raise.

    Source: the question is that of arXiv 2410.05258v2, section 3.2; the sizes that are equal are its Figure 3a.

    >>> result = plan("diff_v1:3M", "softmax:3M", Setting(context=256, machine=None))
    >>> [row.ratio for row in result.ratios if row.key == "cache_bytes_per_token"]
    [1.0]
    """
    models = named(model, against)
    found = [
        PlannedModel(
            name=each.name,
            attention=each.attention,
            shape=each.built,
            left_out=each.left_out,
            estimate=estimate_model(each.built, each.attention, setting),
        )
        for each in models
    ]
    first, second = found[0], found[1] if len(found) > 1 else None
    estimates = [each.estimate for each in found]
    rows = [row for each in models for row in _backend_rows(each, setting)]
    return Plan(
        model=first,
        against=second,
        ratios=ratio_rows(estimates, parallel=setting.ranks > 1),
        backends=rows,
        setting=setting,
        command=command,
        sentences=[
            text.memory_sentence(first, second, rows),
            text.phase_sentence(first, second),
            text.small_machine_sentence(found, setting),
        ],
        notes=[note for each, own in zip(models, estimates, strict=True) for note in text.notes(each, own)],
    )


# Key, label, how it is written, unit, where it is in an estimate.
_ROWS = (
    ("parameters", "Parameters", "count", "", "parameters total"),
    ("active_parameters", "Parameters that a token meets", "count", "", "active_parameters"),
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
    *(
        (f"rank_training_{part}", f"  of it {label}", "size", "", f"rank training {part}")
        for part, label in (
            ("weights", "weights"),
            ("gradients", "gradients so far"),
            ("optimizer", "optimizer state"),
            ("gathered", "gathered weights"),
            ("buffers", "buffers of gradients"),
            ("activations", "activations"),
            ("workspace", "workspace"),
        )
    ),
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


def ratio_rows(estimates: list[Estimate], *, parallel: bool) -> list[RatioRow]:
    """Returns the quantities of one estimate or two in one setting, one a row; of one rank too where ``parallel``."""
    rows = []
    for key, label, written, unit, path in _ROWS:
        if key.startswith("rank_") and not parallel:
            continue
        if key == "active_parameters" and all(found.active_parameters == found.parameters.total for found in estimates):
            continue
        value, *others = (_at(found, path) for found in estimates)
        other = others[0] if others else None
        ratio = None if value is None or not other else value / other
        rows.append(RatioRow(key=key, label=label, format=written, unit=unit, model=value, against=other, ratio=ratio))
    return rows


def _at(found: Estimate, path: str) -> float | None:
    """Returns the number at a path of fields; None where one of them is None."""
    value: object = found
    for step in path.split():
        if value is None:
            return None
        value = value[step] if isinstance(value, dict) else getattr(value, step)
    assert value is None or isinstance(value, int | float)
    return value


def _backend_rows(model: Model, setting: Setting) -> Iterator[BackendRow]:
    """Yields what each backend of the variant costs, and its maps beside those of a softmax model of the same shape."""
    differ = isinstance(model.built, BlockShape)
    for backend in ("standard",) if differ else backends_of(model.attention):
        under = replace(setting, backend=backend)
        found = estimate_model(model.built, model.attention, under)
        twin = found if differ else estimate_model(model.shape, BASELINE, under.alone)
        training = found.training
        yield BackendRow(
            model=model.name,
            attention=model.attention,
            backend=backend,
            score_bytes=found.score_bytes,
            score_ratio_to_twin=found.score_bytes / twin.score_bytes if twin.score_bytes else None,
            cache_bytes=found.decoding.memory.cache,
            cache_ratio_to_twin=found.decoding.memory.cache / twin.decoding.memory.cache,
            training_flops_per_token=None if training is None else training.flops_per_token.executed,
            decoding_flops_per_token=found.decoding.flops_per_token.executed,
            training_bytes=None if training is None else training.memory.total,
            inference_bytes=found.inference_peak,
        )


def backends_of(attention: str) -> tuple[str, ...]:
    """Returns the backends that a variant has, without those that are its standard call by another name.

    >>> backends_of("diff_v2"), backends_of("softmax")
    (('definition', 'fused_cpu', 'fused_triton', 'standard', 'materialised'), ('standard', 'materialised'))
    """
    known = VARIANTS[attention].flops
    return tuple(name for name in known if name == "standard" or resolve(attention, name) != "standard")
