"""The tensors that one decoder layer keeps for its backward pass, as autograd saves them in ``diffattn.model``.

The list was read off ``torch``'s own record of the step (torch 2.13 on CPU) and is held to it by a test. Letters: D, n,
G, d, F, L, V as in ``ModelShape``; N the query heads of the one attention call (n, V2 2n, fewer where noise heads are
shared), Q = N·d, each W wide in the call (V1 2d, else d); H_n noise heads; a the bytes of an activation; B sequences of
T tokens. All results are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffattn.errors import ConfigError
from diffattn.names import one_of
from diffattn.plan.hardware import Machine
from diffattn.plan.shape import ModelShape
from diffattn.variants import BASELINE, VARIANTS

# The baseline has every backend: to it they are two, the standard call and maps that are written out.
BACKENDS = tuple(VARIANTS[BASELINE].flops)
AUTO = "auto"
"""The backend that serves on the machine, whatever it is."""
# The maps are subtracted in the kernel, on a CPU or a GPU.
FUSED = ("fused_cpu", "fused_triton")
# As ``diffattn.ops.triton.configs`` has them: the chips for which the Triton kernel has blocks, and the widest values
# that it takes.
TRITON_CHIPS = (
    "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121", "gfx90a", "gfx942",
    "gfx950",
)  # fmt: skip
WIDEST = 256
# A British word as others spell it, and the name of the CPU kernel before a GPU had one.
_SPELLINGS = {"materialized": "materialised", "fused": "fused_cpu"}


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

    >>> check_backend("diff_v1", "fused_cpu")
    """
    known = VARIANTS[attention].flops
    if backend not in known:
        raise ConfigError(f"backend={backend!r}", f"a backend of {attention}", f"use one of {', '.join(known)}")


def find_backend(text: str) -> str:
    """Returns a backend, or ``"auto"``, as people write it: in any case, or by a part that one alone has.

    ``fused``, the CPU kernel's name before a GPU had one, is ``fused_cpu``.

    Raises:
        ConfigError: no backend has this name, or several have this part.

    >>> find_backend("Two-Calls"), find_backend("mat"), find_backend("fused")
    ('two_calls', 'materialised', 'fused_cpu')
    """
    return one_of(text, (AUTO, *BACKENDS), given=f"backend={text!r}", also=_SPELLINGS)


def serving(
    shape: ModelShape, attention: str, machine: Machine | None, *, activations: str, context: int, trains: bool
) -> str:
    """Returns the backend that ``diff_attention`` and the models take by themselves on a machine.

    A processor's is ``fused_cpu``. On a GPU it is the Triton kernel where there is a table of blocks for the chip, in
    half precision and for values of at most 256. V2 has it only where it was measured to be faster than the standard
    call: on Hopper, but not for training heads wider than 64 at more than 8192 tokens or with
    noise heads that are shared. Everything else is ``standard``,
    and so is a machine of which nothing is known.

    Args:
        shape: the softmax Transformer being replaced.
        attention: a name in ``VARIANTS``.
        machine: where it runs; None: nothing is known of it.
        activations: the dtype of queries, keys and values, a name of ``BYTES``.
        context: tokens of a sequence.
        trains: whether a training step is meant, otherwise reading a prompt.

    Source: ``diffattn.ops.triton.configs``, whose answers a test compares with this.

    >>> serving(ModelShape.preset("3M"), "diff_v1", None, activations="bf16", context=256, trains=True)
    'standard'
    """
    variant = VARIANTS[attention]
    if variant.maps == 1 or machine is None:
        return "standard"
    if machine.chip is None:
        return "fused_cpu"
    width = variant.heads(shape).width
    kernel = machine.chip in TRITON_CHIPS and activations in ("bf16", "fp16") and width <= WIDEST
    if not variant.pads_queries:
        slower = trains and width > 64 and context > 8192
        shared = variant.signals_per_noise(shape) > 1
        kernel = kernel and machine.chip == "sm_90" and width <= 128 and not slower and not shared
    return "fused_triton" if kernel else "standard"


def resolve(attention: str, backend: str) -> str:
    """Returns the backend whose tensors are counted: ``definition`` is ``fused_cpu``.

    Of one map all but ``materialised`` are the standard call, and so is ``unequal`` where all widths are equal.

    >>> resolve("diff_v1", "definition"), resolve("softmax", "fused_cpu"), resolve("diff_v2", "unequal")
    ('fused_cpu', 'standard', 'standard')
    """
    variant = VARIANTS[attention]
    if variant.maps == 1:
        return backend if backend == "materialised" else "standard"
    if backend == "unequal" and not variant.pads_queries:
        return "standard"
    return "fused_cpu" if backend == "definition" else backend


def norm(width: int, size: int, autocast: bool, readers: int) -> int:
    """Returns the bytes that an RMSNorm keeps per token.

    Its input and x̂ in float32, 1/rms, and its result once or, under autocast, per reader.

    >>> norm(10, 4, False, 1), norm(10, 2, False, 1), norm(10, 2, True, 2)
    (124, 104, 124)
    """
    return 8 * width + 4 + size * width * (readers if autocast else 1)


