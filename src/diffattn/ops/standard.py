"""Differential attention as ONE standard attention call: lay out, call, combine.

The product with v is linear, so the subtraction can wait until after it, and the two softmaxes can be two query heads
of one ordinary grouped-query call:

    V1 (k1, k2 differ)    key head [k1, k2] of width 2D, query heads [q1, 0] and [0, q2], so that
                          [q1, 0]·[k1, k2] = q1·k1 and [0, q2]·[k1, k2] = q2·k2;  scale 1/√D of the half width
    V2 (k1 is k2)         key head k1 of width D, query heads q1 and q2
    both                  output = o[2i] − λ · o[2i+1]

Where R output heads subtract one noise map, the query heads are groups of R + 1, R signal heads [q1, 0] and then their
noise head [0, q2], and each signal head subtracts the last of its group. R = 1 is the pairs above.

Any engine that serves grouped-query attention therefore serves this. The price is in FLOPs: per query, key and output
head V1 (Dv = 2D) costs 16D, against 8D when the maps are subtracted first, and V2 (Dv = D) 8D against 6D.

Some kernels on a GPU serve keys and values of unequal widths and counts. They need no padding: V1 then costs 12D, and
28D instead of 40D with the scores computed again in the backward pass. Of each group of R = H / G output heads:

    queries   q1 of the R heads, then q2 of them    (2H heads of width D)
    keys      k1, k2                                (2G heads of width D)
    values    v                                     (G heads of width Dv)

PyTorch is asked which kernel it would take (`diffattn.ops.sdpa`). Elsewhere the first form is the better one: the CPU's
kernel wants equal widths, and one query over a cache takes 1.2 to 125 times as long as softmax attention in the second.

Shape letters: B batch, T queries, S keys, H output heads, Hn noise heads, N = H + Hn query heads, G key/value groups,
D width of q and k, W common width of the call.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from diffattn.ops.derivatives import through_sdpa
from diffattn.ops.half import attention_inputs
from diffattn.ops.reference import Call, as_lam
from diffattn.ops.sdpa import chosen, on_gpu, without_nan

# Up to so many queries are decoding.
_FEW = 8
# Heads of queries, keys and values for one group of two output heads.
_GROUPED, _UNEQUAL, _REPEATED = (4, 1, 1), (4, 2, 1), (4, 4, 4)


def pad_queries(q: Tensor, signals_per_noise: int = 1) -> Tensor:
    """Zero-pads groups of query heads so that each half of a key head [k1, k2] meets its own queries.

        signal heads, `signals_per_noise` of them     q  →  [q, 0]
        their noise head, behind them                 q  →  [0, q]

    `q` is (..., n, d) with groups adjacent, any dtype; the result is (..., n, 2d), in the same dtype. The zeros are
    written, not multiplied in, so an infinity in one half never becomes NaN in the other.

    >>> pad_queries(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0]]
    """
    *signals, noise = q.unflatten(-2, (-1, signals_per_noise + 1)).unbind(-2)
    return _pad_group(signals, noise)


def _pad_group(signals: Sequence[Tensor], noise: Tensor) -> Tensor:
    """Makes (..., n, 2d) of tensors (..., Hn, d): per group the flat row [signal, 0, …, 0, noise], cut into heads."""
    # One stack is one write forward and two reads backward. Writing slices into zeros costs 2 to 3 times as much,
    # most of it in the backward pass, which copies the whole gradient once per slice.
    zeros = torch.zeros_like(noise)
    row = torch.stack([x for signal in signals for x in (signal, zeros)] + [zeros, noise], dim=-2)
    return row.unflatten(-2, (-1, 2)).flatten(-2).flatten(-3, -2)


def subtract(o: Tensor, lam: Tensor, signals_per_noise: int = 1) -> Tensor:
    """The subtraction that makes attention differential: o[signal] − λ · o[noise], for pairs o[2i] − λ · o[2i+1].

    `o` is (B, T, n, V) with groups adjacent, `signals_per_noise` signal heads and then their noise head; `lam`
    broadcasts to (B, T, h), one for each signal head; the result is (B, T, h, V). Half-precision inputs are subtracted
    and returned in float32, because two nearly equal maps cancel and a norm may follow; float64 stays float64. Where
    the result is to be in the model's dtype, the caller casts it.

    >>> subtract(torch.tensor([[[[5.0], [4.0]]]]), torch.tensor([0.5])).tolist()
    [[[[3.0]]]]
    """
    # The backward of these is one stack or one concatenation; that of o[..., 0::2, :] a buffer of zeros per slice.
    groups = o.unflatten(-2, (-1, signals_per_noise + 1))
    if signals_per_noise == 1:
        signal, noise = groups.unbind(-2)
        return _difference(signal, noise, lam)
    signal, noise = groups.split([signals_per_noise, 1], dim=-2)
    lam = lam.expand(*o.shape[:-2], signal.shape[-3] * signals_per_noise).unflatten(-1, signal.shape[-3:-1])
    return _difference(signal, noise, lam).flatten(-3, -2)


def _difference(signal: Tensor, noise: Tensor, lam: Tensor) -> Tensor:
    lam = as_lam(lam, signal)[..., None]
    return torch.addcmul(signal.to(lam.dtype), lam, noise.to(lam.dtype), value=-1)


def standard_diff_attention(call: Call) -> Tensor:
    """Differential attention through exactly one `torch.nn.functional.scaled_dot_product_attention`.

    The arguments are those of `diffattn.ops.dispatch.diff_attention`, which also checks them. Where k1 and k2 are one
    tensor object, the call has the V2 form, whose keys are half as wide. The result has v's dtype. Derivatives in
    forward mode and beyond the first hold every score (`diffattn.ops.derivatives.through_sdpa`).

    >>> q1, k1, q2, k2, v = (torch.randn(2, 5, 4, 8) for _ in range(5))
    >>> standard_diff_attention(Call(q1, k1, q2, k2, v, 0.8)).shape
    torch.Size([2, 5, 4, 8])
    """
    q1, k1, _, _, v, lam, causal, scale, *_ = call
    value_width = v.shape[-1]
    scale = 1.0 / math.sqrt(q1.shape[-1]) if scale is None else scale
    mask, dead = _mask(call)
    with without_nan(q1.device, q1.shape[1], mask):
        unequal, repeated = _form(call, mask is not None)
        q_BTNW, k_BSGW, v_BSGW = _unequal(call) if unequal else _equal(call)
        if repeated:
            k_BSGW, v_BSGW = (_repeat(x, q_BTNW.shape[2] // x.shape[2]) for x in (k_BSGW, v_BSGW))
        q, k, v_padded = (x.transpose(1, 2) for x in (q_BTNW, k_BSGW, v_BSGW))
        q, k, v_padded, mask = attention_inputs(q, k, v_padded, mask)
        # SDPA aligns its causal mask top-left, which is ours only where T = S. `all` and `any` make bool, which SDPA
        # wants, of what is a symbol in a graph for every length.
        is_causal = all((causal, mask is None, q1.shape[1] == k1.shape[1]))
        grouped = any(x.shape[1] != q.shape[1] for x in (k, v_padded))

        def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
            )

        o = through_sdpa(sdpa, q, k, v_padded, mask).transpose(1, 2)[..., :value_width]
    lam = as_lam(lam, v)
    if unequal:
        # Views of the call's output: putting its pairs side by side would copy it.
        of_groups = (k1.shape[2], -1)
        signal, noise = o.unflatten(2, (k1.shape[2], 2, -1)).unbind(3)
        output = _difference(signal, noise, lam.expand(q1.shape[:3]).unflatten(2, of_groups)).flatten(2, 3)
    else:
        output = subtract(o, lam, q1.shape[2] // call.q2.shape[2])
    if dead is not None:
        output = output.masked_fill(dead, 0.0)
    return output.to(v.dtype)


def _form(call: Call, masked: bool) -> tuple[bool, bool]:
    """Returns whether V1's widths are left unequal, and whether each query head gets keys and values of its own."""
    q, v, one_key = call.q1, call.v, call.k1 is call.k2
    if not on_gpu(q.device):
        return False, False

    def serves(heads: tuple[int, int, int], width: int, value_width: int) -> SDPBackend:
        dtype = q.dtype
        if torch.is_autocast_enabled("cuda") and dtype != torch.float64:
            dtype = torch.get_autocast_dtype("cuda")
        # A graph that is traced for any width would not be one for any kernel.
        widths = operator.index(width), operator.index(value_width)
        return chosen(q.device, dtype, heads, *widths, masked, torch.is_grad_enabled())

    widths = (q.shape[-1], v.shape[-1])
    few, shared = q.shape[1] <= _FEW, call.q2.shape[2] != q.shape[2]
    # Grouped-query calls give each key equally many queries, and here k1 has more of them than k2.
    if not (one_key or few or shared) and serves(_UNEQUAL, *widths) == SDPBackend.CUDNN_ATTENTION:
        return True, False
    width = max(widths[0] * (1 if one_key else 2), widths[1])
    if serves(_GROUPED, width, width) != SDPBackend.MATH:
        return False, False
    if one_key or shared:
        return False, serves(_REPEATED, width, width) != SDPBackend.MATH
    served = serves(_REPEATED, *widths) != SDPBackend.MATH
    return served, served


