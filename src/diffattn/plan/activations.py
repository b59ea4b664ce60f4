"""The tensors that one decoder layer keeps for its backward pass, as autograd saves them in ``diffattn.model``.

The list was read off ``torch``'s own record of the step (torch 2.13 on CPU) and is held to it by a test. Letters: D, n,
G, d, F, L, V as in ``ModelShape``; Q = n·d, twice that under V2; N the query heads of the one attention call (n, V2
2n), each W wide (V1 2d, else d); a the bytes of an activation; B sequences of T tokens. All results are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffattn.errors import ConfigError
from diffattn.names import one_of
from diffattn.plan.shape import ModelShape
from diffattn.variants import BASELINE, VARIANTS

# The baseline has every backend: to it they are two, the standard call and maps that are written out.
BACKENDS = tuple(VARIANTS[BASELINE].flops)


@dataclass(frozen=True)
class Layer:
    """Bytes of one layer, by what they grow with: B·T (``token``), T (``position``), B·T² (``pair``).

    ``feed_forward`` and ``attention`` are what autograd keeps per token between forward and backward, ``position`` what
    it keeps once for all sequences, ``scores`` the maps kept per query and key; ``behind`` is the part of ``attention``
    behind the call, which the backward pass has freed when it gets there. ``in_feed_forward`` and ``in_attention`` (per
    token), ``in_scores`` (per pair) are what the backward pass adds at its widest place there.

    >>> layer(ModelShape.preset("3M"), "softmax", backend="standard", size=4, autocast=False).scores
    0
    """

    feed_forward: int
    attention: int
    position: int
    scores: int
    behind: int
    in_feed_forward: int
    in_attention: int
    in_scores: int

    @property
    def token(self) -> int:
        """Bytes per token that the whole layer keeps."""
        return self.feed_forward + self.attention


def check_backend(attention: str, backend: str) -> None:
    """Raises unless the variant has the backend; returns nothing.

    Raises:
        ConfigError: an unknown backend, or two_calls and four_calls of V2, which is one call by nature.

    >>> check_backend("diff_v1", "fused")
    """
    known = VARIANTS[attention].flops
    if backend not in known:
        raise ConfigError(f"backend={backend!r}", f"a backend of {attention}", f"use one of {', '.join(known)}")


def find_backend(text: str) -> str:
    """Returns a backend as people write it: in any case, or by a part that one alone has.

    Raises:
        ConfigError: no backend has this name, or several have this part.

    >>> find_backend("Two-Calls"), find_backend("mat")
    ('two_calls', 'materialised')
    """
    return one_of(text, BACKENDS, given=f"backend={text!r}", also={"materialized": "materialised"})


def resolve(attention: str, backend: str) -> str:
    """Returns the backend whose tensors are counted: ``definition`` is ``fused``; of one map that is one standard call.

    >>> resolve("diff_v1", "definition"), resolve("softmax", "fused")
    ('fused', 'standard')
    """
    if VARIANTS[attention].maps == 1:
        return backend if backend == "materialised" else "standard"
    return "fused" if backend == "definition" else backend


def norm(width: int, size: int, autocast: bool, readers: int) -> int:
    """Returns the bytes that an RMSNorm keeps per token.

    Its input and x̂ in float32, 1/rms, and its result once or, under autocast, per reader.

    >>> norm(10, 4, False, 1), norm(10, 2, False, 1), norm(10, 2, True, 2)
    (124, 104, 124)
    """
    return 8 * width + 4 + size * width * (readers if autocast else 1)


def layer(shape: ModelShape, attention: str, *, backend: str, size: int, autocast: bool) -> Layer:
    """Returns the bytes that a decoder layer keeps and needs, with activations of ``size`` bytes.

    =================== ===================================================================================
    norms               input and x̂ in float32, result, 1/rms: ``(8 + a)·D + 4``; autocast casts the result anew
                        for each product that reads it: q, k, v (and V2's λ or
                        attention's gate), gate, up
    rotary              nothing: cosines and sines are those of all layers; autocast casts them for q and k, 4·a·d
                        per position
    attention           rotated q: a·Q (padded by V1's standard call: 2·a·n·d); k and v: 2·a·G·d; log-sum-exp
    its result          fused a·n·d (and 4 numbers per output head: of both maps the largest score, and 1 / the sum of
                        exponentials); standard a·N·W, then the noise half and the difference in float32
    V1's norm           x̂ in float32 and the result, per n·d
    attention's gate    the gate and its product with the call's result: 2·a·n·d
    feed-forward        gate, up, silu(gate), and the product: 4·a·F
    materialised maps   softmax in float32, and its copy in a half-precision dtype: N per query and key
    =================== ===================================================================================

    ``two_calls`` and ``four_calls`` follow from the same rules (the standard call without the padding); the model has
    no such path, so these two are not held to a measurement.

    Args:
        shape: the softmax Transformer being replaced; for a matched V2, what ``match_parameters`` returned.
        attention: a name in ``VARIANTS``.
        backend: one of ``BACKENDS``.
        size: bytes of an activation, 4 or 2.
        autocast: whether float32 weights are cast on the way, which keeps residuals and norms in float32.

    Raises:
        ConfigError: a variant that the shape cannot carry, or a backend that it does not have.

    Source: ``torch.autograd.graph.saved_tensors_hooks`` and the profiler's memory events on ``diffattn.model``.

    >>> layer(ModelShape.preset("3M"), "diff_v1", backend="fused", size=4, autocast=False).token
    17476
    """
    shape.check_variant(attention)
    check_backend(attention, backend)
    backend = resolve(attention, backend)
    half = size < 4
    D, F, d = shape.hidden_size, shape.intermediate_size, shape.head_dim
    width, keys = shape.num_heads * d, shape.num_kv_heads * d
    variant = VARIANTS[attention]
    N, groups, W = variant.heads(shape)
    queries, output_heads = variant.query_width(shape), variant.output_heads(shape)
    padded = variant.pads_queries and backend in ("standard", "materialised")
    materialised = backend == "materialised"
    spread = N * W if materialised and groups < N else keys
    before = norm(D, size, autocast, variant.readers) + size * ((2 * width if padded else queries) + 2 * spread)
    if backend == "fused":
        before += 4 * output_heads * 4
    elif not materialised:
        # sdpa keeps its result beside the log-sum-exp.
        before += 4 * N + size * N * W
    if variant.weights == "head":
        # λ of each token and head, in float32.
        before += 4 * output_heads

    subtracted = variant.maps > 1 and backend != "fused"
    behind = 0
    if variant.norm:
        # Input and x̂ of the norm in float32, its result in the model's dtype, 1/rms.
        behind += (8 + size) * width + 4 * output_heads
    elif subtracted or backend == "fused" or materialised:
        behind += size * width
    if variant.gated:
        # The gate, and its product with the call's result.
        behind += 2 * size * width
    if subtracted:
        # In float32 the noise half is a view of the call's result, in half precision a cast copy.
        behind += 4 * width if half else (size * N * W if materialised else 0)

    residual = 4 if autocast else size
    gradients = 0 if materialised else (N * W if subtracted else width) + (2 * width if padded else queries) + 2 * keys
    if variant.gated:
        # That of the gate, which waits until those of q, k and v are there.
        gradients += width
    return Layer(
        feed_forward=norm(D, size, autocast, 2) + 4 * size * F,
        attention=before + behind,
        position=4 * size * d if autocast else 0,
        scores=(4 + (2 if half else 0)) * N if materialised else 0,
        behind=behind,
        # Gradients of the product (which is free by now), of silu(gate) and up; that of the residual stream.
        in_feed_forward=2 * size * F + residual * D,
        # Gradients of the call's result, of q, k and v (the last two not yet where the maps' own are the widest place);
        # that of the residual stream.
        in_attention=size * gradients + residual * D,
        # Gradients of the maps and of the scores in float32; the half-precision maps are free by now.
        in_scores=(8 - (2 if half else 0)) * N if materialised else 0,
    )
