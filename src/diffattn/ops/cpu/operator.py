"""Differential attention on CPU in one compiled kernel that subtracts the maps before the product with the values.

    output = P v,  P = A1 − λ ∘ A2,  A1 = softmax(scale · q1 k1ᵀ),  A2 = softmax(scale · q2 k2ᵀ)

    forward   saves the largest score of each row of both maps, and 1 / the sum of its exponentials, and neither map:
              float32 (4, B, H, T)
    backward  dP = d_out vᵀ,  D1 = rowsum(A1 ∘ dP),  D2 = rowsum(A2 ∘ dP),
              dS1 = scale · A1 ∘ (dP − D1),  dS2 = −scale · λ ∘ A2 ∘ (dP − D2),
              d_q1 = dS1 k1,  d_k1 = dS1ᵀ q1,  d_q2 = dS2 k2,  d_k2 = dS2ᵀ q2,  d_v = Pᵀ d_out,  d_lam = −D2

Per query, key and output head that is 4D + 2Dv forward and 10D + 5Dv backward multiply-adds: what softmax attention
costs whose values are as wide as both halves of D, where one standard call costs twice as much. Where R output heads
subtract one noise map, what belongs to that map alone, 2D and 5D of these, is computed once for all of them. `csrc/`
holds the kernel, docs/kernel.md its blocking and its measured limits.

Shape letters: B batch, T queries, S keys, H output heads, Hn noise heads, N = H + Hn query heads of a layer's call, G
key/value groups, D width of q and k, Dv width of v.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffattn.config_fields import dtype_name
from diffattn.ops import derivatives, kernel_derivatives
from diffattn.ops.cpu import build
from diffattn.ops.reference import Call

MAX_WIDTH = 256
# Queries of a call that is split over its keys, as csrc/ops.cpp has it.
DECODING_QUERIES = 8

# `queries` int32 (2, B, S) is the mask in O(S): query t sees key s where queries[0, b, s] <= t < queries[1, b, s].
# Without it every query sees every key, or with `causal` those up to S − T + t. `k2` is None where both maps share
# their keys.
_INPUTS = "Tensor q1, Tensor k1, Tensor q2, Tensor? k2, Tensor v, Tensor lam, Tensor? queries"
torch.library.define("diffattn::fused_cpu", f"({_INPUTS}, bool causal, float scale) -> (Tensor, Tensor)")
torch.library.define(
    "diffattn::fused_cpu_decoding",
    "(Tensor query, Tensor key, Tensor value, Tensor lam, Tensor? queries, float scale, Tensor? gain, "
    "float norm_scale, float? eps, bool causal, int signals_per_noise) -> Tensor",
)
torch.library.define(
    "diffattn::fused_cpu_backward",
    f"(Tensor d_output, {_INPUTS}, Tensor rows, bool causal, float scale) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def unsupported(call: Call) -> str | None:
    """Returns None where the kernel serves this call of `diff_attention`, else one sentence that says why not.

    The first call that gets as far as asking for the kernel compiles it (see `diffattn.ops.cpu.build`).
    """
    q1, k1, q2, k2, v, lam, *_ = call
    if q1.device.type != "cpu":
        return f"fused_cpu: {q1.device.type} inputs are not supported; it serves cpu"
    if not q1.dtype == k1.dtype == q2.dtype == k2.dtype == v.dtype:
        return "fused_cpu: inputs of several dtypes are not supported; cast them to one"
    if v.dtype not in build.DTYPES:
        served = ", ".join(map(dtype_name, build.DTYPES))
        return f"fused_cpu: {dtype_name(v.dtype)} inputs are not supported; it serves {served}"
    if max(q1.shape[-1], v.shape[-1]) > MAX_WIDTH:
        return f"fused_cpu: heads of {max(q1.shape[-1], v.shape[-1])} are not supported; it serves widths up to 256"
    if derivatives.forward_mode(q1, k1, q2, k2, v, lam):
        return kernel_derivatives.no_forward_mode("fused_cpu")
    return build.unavailable(v.dtype)


def fused_cpu_diff_attention(call: Call, *, formulas: bool = True) -> Tensor:
    """Differential attention through the compiled kernel, for calls to which `unsupported` answers None.

    Where k1 and k2 are one tensor object, the keys are read once.

    Args:
        call: the arguments of `diffattn.ops.dispatch.diff_attention`, which also checks them.
        formulas: whether second derivatives, which the kernel does not have, are those of formulas on tensors, which
            hold both maps; otherwise one that is taken raises `UnsupportedError`.
    """
    q1, k1, q2, second, v, *others = kernel_derivatives.arguments_of(call)
    width = v.shape[-1]
    if v.dtype == torch.bfloat16:
        # Its products take pairs along the inner dimension.
        q1, k1, q2, v = (_even(x) for x in (q1, k1, q2, v))
        second = None if second is None else _even(second)
    with kernel_derivatives.with_formulas(formulas):
        output, _ = torch.ops.diffattn.fused_cpu(q1, k1, q2, second, v, *others)
    return output[..., :width]


def refuses(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lam: Tensor,
    queries: Tensor | None,
    *,
    signals_per_noise: int = 1,
) -> str | None:
    """Returns None where `decode` or `attend` is to compute a layer's call, else one sentence; arguments as there."""
    return unsupported(Call(query, key, query, key, value, lam))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lam: Tensor,
    *,
    scale: float | None,
    queries: Tensor | None,
    causal: bool = True,
    signals_per_noise: int = 1,
) -> Tensor:
    """Differential attention as a layer calls it, with gradients; arguments as of `decode`, with any number of queries.

    Returns:
        (B, T, H, Dv) in the inputs' dtype.
    """
    q_BTNd, k_BSGW, v_BSGV = (x.transpose(1, 2) for x in (query, key, value))
    # Views, whose backward is one stack or one concatenation; that of strided slices fills a buffer of zeros each. Of
    # several signal heads beside their noise head there is none.
    groups = q_BTNd.unflatten(2, (-1, signals_per_noise + 1))
    if signals_per_noise == 1:
        q1, q2 = groups.unbind(3)
    else:
        q1, q2 = (x.flatten(2, 3) for x in groups.split([signals_per_noise, 1], dim=3))
    k1, k2 = (k_BSGW, k_BSGW) if key.shape[-1] == query.shape[-1] else k_BSGW.chunk(2, dim=-1)
    call = Call(q1, k1, q2, k2, v_BSGV, lam, causal=causal, scale=scale, queries=queries)
    return fused_cpu_diff_attention(call)