def layer(shape: ModelShape, attention: str, *, backend: str, size: int, autocast: bool, gpu: bool = False) -> Layer:
    """Returns the bytes that a decoder layer keeps and needs, with activations of ``size`` bytes.

    =================== ===================================================================================
    norms               input and x̂ in float32, result, 1/rms: ``(8 + a)·D + 4``; autocast casts the result anew
                        for each product that reads it: q, k, v (and V2's λ or
                        attention's gate), gate, up
    rotary              nothing: cosines and sines are those of all layers; autocast casts them for q and k, 4·a·d
                        per position
    attention           rotated q: a·Q (padded by V1's standard call: a·N·W); k and v: 2·a·G·d; log-sum-exp
    its result          fused_cpu a·n·d (and 4 numbers per output head: of both maps the largest score, and 1 / the sum
                        of exponentials); fused_triton that and O2, a·H_n·W more (and all log-sum-exps); standard a·N·W,
                        then the noise part and the difference in float32
    V1's norm           x̂ in float32 and the result, per n·d
    attention's gate    the gate and its product with the call's result: 2·a·n·d
    feed-forward        gate, up, silu(gate), and the product: 4·a·F
    materialised maps   softmax in float32, and its copy in a half-precision dtype: N per query and key
    =================== ===================================================================================

    In the backward pass of the call a GPU's kernels need more than the gradients: those of ``sdpa`` in half precision
    d_q in float32, a sum for each row, and d_k and d_v for each query head where their heads are fewer; the Triton
    kernel five float32 numbers for each row of an output head, and λ's gradient.

    ``two_calls`` and ``four_calls`` follow from the same rules (the standard call without the padding, and without what
    a GPU needs beside); the model has no such path, so these two are not held to a measurement.

    Args:
        shape: the softmax Transformer being replaced; for a matched V2, what ``match_parameters`` returned.
        attention: a name in ``VARIANTS``.
        backend: one of ``BACKENDS``.
        size: bytes of an activation, 4 or 2.
        autocast: whether float32 weights are cast on the way, which keeps residuals and norms in float32.
        gpu: whether ``sdpa`` runs on a GPU. Default: False.

    Raises:
        ConfigError: a variant that the shape cannot carry, or a backend that it does not have.

    Source: ``torch.autograd.graph.saved_tensors_hooks`` and the profiler's memory events on ``diffattn.model``; on a
    GPU the allocator's peaks in ``benchmarks/results/gpu_h100.jsonl``.

    >>> layer(ModelShape.preset("3M"), "diff_v1", backend="fused_cpu", size=4, autocast=False).token
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
    noise_width = variant.noise_heads(shape) * W
    padded = variant.pads_queries and backend in ("standard", "materialised")
    materialised = backend == "materialised"
    spread = N * W if materialised and groups < N else keys
    before = norm(D, size, autocast, variant.readers) + size * ((N * W if padded else queries) + 2 * spread)
    if backend == "fused_cpu":
        before += 4 * output_heads * 4
        if variant.signals_per_noise(shape) > 1:
            # No view has the signal heads alone, so the kernel is given a copy of their queries.
            before += size * output_heads * d
    elif backend == "fused_triton":
        before += N * 4 + size * (width + noise_width)
    elif not materialised:
        # sdpa keeps its result beside the log-sum-exp.
        before += 4 * N + size * N * W
    if variant.weights == "head":
        # λ of each token and head, in float32.
        before += 4 * output_heads

    subtracted = variant.maps > 1 and backend not in FUSED
    behind = 0
    if variant.norm:
        # Input and x̂ of the norm in float32, its result in the model's dtype, 1/rms.
        behind += (8 + size) * width + 4 * output_heads
    elif subtracted or backend == "fused_cpu" or materialised:
        behind += size * width
    if variant.gated:
        # The gate, and its product with the call's result.
        behind += 2 * size * width
    if subtracted:
        # In float32 the noise half is a view of the call's result, in half precision a cast copy.
        behind += 4 * noise_width if half else (size * N * W if materialised else 0)

    residual = 4 if autocast else size
    buffers = 0
    if backend == "fused_triton":
        buffers = (5 + 1) * 4 * output_heads
    elif gpu and half and backend in ("standard", "unequal"):
        query_width = W if padded else d
        buffers = 4 * N * (query_width + 1)
        buffers += sum(size * N * w for w, heads in ((query_width, keys // query_width), (W, groups)) if heads < N)
    gradients = 0 if materialised else (N * W if subtracted else width) + (N * W if padded else queries) + 2 * keys
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
        # Gradients of the call's result, of q, k and v (the last two not yet where the maps' own are the widest place),
        # what a kernel needs beside; that of the residual stream.
        in_attention=size * gradients + buffers + residual * D,
        # Gradients of the maps and of the scores in float32; the half-precision maps are free by now.
        in_scores=(8 - (2 if half else 0)) * N if materialised else 0,
    )
