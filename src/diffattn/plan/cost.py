"""The cost of a shape before anything is built: parameters, FLOPs per token, bytes of cache.

The model that is counted: pre-RMSNorm decoder layers, softmax or differential attention with RoPE, a SwiGLU
feed-forward network (gate, up, down), no biases, one final RMSNorm. D, n, G, d as in ``ModelShape``; F is
``intermediate_size``, V ``vocab_size``, L ``num_layers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

from diffattn.attention_flops import Form
from diffattn.errors import ConfigError
from diffattn.plan.activations import check_backend
from diffattn.plan.setting import BYTES
from diffattn.plan.shape import ModelShape, check_positive_int
from diffattn.variants import BASELINE, VARIANTS

PHASES = ("forward", "training")


@dataclass(frozen=True)
class ByKind:
    """Bytes that are alive at one time, a field for each kind."""

    @property
    def total(self) -> int:
        """Bytes of all kinds together."""
        return sum(astuple(self))

    def to_json(self) -> dict[str, int]:
        """Returns the bytes by kind, and their sum."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by part, summed over the layers.

    >>> Parameters(embedding=8, lm_head=0, attention=4, feed_forward=6, norms=2).total
    20
    """

    embedding: int
    """Parameters of the embedding, V·D."""
    lm_head: int
    """Parameters of the output projection, V·D; 0 where it is the embedding."""
    attention: int
    """Parameters of the projections of attention, with λ and the gain of V1's norm."""
    feed_forward: int
    """Parameters of the feed-forward networks, 3·D·F per layer."""
    norms: int
    """Gains of the RMSNorms, 2·D per layer and D at the end."""

    @property
    def non_embedding(self) -> int:
        """Everything but the embedding and the output projection, so the same whether these two are tied or not."""
        return self.attention + self.feed_forward + self.norms

    @property
    def total(self) -> int:
        """All parameters, each counted once."""
        return self.embedding + self.lm_head + self.non_embedding

    def to_json(self) -> dict[str, int]:
        """Returns the numbers by part, and the two sums."""
        return asdict(self) | {"non_embedding": self.non_embedding, "total": self.total}


@dataclass(frozen=True)
class Flops:
    """FLOPs per token, a multiply-add being two: ``model`` by the definition, ``executed`` by a backend.

    >>> Flops(model=100, executed=150).executed
    150
    """

    model: int
    executed: int


def count_parameters(
    shape: ModelShape,
    attention: str,
    *,
    subln_affine: bool = True,
    head_norm: bool | None = None,
    lambda_form: str = "sigmoid",
) -> Parameters:
    """Counts the parameters of one variant of a shape.

    Attention per layer: W_Q and W_O n·d·D each, W_K and W_V G·d·D each. V1 adds its four λ vectors, 4d, and the
    gain of its norm, 2d. V2 doubles W_Q and adds W_λ, D·n. Gated attention adds W_g, n·d·D. What a checkpoint has
    beside its shape (``BuiltShape``), such as biases, is counted too.

    Args:
        shape: the softmax Transformer being replaced.
        attention: a name in ``VARIANTS``.
        subln_affine: whether a norm of each output head has a learnable gain (the authors' code) or none (the paper).
            Default: True.
        head_norm: whether there is such a norm; ``None`` for the variant's own, which V1 alone has. Default: None.
        lambda_form: V2's λ; ``"one"`` has no W_λ. Default: ``"sigmoid"``.

    Raises:
        ConfigError: a variant that is unknown or that the shape cannot carry.

    Source: arXiv 2410.05258v2, section 2; "Differential Transformer V2" (20 January 2026); arXiv 2505.06708.

    >>> shape = ModelShape.preset("3M")
    >>> count_parameters(shape, "diff_v1").total - count_parameters(shape, "softmax").total
    960
    """
    shape.check_variant(attention)
    variant = VARIANTS[attention]
    own = variant.small_parameters(shape, head_norm=head_norm, subln_affine=subln_affine, lambda_form=lambda_form)
    own += variant.matrix_parameters(shape, lambda_form=lambda_form)
    embedding = shape.vocab_size * shape.hidden_size
    return Parameters(
        embedding=embedding,
        lm_head=0 if shape.tie_word_embeddings else embedding,
        attention=shape.num_layers * (_projections(shape) + own) + shape.beside("attention"),
        feed_forward=shape.num_layers * 3 * shape.hidden_size * shape.intermediate_size + shape.beside("feed_forward"),
        norms=(2 * shape.num_layers + 1) * shape.hidden_size + shape.beside("norms"),
    )


