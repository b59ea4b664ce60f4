"""The cost of a model whose layers differ: weights, cache and FLOPs of inference. Its training is not planned."""

from __future__ import annotations

from collections.abc import Iterator

from diffattn.errors import ConfigError
from diffattn.plan.activations import AUTO
from diffattn.plan.blocks.block import BlockShape
from diffattn.plan.cost import bytes_of
from diffattn.plan.estimate import (
    DISK_DTYPES,
    DiskSize,
    Estimate,
    PhaseCost,
    Rank,
    RankInference,
    TokenFlops,
    estimate,
)
from diffattn.plan.inference import InferenceMemory
from diffattn.plan.memory import inference_memory
from diffattn.plan.setting import BYTES, Setting
from diffattn.plan.shape import ModelShape


def estimate_model(shape: ModelShape, attention: str, setting: Setting) -> Estimate:
    """Returns what is known of a model, whether its layers are alike (``estimate``) or differ.

    Raises:
        ConfigError: what ``estimate`` raises; or several ranks, or a backend other than the standard call, for a model
            whose layers differ.

    >>> estimate_model(ModelShape.preset("3M"), "softmax", Setting(context=256)).parameters.total
    3000384
    """
    return _estimate(shape, setting) if isinstance(shape, BlockShape) else estimate(shape, attention, setting)


def inference_need(shape: ModelShape, attention: str, setting: Setting) -> int:
    """Returns the bytes at the larger of the two peaks of inference, whether the layers are alike or differ."""
    if not isinstance(shape, BlockShape):
        return inference_memory(shape, attention, setting)
    return max(memory.total for memory in (_prefill(shape, setting), _decoding(shape, setting)))


def block_notes(name: str, shape: BlockShape) -> Iterator[str]:
    """Yields what has to be known of such a plan: its layers, its experts, and what is not planned."""
    yield f"{name} has {', '.join(shape.kinds())}."
    total, active = shape.parameters().total, shape.active()
    if active != total:
        yield (
            f"Of its {total:,} parameters a token meets {active:,}: memory and disk are counted by all of them, FLOPs "
            "by these, and bytes that are read as if each token chose other experts."
        )
    if any(each.state for each in shape.blocks):
        yield (
            "A state counts as part of the cache, in the format of the cache; it does not grow with the context. Its "
            "update is counted token by token."
        )
    if any(each.decoding_pairs for each in shape.blocks):
        yield "The cache holds latent keys and values, which decoding reads as they are."
    yield (
        f"Training of {name} is not planned, because it is not known what its layers keep for the backward pass. In "
        "inference the activations are those of the widest layer; what choosing experts and scans need besides is left "
        "out."
    )
    for what in shape.unplanned:
        yield f"Not planned: {what}."


def _weights(shape: BlockShape, setting: Setting) -> int:
    return bytes_of(shape.parameters().total, 0, setting.precision.weights)


def _memory(shape: BlockShape, setting: Setting, cache: int, *activations: int) -> InferenceMemory:
    # Autocast's copies of what products read.
    copies = 2 * shape.parameters().non_embedding if setting.precision.autocast else 0
    return InferenceMemory(_weights(shape, setting), cache, max(activations), 0, copies)


def _prefill(shape: BlockShape, setting: Setting) -> InferenceMemory:
    """Returns the peak of reading a prompt: the widest layer, or the logits of the last token."""
    size, tokens = int(BYTES[setting.precision.activations]), setting.batch * setting.context
    cache = int(setting.batch * shape.cached_in_prefill(setting.context) * BYTES[setting.precision.cache])
    wide = 2 * shape.hidden_size + max(each.wide for each in shape.blocks)
    return _memory(
        shape, setting, cache, size * wide * tokens,
        size * (shape.hidden_size * tokens + shape.vocab_size * setting.batch),
    )  # fmt: skip