def decodes(query: Tensor, value: Tensor, *, signals_per_noise: int = 1) -> bool:
    """Tells whether `decode` serves a call, of those to which `unsupported` answers None.

    It does not where a graph is traced, which would hold for few queries only, nor in forward mode or within
    `torch.func`, because the operator has no derivatives and cannot be batched.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or derivatives.transformed():
        return False
    even = value.dtype != torch.bfloat16 or (query.shape[-1] % 2 == 0 and value.shape[-1] % 2 == 0)
    return even and query.shape[2] <= DECODING_QUERIES


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lam: Tensor,
    *,
    scale: float | None = None,
    queries: Tensor | None = None,
    gain: Tensor | None = None,
    norm_scale: float = 1.0,
    eps: float | None = None,
    causal: bool = True,
    signals_per_noise: int = 1,
) -> Tensor:
    """Differential attention of up to 8 queries as a layer calls it, with the norm behind it; no gradients.

    Args:
        query: (B, N, T, D), groups of heads adjacent: `signals_per_noise` signal heads, then their noise head.
        key: (B, G, S, 2D) for the keys of both maps side by side, (B, G, S, D) where they share them.
        value: (B, G, S, Dv).
        lam: λ in float32, broadcastable to (B, T, H).
        scale, queries, causal: as in a `Call`.
        gain: (Dv,), ones where it is None.
        norm_scale, eps: the output is ``norm_scale · gain · y / sqrt(mean(y²) + eps)``, or y where eps is None.

    Returns:
        (B, T, H, Dv) in the inputs' dtype, rounded once.
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    return torch.ops.diffattn.fused_cpu_decoding(
        query, key, value, lam, queries, scale, gain, norm_scale, eps, causal, signals_per_noise
    )


def _even(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1)) if x.shape[-1] % 2 else x


@torch.library.register_fake("diffattn::fused_cpu")
def _(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor,
    queries: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q1.shape
    return v.new_empty(B, T, H, v.shape[-1]), v.new_empty(4, B, H, T, dtype=torch.float32)


@torch.library.register_fake("diffattn::fused_cpu_decoding")
def _(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    B, N, T, _ = query.shape
    signals = options[-1]
    return value.new_empty(B, T, N // (signals + 1) * signals, value.shape[-1])


@torch.library.register_fake("diffattn::fused_cpu_backward")
def _(
    d_output: Tensor,
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor,
    queries: Tensor | None,
    rows: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # A group's gradients lie together.
    k, d_v = (x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (k1, v))
    d_k2 = k1.new_empty(0) if k2 is None else torch.empty_like(k)
    return q1.new_empty(q1.shape), k, q2.new_empty(q2.shape), d_k2, d_v, lam.new_empty(lam.shape)


def _output(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Returns what the operator `fused_cpu` returns, with zeros for the rows."""
    lam = arguments[5]
    B, T, H = lam.shape
    return kernel_derivatives.output(*arguments), lam.new_zeros(4, B, H, T)


def _gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """Returns what the operator `fused_cpu_backward` returns."""
    # All but the rows.
    grads = kernel_derivatives.gradients(*arguments[:8], *arguments[9:])
    return tuple(grads[0].new_empty(0) if grad is None else grad for grad in grads)


kernel_derivatives.register(
    kernel_derivatives.Operators("fused_cpu", _output, _gradients, (0, 0, 0, 0, 0, 0, 1), (0, 1), saved=1)
)