def match_parameters(shape: ModelShape, attention: str, *, tolerance: float = 0.005, **switches: Any) -> ModelShape:
    """Returns the shape with which a variant has as many parameters as the softmax twin has with the given one.

    Softmax and V1 return the shape as it is: V1's λ and gains are the whole difference. V2 spends n·d·D + D·n more per
    layer on W_Q and W_λ, so its feed-forward network gets narrower by (n·d + n)/3; gated attention, n·d·D more on W_g,
    by n·d/3. Where r signal heads share a noise head, V2's W_Q has n·d·D/r more, and V1's (1 − 1/r)·n·d·D/2 less, so
    that its feed-forward network gets wider. All to the nearest multiple of 8, or, where that misses the tolerance, to
    the nearest integer.

    Args:
        shape: the softmax Transformer being replaced.
        attention: a name in ``VARIANTS``.
        tolerance: largest allowed difference of the totals, as a share of the softmax total. Default: 0.005.
        switches: further arguments of ``count_parameters``.

    Raises:
        ConfigError: a variant that the shape cannot carry, or no width of at least 1 within the tolerance.

    Source: the matching rule is ours; the sizes are those of ``count_parameters``.

    >>> shape = ModelShape.preset("3M")
    >>> shape.intermediate_size, match_parameters(shape, "diff_v2").intermediate_size
    (512, 448)
    """
    wanted = count_parameters(shape, BASELINE).total
    surplus = count_parameters(shape, attention, **switches).total - wanted
    if not VARIANTS[attention].matrix_parameters(shape, **switches):
        return shape
    exact = shape.intermediate_size - surplus / (3 * shape.hidden_size * shape.num_layers)
    for width in (8 * round(exact / 8), round(exact)):
        if width >= 1:
            refitted = replace(shape, intermediate_size=width)
            if abs(count_parameters(refitted, attention, **switches).total - wanted) <= tolerance * wanted:
                return refitted
    change = exact - shape.intermediate_size
    raise ConfigError(
        f"intermediate_size={shape.intermediate_size} for a matched {attention}, which "
        f"{'widens' if change > 0 else 'narrows'} it by {abs(change):.1f}",
        f"a whole width of at least 1 within {tolerance:.2%} of {wanted} parameters",
        "widen intermediate_size or leave the pair unmatched",
    )