def _equal(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Queries in adjacent groups, keys and values, all of one width."""
    signals = call.q1.unflatten(2, (call.q2.shape[2], -1))
    if call.k1 is call.k2:
        q_BTNW = torch.cat([signals, call.q2.unsqueeze(3)], dim=3).flatten(2, 3)
        k_BSGW = call.k1
    else:
        q_BTNW = _pad_group(signals.unbind(3), call.q2)
        k_BSGW = torch.cat([call.k1, call.k2], dim=-1)
    # The flash kernel on CPU wants one width for keys and values; without it the call would hold every score in memory.
    width = max(q_BTNW.shape[-1], call.v.shape[-1])
    return _widen(q_BTNW, width), _widen(k_BSGW, width), _widen(call.v, width)


def _unequal(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, T, G · 2 · R, D), keys (B, S, G · 2, D) and values (B, S, G, Dv), by group and then by map."""
    q1, q2 = (q.unflatten(2, (call.v.shape[2], -1)) for q in (call.q1, call.q2))
    return torch.stack([q1, q2], dim=3).flatten(2, 4), torch.stack([call.k1, call.k2], dim=3).flatten(2, 3), call.v


def _repeat(x: Tensor, times: int) -> Tensor:
    """Each head of (B, S, heads, W) so many times, one behind another."""
    return x.unsqueeze(3).expand(-1, -1, -1, times, -1).flatten(2, 3)


def _widen(x: Tensor, width: int) -> Tensor:
    """Zeros behind the last dimension up to `width`; they add nothing to a score and are cut from the output."""
    missing = width - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def _mask(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """The boolean mask that SDPA needs, or None, and the rows (B, T, 1, 1) that see no key, or None."""
    if call.key_padding is None and call.queries is None:
        # One query sees every key, and T = S is SDPA's own causal mask, which needs no tensor.
        if not call.causal or call.q1.shape[1] in (1, call.k1.shape[1]):
            return None, None
        return call.visible(), None
    return open_dead_rows(call.visible())


def open_dead_rows(visible: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a mask (B, 1, T, S) that SDPA can take, and the rows (B, T, 1, 1) whose output is to be zeros.

    SDPA kernels disagree about a row without keys (zeros, NaN or a mean). Such a row is given every key, which is
    finite in all of them, forward and backward.
    """
    dead = ~visible.any(dim=-1, keepdim=True)
    return visible | dead, dead.transpose(1, 2)
