"""The definitions, written as the paper writes them: slow, explicit, and what every other backend is measured against.

Given, with H output heads that share Hn noise heads and G groups of keys and values:

    q1  (B, T, H, D)      q2  (B, T, Hn, D)      k1, k2  (B, S, G, D)      v  (B, S, G, Dv)
    lam  broadcastable to (B, T, H)

    map_pos  = softmax(scale · q1 k1ᵀ)              (B, H, T, S)
    map_neg  = softmax(scale · q2 k2ᵀ)              (B, Hn, T, S)
    map_diff = map_pos − lam · map_neg              (B, H, T, S), head h with the noise head h // (H / Hn)
    output   = map_diff v                           (B, T, H, Dv)

Letters in the einsums: b batch, t query, s key, h head, d width of a key, e width of a value. Nothing here is fused or
padded: it is clean in float64, `torch.autograd.gradcheck` runs on it, and the maps can be looked at.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffattn.ops.visibility import ranges_of, visible_in_ranges, visible_keys


class Call(NamedTuple):
    """The arguments of one call of `diff_attention`, checked; shapes and meaning are described there."""

    q1: Tensor
    k1: Tensor
    q2: Tensor
    k2: Tensor
    """The keys of the second map: the same object as `k1` where both maps share their keys."""
    v: Tensor
    lam: Tensor | float
    causal: bool = True
    scale: float | None = None
    key_padding: Tensor | None = None
    queries: Tensor | None = None
    """The queries that see each key, int32 (2, B, S) (see `visibility.py`): in place of `causal` and `key_padding`,
    which then say nothing. Windows and packed sequences come as these."""

    def visible(self) -> Tensor:
        """Returns which keys each query sees, as booleans that broadcast to (B, 1, T, S)."""
        T, S = self.q1.shape[1], self.k1.shape[1]
        if self.queries is not None:
            return visible_in_ranges(self.queries, T)
        return visible_keys(T, S, self.causal, self.key_padding, self.q1.device)


class DiffMaps(NamedTuple):
    """The three attention maps of one layer. Masked entries are exactly 0."""

    map_pos: Tensor
    """(B, H, T, S)."""
    map_neg: Tensor
    """(B, Hn, T, S), once for all the heads that subtract it."""
    map_diff: Tensor
    """(B, H, T, S)."""


def as_lam(lam: Tensor | float, like: Tensor) -> Tensor:
    """λ as a tensor beside `like`: in float32 for half-precision and float32 inputs, in float64 for float64 ones."""
    return torch.as_tensor(lam, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def of_signals(noise: Tensor, heads: int) -> Tensor:
    """Returns what each output head subtracts, (B, H, T, …), of what there is for each noise head, (B, Hn, T, …)."""
    return noise if noise.shape[1] == heads else noise.repeat_interleave(heads // noise.shape[1], dim=1)


def softmax_map(q: Tensor, k: Tensor, scale: float, visible: Tensor) -> Tensor:
    """softmax(scale · q kᵀ) over the visible keys, (B, H, T, S)."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = scale * torch.einsum("bthd,bshd->bhts", q, k)
    # The lowest finite number instead of -inf: a row without any visible key stays finite, in the gradients too,
    # and the second fill turns that row into zeros.
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1).masked_fill(~visible, 0.0)


def apply_map(attention: Tensor, v: Tensor) -> Tensor:
    """The product of a map (B, H, T, S) with the values, (B, T, H, Dv)."""
    v = v.repeat_interleave(attention.shape[1] // v.shape[2], dim=2)
    return torch.einsum("bhts,bshe->bthe", attention, v)


def softmax_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_padding: Tensor | None = None,
) -> Tensor:
    """Softmax attention, the twin that differential attention replaces: softmax(scale · q kᵀ) v.

    Shapes, masks and the default scale are those of `diff_attention_reference`, with one query and one key.

    >>> q, k, v = torch.randn(2, 5, 6, 8), torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, 4)
    >>> softmax_attention_reference(q, k, v).shape
    torch.Size([2, 5, 6, 4])
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    visible = visible_keys(q.shape[1], k.shape[1], causal, key_padding, q.device)
    return apply_map(softmax_map(q, k, scale, visible), v)


def diff_attention_reference(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor | float,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_padding: Tensor | None = None,
    queries: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Differential attention by its definition: (softmax(q1 k1ᵀ · scale) − λ · softmax(q2 k2ᵀ · scale)) v.

    Arguments are those of `diffattn.ops.dispatch.diff_attention`, which also checks them; this function does not.
    `queries` is that of a `Call`.
    The maps take O(B·H·T·S) memory: this is the definition, not a way to train.

    Source: arXiv 2410.05258v2, section 2.1, equation 1; for V2 the authors' post of 20 January 2026.

    >>> q1, k1, q2, k2, v = (torch.randn(2, 5, 4, 8) for _ in range(5))
    >>> diff_attention_reference(q1, k1, q2, k2, v, 0.8).shape
    torch.Size([2, 5, 4, 8])
    """
    if window is not None:
        queries = ranges_of(q1, k1, causal, key_padding, window)
    call = Call(q1, k1, q2, k2, v, lam, causal, scale, key_padding, queries)
    return apply_map(diff_maps_reference(call).map_diff, v)


def diff_maps_reference(call: Call) -> DiffMaps:
    """Returns the maps of a call by their definition: map_diff in v's dtype, the other two in that of the scores.

    >>> q1, k1, q2, k2, v = (torch.randn(2, 5, 4, 8) for _ in range(5))
    >>> diff_maps_reference(Call(q1, k1, q2, k2, v, 0.8)).map_diff.sum(-1).allclose(torch.tensor(0.2), atol=1e-5)
    True
    """
    q1, k1, q2, k2, v, lam = call[:6]
    batch, queries, heads, width = q1.shape
    scale = 1.0 / math.sqrt(width) if call.scale is None else call.scale
    visible = call.visible()

    map_pos = softmax_map(q1, k1, scale, visible)
    map_neg = softmax_map(q2, k2, scale, visible)
    lam_BHT1 = as_lam(lam, v).expand(batch, queries, heads).transpose(1, 2)[..., None]
    return DiffMaps(map_pos, map_neg, (map_pos - lam_BHT1 * of_signals(map_neg, heads)).to(v.dtype))
