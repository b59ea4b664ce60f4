"""The memory that training, prefill and decoding hold at their peak, before anything is built.

What is counted is what a tensor allocator hands out: parameters, gradients, optimizer state, activations, the cache.
The interpreter, the libraries and the allocator's own rounding are not. The activations are those of ``diffattn.model``
(see ``activations.py``, and ``inference.py`` for prefill and decoding), so another implementation of the same maths may
hold more or less.

Letters as in ``activations.py``. A *moment* is a point of the step at which the peak may lie; the peak is the largest
of them, and each is an exact polynomial in B and T with the terms 1, B, T, B·T and B·T².
"""

from __future__ import annotations

from dataclasses import dataclass

from diffattn.errors import ConfigError
from diffattn.plan.activations import Layer, layer, norm
from diffattn.plan.cost import ByKind, bytes_of, count_parameters, float32_parameters
from diffattn.plan.inference import Inference, InferenceMemory
from diffattn.plan.setting import BYTES, Setting
from diffattn.plan.shape import ModelShape
from diffattn.variants import VARIANTS


@dataclass(frozen=True)
class TrainingMemory(ByKind):
    """Bytes alive at the peak of a training step, by kind.

    >>> TrainingMemory(1, 2, 3, 4, 5, 6).total
    21
    """

    weights: int
    """Bytes of the parameters."""
    gradients: int
    """Bytes of those gradients that exist at the peak."""
    optimizer: int
    """Bytes of both moments of AdamW and of the second copy of the weights, where there is one."""
    activations: int
    """Bytes of the results that the backward pass needs."""
    scores: int
    """Bytes of the T × T maps that a backend writes out."""
    workspace: int
    """Bytes that the passes need besides: gradients of activations, and autocast's copies of weights."""


def training_memory(shape: ModelShape, attention: str, setting: Setting) -> TrainingMemory:
    """Returns the peak of one training step: forward, backward, clipping, fused AdamW.

    The gradients are freed after it.

    ``max over moments of (weights + gradients + optimizer + activations + scores + workspace)``.

    Args:
        shape: the softmax Transformer being replaced; for a matched V2, what ``match_parameters`` returned.
        attention: a name in ``VARIANTS``.
        setting: how it is trained.

    Returns:
        The six kinds of bytes at the peak.

    Raises:
        ConfigError: an unknown name, a variant that the shape cannot carry, or training in integers.

    Source: ``training_moments``; docs/plan.md gives the error against measured steps.

    >>> shape = ModelShape.preset("3M")
    >>> training_memory(shape, "diff_v1", Setting(context=256, precision="fp32", backend="fused_cpu")).optimizer
    24011040
    """
    found = training_moments(shape, attention, setting)
    return max(found.values(), key=lambda memory: memory.total)


def prefill_memory(shape: ModelShape, attention: str, setting: Setting) -> InferenceMemory:
    """Returns the peak of reading a prompt into the cache and giving one row of logits, without gradients.

    ``weights + cache + the widest of: rotating q, subtracting and norming, maps, feed-forward, logits`` of one layer.
    Arguments and errors are those of ``training_memory``.

    Source: the profiler's memory events on ``diffattn.model``.

    >>> shape = ModelShape.preset("3M")
    >>> prefill_memory(shape, "softmax", Setting(context=256, precision="bf16")).cache
    983040
    """
    state = Inference(shape, attention, setting)
    return max(state.prefill(), key=lambda memory: memory.total)


def decoding_memory(shape: ModelShape, attention: str, setting: Setting) -> InferenceMemory:
    """Returns the peak of decoding one token behind ``context`` cached ones.

    ``weights + cache + one new token in it + one layer's keys once more``: a dynamic cache grows by copying.
    Arguments and errors are those of ``training_memory``.

    Source: ``transformers.cache_utils.DynamicLayer``; the profiler's memory events.

    >>> shape = ModelShape.preset("3M")
    >>> decoding_memory(shape, "diff_v2", Setting(context=256, precision="bf16", backend="fused_cpu")).cache
    983040
    """
    state = Inference(shape, attention, setting)
    return max(state.decoding(), key=lambda memory: memory.total)


def inference_memory(shape: ModelShape, attention: str, setting: Setting) -> int:
    """Returns the bytes at the larger of the two peaks of inference, prefill's and decoding's.

    >>> inference_memory(ModelShape.preset("3M"), "softmax", Setting(context=256, precision="bf16"))
    8196224
    """
    return max(peak(shape, attention, setting).total for peak in (prefill_memory, decoding_memory))


