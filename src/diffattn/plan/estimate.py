"""What one model costs on one machine: memory, FLOPs, bytes moved, seconds, disk, and its share under parallelism.

Seconds are a roofline's: peak rates, one limit at a time, no overhead. They are lower bounds, and for telling which of
two models is slower and why they are of more use than for telling the time.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from diffattn.errors import ConfigError
from diffattn.plan.activations import heads, layer, norm, readers
from diffattn.plan.cost import count_parameters, decoding_flops_per_token, flops_per_token
from diffattn.plan.hardware import Machine
from diffattn.plan.memory import decoding_memory, prefill_memory, training_memory, training_moments
from diffattn.plan.precision import BYTES, Precision, resolve_precision, weight_bytes
from diffattn.plan.shape import ModelShape, check_positive_int

DISK_DTYPES = ("fp32", "bf16", "int8", "int4")
# How often decoding reads the cache where an attention call is made twice or four times: V1's two_calls read each key
# once and the values of width 2d twice, its four_calls both twice. In halves.
_CACHE_READS = {"two_calls": 3, "four_calls": 4}


def estimate(
    shape: ModelShape,
    attention: str,
    *,
    context: int,
    batch: int,
    precision: Precision | str,
    backend: str,
    checkpointing: bool = False,
    machine: Machine | None = None,
    fsdp: int = 1,
    tp: int = 1,
) -> dict[str, Any]:
    """Everything that is known of a model before it is built, as one JSON-able object.

    ``seconds = max(FLOPs / rate of the activations' dtype, bytes moved / bandwidth)``, and the bytes moved are

    ======== ==============================================================================================
    training weights read by each pass and written once, gradients written and read, optimizer state read and
             written, what the layers keep (and maps) written and read, logits in float32 written and read
    prefill  weights read, cache written, what the layers hold (and maps) written and read
    decoding weights and cache read, for one new token of each sequence
    ======== ==============================================================================================

    An embedding that is not tied is looked up, not read. Checkpointing adds a forward pass of the layers to training.

    Args:
        shape: the softmax Transformer being replaced; for a matched V2, what ``match_parameters`` returned.
        attention: a name in ``VARIANTS``.
        context: tokens in a sequence, at least 1; decoding adds one behind them.
        batch: sequences, at least 1; under FSDP those of one rank.
        precision: a ``Precision``, or the name of one in ``PRECISIONS``.
        backend: as in ``training_memory``.
        checkpointing: whether layers are computed again in the backward pass. Default: False.
        machine: its rates. Default: None, and no times.
        fsdp: ranks that share weights, gradients and optimizer state. Default: 1.
        tp: ranks that share heads and the feed-forward network. Default: 1.

    Returns:
        ``parameters``; ``training`` (None where the weights are integers), ``prefill`` and ``decoding``, each with
        ``memory`` (bytes), ``flops_per_token``, ``flops``, ``bytes_moved``, ``intensity``, ``seconds`` and
        ``tokens_per_second``; ``disk``; ``read_seconds`` and ``first_token_seconds``; ``cache_bytes_per_token``;
        ``gradient_bytes`` (of all parameters; the peak may lie where few exist); ``score_bytes``; ``rank``.

    Raises:
        ConfigError: an unknown name, a variant that the shape cannot carry, a number below 1, or a ``tp`` that does not
            divide the key/value heads.

    Source: ``cost.py``, ``memory.py``; Williams, Waterman, Patterson, "Roofline" (2009).

    >>> found = estimate(ModelShape.preset("3M"), "diff_v1", context=256, batch=1, precision="bf16", backend="fused")
    >>> found["parameters"]["total"], found["decoding"]["memory"]["cache"]
    (3001344, 983040)
    """
    precision = resolve_precision(precision)
    for key, value in (("context", context), ("batch", batch), ("fsdp", fsdp), ("tp", tp)):
        check_positive_int(key, value)
    counted = count_parameters(shape, attention)
    place: dict[str, Any] = {"batch": batch, "context": context, "precision": precision, "backend": backend}
    tokens, pairs = batch * context, batch * context * context
    size = int(BYTES[precision.activations])
    one = layer(shape, attention, backend=backend, size=size, autocast=precision.autocast)
    held = shape.num_layers * (one.token * tokens + one.position * context + one.scores * pairs)
    weights = weight_bytes(shape, attention, dtype=precision.weights)
    embedding = shape.vocab_size * shape.hidden_size
    read = weights if shape.tie_word_embeddings else weights - int(embedding * BYTES[precision.weights])

    def phase(memory: Any, flops_per_token: dict[str, Any], flops: int, moved: int, made: int) -> dict[str, Any]:
        seconds = None if machine is None else machine.seconds(flops, moved, precision.activations)
        return {
            "memory": asdict(memory) | {"total": memory.total},
            "flops_per_token": flops_per_token,
            "flops": flops,
            "bytes_moved": moved,
            "intensity": flops / moved,
            "seconds": seconds,
            "tokens_per_second": None if seconds is None else made / seconds,
        }

    training = None
    if not precision.weights.startswith("int"):
        peak = training_memory(shape, attention, **place, checkpointing=checkpointing)
        per_token = flops_per_token(shape, attention, context=context, backend=backend)
        forward = flops_per_token(shape, attention, context=context, phase="forward", backend=backend)
        again = forward.executed - 2 * embedding if checkpointing else 0
        gradients = int(counted.total * BYTES[precision.gradients])
        moved = (3 + checkpointing) * read + 2 * (gradients + peak.optimizer + held + 4 * shape.vocab_size * tokens)
        executed = per_token.executed + again
        training = phase(peak, {"model": per_token.model, "executed": executed}, executed * tokens, moved, tokens) | {
            "peak_without_checkpointing": training_memory(shape, attention, **place).total,
            "peak_with_checkpointing": training_memory(shape, attention, **place, checkpointing=True).total,
        }

    forward = flops_per_token(shape, attention, context=context, phase="forward", backend=backend)
    # Logits are made for the last token of each sequence alone.
    model, executed = (each * tokens - 2 * embedding * (tokens - batch) for each in (forward.model, forward.executed))
    peak_prefill = prefill_memory(shape, attention, **place)
    cache = int(2 * shape.num_kv_heads * shape.head_dim * shape.num_layers * tokens * BYTES[precision.cache])
    prefill = phase(
        peak_prefill,
        {"model": model / tokens, "executed": executed / tokens},
        executed,
        read + cache + 2 * held,
        tokens,
    )

    step = decoding_flops_per_token(shape, attention, context=context + 1, backend=backend)
    reads = _CACHE_READS.get(backend, 2) if attention == "diff_v1" else 2
    decoding = phase(
        decoding_memory(shape, attention, **place),
        {"model": step.model, "executed": step.executed},
        step.executed * batch,
        read + cache * reads // 2,
        batch,
    )

    disk = {dtype: weight_bytes(shape, attention, dtype=dtype) for dtype in DISK_DTYPES}
    read_seconds = None if machine is None else machine.read_seconds(weights)
    first = None if read_seconds is None or prefill["seconds"] is None else read_seconds + prefill["seconds"]
    return {
        "parameters": asdict(counted) | {"non_embedding": counted.non_embedding, "total": counted.total},
        "training": training,
        "prefill": prefill,
        "decoding": decoding,
        "disk": {
            dtype: {"bytes": found, "read_seconds": None if machine is None else machine.read_seconds(found)}
            for dtype, found in disk.items()
        },
        "read_seconds": read_seconds,
        "first_token_seconds": first,
        "cache_bytes_per_token": cache // tokens,
        "gradient_bytes": None if training is None else int(counted.total * BYTES[precision.gradients]),
        "score_bytes": one.scores * pairs * (1 if checkpointing else shape.num_layers),
        "rank": _rank(shape, attention, training is not None, prefill, decoding, place, checkpointing, fsdp, tp),
    }


def inference_peak(found: dict[str, Any]) -> int:
    """Bytes at the larger of the two peaks of an estimate, prefill's and decoding's."""
    return max(found["prefill"]["memory"]["total"], found["decoding"]["memory"]["total"])


def call_heads(shape: ModelShape, attention: str) -> tuple[int, int, int]:
    """Query heads, key/value heads and width of the one attention call of a layer: what an engine and TP see.

    >>> call_heads(ModelShape.preset("1.4B"), "diff_v1")
    (16, 8, 256)
    """
    queries, width = heads(shape, attention)
    return queries, shape.num_kv_heads // (2 if attention == "diff_v1" else 1), width


def _rank(
    shape: ModelShape,
    attention: str,
    trained: bool,
    prefill: dict[str, Any],
    decoding: dict[str, Any],
    place: dict[str, Any],
    checkpointing: bool,
    fsdp: int,
    tp: int,
) -> dict[str, Any]:
    """Bytes of one of fsdp × tp ranks, by part.

    Weights, gradients and optimizer state are cut into fsdp · tp equal parts, and FSDP gathers one layer (1 / tp of it)
    at a time. Maps and cache are cut by tp. Of the layers' activations what lies between the projections is cut by tp,
    while norms and residuals are whole on every rank; with checkpointing what is kept is a residual, so all is whole.
    Workspace is counted whole. Training is the largest of the moments as a rank has them: where parameters are cut and
    activations are not, the peak lies elsewhere than on one device. Inference is cut by tp alone.
    """
    groups = call_heads(shape, attention)[1]
    if groups % tp:
        possible = [str(number) for number in range(1, groups + 1) if groups % number == 0]
        raise ConfigError(
            f"tp={tp} given; a divisor of the {groups} key/value heads of the one {attention} call is wanted, so that "
            f"both maps of a pair stay on one rank; use one of {', '.join(possible)}"
        )
    precision = place["precision"]
    size = int(BYTES[precision.activations])
    one = layer(shape, attention, backend=place["backend"], size=size, autocast=precision.autocast)
    whole = norm(shape.hidden_size, size, precision.autocast, readers(attention))
    whole += norm(shape.hidden_size, size, precision.autocast, 2)
    cut = one.token - whole

    def activations(amount: int) -> int:
        return amount if checkpointing else -(-amount * (whole * tp + cut) // (one.token * tp))

    found: dict[str, Any] = {"fsdp": fsdp, "tp": tp, "training": None}
    if trained:
        shards = fsdp * tp
        of_layer = (count_parameters(shape, attention).non_embedding - shape.hidden_size) // shape.num_layers
        moments = []
        for moment in training_moments(shape, attention, **place, checkpointing=checkpointing).values():
            parts = {part: -(-getattr(moment, part) // shards) for part in ("weights", "gradients", "optimizer")}
            parts["gathered"] = -(-int(of_layer * size) // tp) if fsdp > 1 else 0
            parts |= {"activations": activations(moment.activations), "scores": -(-moment.scores // tp)}
            parts["workspace"] = moment.workspace
            moments.append(parts | {"total": sum(parts.values())})
        found["training"] = max(moments, key=lambda parts: parts["total"])
    for name, phase in (("prefill", prefill), ("decoding", decoding)):
        parts = {part: -(-phase["memory"][part] // tp) for part in ("weights", "cache", "scores")}
        parts |= {part: phase["memory"][part] for part in ("activations", "workspace")}
        found[name] = parts | {"total": sum(parts.values())}
    return found