def _decoding(shape: BlockShape, setting: Setting) -> InferenceMemory:
    """Returns the peak of decoding one token: its own cache, and one layer's once more, which grows by copying."""
    size, batch, context = int(BYTES[setting.precision.activations]), setting.batch, setting.context
    of_value = BYTES[setting.precision.cache]
    cache = int(batch * shape.cached(context) * of_value)
    new = int(batch * (shape.cached_in_prefill(1) - shape.cached_in_prefill(0)) * of_value)
    once_more = int(batch * max(each.kept * (each.tokens_kept(context) + 1) for each in shape.blocks) * of_value)
    wide = batch * size * (2 * shape.hidden_size + max(each.wide for each in shape.blocks))
    return _memory(shape, setting, cache, new + wide + once_more, new + wide + size * batch * shape.vocab_size)


def _estimate(shape: BlockShape, setting: Setting) -> Estimate:
    name = shape.name or "a model whose layers differ"
    if setting.backend not in (AUTO, "standard"):
        raise ConfigError(
            f"backend {setting.backend} for {name}", "standard, the one way that is counted", "leave it out"
        )
    if setting.ranks > 1:
        raise ConfigError(
            f"{setting.ranks} processes for {name}", "one, which alone is planned", "leave out --ranks and --tp"
        )
    precision, machine, batch, context = setting.precision, setting.machine, setting.batch, setting.context
    counted, tokens = shape.parameters(), batch * context
    embedding = shape.vocab_size * shape.hidden_size

    def phase(
        memory: InferenceMemory, flops: tuple[int, int], per: int, moved: int, made: int
    ) -> PhaseCost[InferenceMemory]:
        seconds = None if machine is None else machine.seconds(flops[1], moved, precision.activations)
        return PhaseCost(
            memory=memory, flops_per_token=TokenFlops(flops[0] / per, flops[1] / per), flops=flops[1],
            bytes_moved=moved, seconds=seconds, tokens_per_second=None if seconds is None else made / seconds,
        )  # fmt: skip

    # Logits are made for the last token of each sequence alone.
    linear = shape.linear_flops * tokens - 2 * embedding * (tokens - batch)
    attending = shape.attention_flops(context)
    reading = _prefill(shape, setting)
    read = bytes_of(shape.read_by(tokens), 0, precision.weights)
    passed = sum(each.layers * (2 * shape.hidden_size + each.wide) for each in shape.blocks)
    prefill = phase(
        reading, (linear + batch * attending[0], linear + batch * attending[1]), tokens,
        read + reading.cache + 2 * int(BYTES[precision.activations]) * passed * tokens, tokens,
    )  # fmt: skip
    one_more = shape.decoding_attention_flops(context + 1)
    writing = _decoding(shape, setting)
    decoding = phase(
        writing, (batch * (shape.linear_flops + one_more[0]), batch * (shape.linear_flops + one_more[1])), batch,
        bytes_of(shape.read_by(batch), 0, precision.weights) + writing.cache, batch,
    )  # fmt: skip
    read_seconds = None if machine is None else machine.read_seconds(_weights(shape, setting))
    sizes = {dtype: bytes_of(counted.total, 0, dtype) for dtype in DISK_DTYPES}
    return Estimate(
        backend="standard",
        parameters=counted,
        active_parameters=shape.active(),
        training=None,
        prefill=prefill,
        decoding=decoding,
        disk={
            dtype: DiskSize(found, None if machine is None else machine.read_seconds(found))
            for dtype, found in sizes.items()
        },
        read_seconds=read_seconds,
        first_token_seconds=None if read_seconds is None or prefill.seconds is None else read_seconds + prefill.seconds,
        cache_bytes_per_token=writing.cache // tokens,
        gradient_bytes=None,
        score_bytes=0,
        rank=Rank(
            ranks=1, wrapper="", replicate=1, shard=1, tp=1, batch=batch, training=None, prefill=_alone(reading),
            decoding=_alone(writing),
        ),
    )  # fmt: skip


def _alone(memory: InferenceMemory) -> RankInference:
    return RankInference(
        weights=memory.weights, cache=memory.cache, scores=memory.scores, activations=memory.activations,
        workspace=memory.workspace,
    )  # fmt: skip