def training_moments(shape: ModelShape, attention: str, setting: Setting) -> dict[str, TrainingMemory]:
    """Returns the bytes alive at each point of a training step at which the peak may lie.

    With S what the forward pass saved (of all layers, or with checkpointing their inputs), per token:

    ========================================= ===========================================================
    end of the forward pass                   S, logits a·V (and their float32 copy), log-softmax 4·V
    backward of the loss                      S, 12·V: log-softmax, its gradient, that of the logits
    backward of the output projection         S, a·V, and V·D gradients
    backward of the final norm                S, five float32 buffers of D, V·D gradients
    last layer: feed-forward, attention       what all layers keep, and what the backward pass needs there
    first layer: feed-forward, attention      what one layer keeps and needs, and all gradients but the last
    gradient of the embedding                 all gradients; a tied one is summed of two
    optimizer step                            weights, gradients, optimizer state
    ========================================= ===========================================================

    Weights and optimizer state are there always. Arguments and errors are those of ``training_memory``.

    Source: the profiler's memory events on ``diffattn.model``.

    >>> found = training_moments(ModelShape.preset("3M"), "softmax", Setting(context=2, precision="fp32"))
    >>> max(found, key=lambda name: found[name].total)
    'gradient of the embedding'
    """
    setting = setting.for_model(shape, attention)
    dtypes, batch, context = setting.precision, setting.batch, setting.context
    if not dtypes.trains:
        raise ConfigError(
            f"weights={dtypes.weights!r} for training", "floating-point weights", "use one of fp32, bf16, fp16"
        )
    counted, lambdas = count_parameters(shape, attention), float32_parameters(shape, attention)
    autocast, size = dtypes.autocast, int(BYTES[dtypes.activations])
    gradient = int(BYTES[dtypes.gradients])
    L, D, V, F = shape.num_layers, shape.hidden_size, shape.vocab_size, shape.intermediate_size
    tokens, pairs = batch * context, batch * context * context
    one = layer(shape, attention, backend=setting.backend, size=size, autocast=autocast, gpu=setting.gpu)

    weights = bytes_of(counted.total, lambdas, dtypes.weights)
    optimizer = 2 * bytes_of(counted.total, lambdas, dtypes.optimizer) + 4 * count_tensors(shape, attention)
    if dtypes.master is not None:
        optimizer += bytes_of(counted.total, 0, dtypes.master)
    head = embedding = V * D
    of_layer = (counted.non_embedding - D) // L
    # Autocast's copies: of a layer's matrices (its norms stay), and of the output projection.
    gains = (counted.norms - D) // L + VARIANTS[attention].small_parameters(shape)
    copies = 2 * (of_layer - gains) if autocast else 0
    head_copy = 2 * head if autocast else 0
    residual = 4 if autocast else size

    # Saved outside the layers: token ids twice, final norm, cosines and sines.
    rope = 2 * size * shape.head_dim * context if not autocast else 8 * shape.head_dim * context
    outside = 16 * tokens + norm(D, size, autocast, 1) * tokens + rope
    if setting.checkpointing:
        # The first layer's input is the embedding's result; the last layer's result is the final norm's input.
        kept, copied, maps = L * residual * D * tokens, 0, 0
    else:
        kept = L * _kept(one, tokens, context)
        copied, maps = L * copies, L * one.scores * pairs
    saved = kept + outside
    again = _kept(one, tokens, context) if setting.checkpointing else 0
    again_maps, again_copies = (one.scores * pairs, copies) if setting.checkpointing else (0, 0)

    def at(gradients: int, activations: int, scores: int, workspace: int) -> TrainingMemory:
        return TrainingMemory(weights, gradients, optimizer, activations, scores, workspace)

    last = head * gradient
    rest = bytes_of(
        counted.total - (embedding if shape.tie_word_embeddings else 2 * embedding), lambdas, dtypes.gradients
    )
    final = norm(D, size, autocast, 1) * tokens
    before_first = last + rest - of_layer * gradient
    down = D * F * gradient
    logits = (size + (4 if size < 4 else 0)) * V
    first = _kept(one, tokens, context) + rope
    freed = (one.feed_forward + one.behind) * tokens
    found = {
        # The uncast result of the final norm is the model's output, alive until the loss is there.
        "end of the forward pass": at(
            0, saved + (logits + 4 * V + (4 * D if autocast else 0)) * tokens, maps, L * copies + head_copy
        ),
        "backward of the loss": at(0, saved + 4 * V * tokens, maps, copied + head_copy + 8 * V * tokens),
        "backward of the output projection": at(
            0, saved, maps, copied + head_copy + size * (V + D) * tokens + head * (2 if autocast else gradient)
        ),
        "backward of the final norm": at(
            last, saved - (4 + size) * D * tokens, maps, copied + (2 * head if autocast else 0) + 20 * D * tokens
        ),
        "last layer, feed-forward": at(
            last + down,
            saved - final + again,
            maps + again_maps,
            copied + again_copies + one.in_feed_forward * tokens,
        ),
        "last layer, attention": at(
            last + 3 * down,
            saved - final + again - freed,
            maps + again_maps,
            copied + again_copies + one.in_attention * tokens + one.in_scores * pairs,
        ),
        "first layer, feed-forward": at(
            before_first + down, first, one.scores * pairs, copies + one.in_feed_forward * tokens
        ),
        "first layer, attention": at(
            before_first + 3 * down,
            first - freed,
            one.scores * pairs,
            copies + one.in_attention * tokens + one.in_scores * pairs,
        ),
        "gradient of the embedding": at(
            last + rest + embedding * gradient, 0, 0, _tied(shape, gradient, autocast) + residual * D * tokens
        ),
        "optimizer step": at(
            last + rest + (0 if shape.tie_word_embeddings else embedding * gradient),
            0,
            0,
            4 * count_tensors(shape, attention),
        ),
    }
    return found


def _kept(one: Layer, tokens: int, context: int) -> int:
    return one.token * tokens + one.position * context


def _tied(shape: ModelShape, gradient: int, autocast: bool) -> int:
    """Returns the bytes of the sum of a tied embedding's two gradients; under autocast one of them takes it."""
    return shape.vocab_size * shape.hidden_size * gradient if shape.tie_word_embeddings and not autocast else 0


def count_tensors(shape: ModelShape, attention: str) -> int:
    """Counts the tensors of parameters, each of which has its own step count in AdamW.

    >>> count_tensors(ModelShape.preset("3M"), "softmax")
    47
    """
    return shape.num_layers * (9 + VARIANTS[attention].own_parameters) + 2 + (not shape.tie_word_embeddings)