def flops_per_token(
    shape: ModelShape,
    attention: str,
    *,
    context: int,
    phase: str = "training",
    backend: str = "standard",
    causal: bool = True,
) -> Flops:
    """Returns FLOPs per token, averaged over one sequence.

    ``linear = 2 · (matrix parameters of the layers + V·D of the output projection)``; the embedding lookup is none.
    ``attention = L · n/2 · c · (T + 1)/2`` with T the context: a query sees (T + 1)/2 keys on average, in a layer
    with a window of w tokens min(t, w), and in an encoder T. Masked pairs are not counted, although a backend that
    works in tiles does some of them, and a call of ``sdpa`` with a mask all of them. c, per query-key pair and pair of
    baseline heads, is the sum of the products as wide as q and k, and those as wide as v:

    ============================================= ======= ======= =======
    backend                                       softmax diff_v1 diff_v2
    ============================================= ======= ======= =======
    definition, fused_cpu (maps subtracted)       4d + 4d 4d + 4d 8d + 4d
    materialised (maps written out)               4d + 4d 4d + 4d 8d + 4d
    fused_triton (both products, then subtracted) 4d + 4d 4d + 8d 8d + 8d
    standard (one call; V1's q padded)            4d + 4d 8d + 8d 8d + 8d
    unequal (one call; V1's V of width 2d)        4d + 4d 4d + 8d 8d + 8d
    two_calls (V of width 2d)                     4d + 4d 4d + 8d
    four_calls                                    4d + 4d 8d + 8d
    ============================================= ======= ======= =======

    Where r signal heads share a noise head, its scores, and in standard and fused_triton its product with V, are those
    of one head in r: the definition has (2 + 2/r)·d + 4d for ``diff_gda`` and (4 + 4/r)·d + 4d for ``diff_gda_v2``,
    standard (4 + 4/r)·d for each part of both, and fused_triton (1 + 1/r) of what a head of softmax attention has in
    its kernels, in the backward pass too: (1 + 1/r)·20d for ``diff_gda``.

    Gated attention costs what softmax does; its gate is a product with parameters.

    Training, model: 3 × forward. Training, executed: linear 3 × forward; attention's backward pass recomputes the
    scores, as flash kernels do. It has three products as wide as q and k (scores, dQ, dK) and two as wide as v (dP,
    dV) where the forward pass has one of each: 2.5 × forward where both cost the same (8d, then 20d), 3·4d + 2·8d for
    V1's unequal and two_calls. The Triton kernel makes dQ in one kernel and dK and dV in another, each with scores of
    its own, and dP once for both maps: 16d + 12d for V1 and 32d + 12d for V2; where v is wider than 128, dK and dV are
    made apart, 20d + 12d and 40d + 12d. Materialised maps are kept, not recomputed: 2 × forward. Norms, RoPE,
    exponentials, λ and element-wise work are not counted, nor are gradient checkpointing and the zeros that the Triton
    kernel computes where a width is no power of two.

    Args:
        shape: the shape that is built: for a matched V2, what ``match_parameters`` returned.
        attention: a name in ``VARIANTS``.
        context: tokens T in the sequence, at least 1.
        phase: ``"forward"`` or ``"training"``. Default: ``"training"``.
        backend: a row of the table; softmax has the same cost in each. Default: ``"standard"``.
        causal: False for an encoder. Default: True.

    Returns:
        ``model``, which no backend changes, and ``executed``; whole FLOPs per token.

    Raises:
        ConfigError: an unknown variant, phase or backend, one that the variant does not have, or a context below 1.

    Source: arXiv 2410.05258v2, sections 2 and 3.1, and the authors' flashdiff_1 (two calls) and flashdiff_2 (four);
    docs/gpu.md for the Triton kernel.

    >>> flops = flops_per_token(ModelShape.preset("3M"), "diff_v1", context=256, phase="forward")
    >>> flops.model, flops.executed
    (6489984, 6983424)
    """
    forms = _forms(shape, attention, context, backend)
    if phase not in PHASES:
        raise ConfigError(f"phase={phase!r}", "a phase", f"use one of {', '.join(PHASES)}")
    linear = _linear(shape, attention)
    training = phase == "training"
    passes = 3 if training else 1
    # L · n/2 · (T + 1)/2 times c = units · d; every entry of the table is a multiple of 4, so this stays whole. So does
    # what shared noise heads cost, since r divides n. The mean over a sequence in which some layers see a window alone
    # is rounded down.
    seen_twice = shape.pairs_seen(context) if causal else 2 * shape.num_layers * context**2
    per_four = shape.num_heads * shape.head_dim * seen_twice
    by_definition = sum(forms["definition"].forward)
    executed = forms[backend].executed(VARIANTS[attention].heads(shape).width, training=training)
    return Flops(
        model=passes * (linear + int(by_definition * per_four // (4 * context))),
        executed=passes * linear + int(executed * per_four // (4 * context)),
    )


def decoding_flops_per_token(shape: ModelShape, attention: str, *, context: int, backend: str = "standard") -> Flops:
    """Returns FLOPs of one decoded token: a single query that sees every one of ``context`` keys, so nothing is masked.

    ``linear + L · n/2 · c · T``, with ``linear`` and c of ``flops_per_token``.

    Args:
        shape: the shape that is built: for a matched V2, what ``match_parameters`` returned.
        attention: a name in ``VARIANTS``.
        context: keys T that the query sees, its own among them; at least 1.
        backend: as in ``flops_per_token``. Default: ``"standard"``.

    Returns:
        ``model``, which no backend changes, and ``executed``; whole FLOPs per token.

    Raises:
        ConfigError: an unknown variant or backend, one that the variant does not have, or a context below 1.

    Source: as ``flops_per_token``.

    >>> flops = decoding_flops_per_token(ModelShape.preset("3M"), "softmax", context=256)
    >>> flops.model == flops.executed
    True
    """
    forms = _forms(shape, attention, context, backend)
    per_two = shape.num_heads * shape.head_dim * shape.keys_seen(context)
    linear = _linear(shape, attention)
    model, executed = (linear + int(sum(forms[name].forward) * per_two // 2) for name in ("definition", backend))
    return Flops(model=model, executed=executed)


def cache_bytes_per_token(shape: ModelShape, attention: str, *, bytes_per_value: int) -> int:
    """Returns the bytes that one token keeps in the key/value cache, in all layers; a window lets it go later.

    ``2 · G · d · L · bytes_per_value``, for every variant: V1 caches G/2 keys and G/2 values of width 2d, V2 what
    softmax does, so the differential map costs no cache.

    Args:
        shape: the softmax Transformer being replaced.
        attention: a name in ``VARIANTS``.
        bytes_per_value: 2 for bfloat16 and float16, 4 for float32.

    Raises:
        ConfigError: a variant that is unknown or that the shape cannot carry, or bytes below 1.

    Source: arXiv 2410.05258v2, section 2; "Differential Transformer V2".

    >>> cache_bytes_per_token(ModelShape.preset("3M"), "diff_v2", bytes_per_value=2)
    3840
    """
    shape.check_variant(attention)
    check_positive_int("bytes_per_value", bytes_per_value)
    return 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers * bytes_per_value


def weight_bytes(shape: ModelShape, attention: str, *, dtype: str) -> int:
    """Returns the bytes of the parameters, in memory and (without the header) in the safetensors file.

    V1's λ stays float32.

    Args:
        shape: the softmax Transformer being replaced; for a matched V2, what ``match_parameters`` returned.
        attention: a name in ``VARIANTS``.
        dtype: a name of ``BYTES``.

    Raises:
        ConfigError: an unknown dtype, or a variant that the shape cannot carry.

    Source: ``diffattn.model.attention.Float32Module``.

    >>> weight_bytes(ModelShape.preset("3M"), "softmax", dtype="bf16")
    6000768
    """
    if dtype not in BYTES:
        raise ConfigError(f"dtype={dtype!r}", "a number format", f"use one of {', '.join(BYTES)}")
    return bytes_of(count_parameters(shape, attention).total, float32_parameters(shape, attention), dtype)


def float32_parameters(shape: ModelShape, attention: str) -> int:
    """Counts the parameters that stay float32 whatever the dtype: V1's λ vectors."""
    return VARIANTS[attention].float32_parameters(shape) * shape.num_layers


def bytes_of(count: int, float32: int, dtype: str) -> int:
    """Returns the whole bytes, rounded up, of ``count`` numbers of a dtype, ``float32`` of which stay float32."""
    return -int(-(count - float32) * BYTES[dtype] // 1) + 4 * float32


def _forms(shape: ModelShape, attention: str, context: int, backend: str) -> Mapping[str, Form]:
    """Returns FLOPs by backend, as a variant's record has them, once the four arguments are known to be possible."""
    shape.check_variant(attention)
    check_positive_int("context", context)
    check_backend(attention, backend)
    return VARIANTS[attention].forms(shape)


def _linear(shape: ModelShape, attention: str) -> int:
    """Returns FLOPs per token of the products with parameters, forward."""
    attending = _projections(shape) + VARIANTS[attention].matrix_parameters(shape)
    matrices = shape.num_layers * (attending + 3 * shape.hidden_size * shape.intermediate_size)
    return 2 * (matrices + shape.vocab_size * shape.hidden_size)


def _projections(shape: ModelShape) -> int:
    """Returns the parameters of one layer's four projections of softmax attention."""
    n, G, d, D = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.hidden_size
    return 2 * n * d * D + 2 * G * d * D
