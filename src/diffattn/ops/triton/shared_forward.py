"""Forward pass on a GPU where several output heads subtract one noise map, which is computed once.

    O2     = softmax(scale · q2 k2ᵀ) v                 of each noise head
    output = softmax(scale · q1 k1ᵀ) v − λ ∘ O2        of each signal head

One kernel of one map, launched twice: over the noise heads, and over the signal heads, which read the O2 of their noise
head, rounded to the inputs' dtype, and subtract it. A program takes ROWS queries of one head. Rows of all heads of a
group in one tile would leave the noise map a part of a tile as large as it is: a product takes 64 rows on Hopper, of
one head's queries they are full. So the launches share nothing but O2, and each has programs for the whole card.

Saved for the backward pass: O2 (B, T, Hn, DV) and the log-sum-exps in powers of two, float32 (R + 1, B, Hn, T): of each
noise head those of its R signal heads, and behind them its own.

Shape letters: as in `forward.py`, and Hn noise heads, R signal heads of each, H = Hn · R.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffattn.ops.triton.configs import Blocks, chip_of, forward_blocks, heads_in_wave
from diffattn.ops.triton.forward import _normalised, _walk, describable, described, near_keys, padded
from diffattn.ops.triton.tiles import LOWEST, keys_to_walk, matrix_of, rows_of, rows_of_program, store_rows


@triton.jit
def head_of_group(x, b, n, j, stride_b, stride_group, stride_head):
    """The rows of head j of the group of noise head n."""
    return matrix_of(x, b, n, stride_b, stride_group) + tl.cast(j, tl.int64) * stride_head


@triton.jit
def row_of_group(n, j, b, B, NOISE, length):
    """Returns where the rows of a head begin in float32 (heads of a group, B, noise heads, length)."""
    return ((tl.cast(j, tl.int64) * B + b) * NOISE + n) * length


@triton.jit(do_not_specialize=["B", "T", "S", "H", "REP", "OF_NOISE", "section", "lam_b", "lam_t", "lam_h"])
def _map(
    q, k, v, lam, o2, queries, out, lse,
    q_b, q_t, q_n, q_j, k_b, k_s, k_g, v_b, v_s, v_g, lam_b, lam_t, lam_h, o2_b, o2_t, o2_n, out_b, out_t, out_h,
    B, T, S, H, REP, OF_NOISE, c, section,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, SIGNAL: tl.constexpr, SAVE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    start, _, b, h, g = rows_of_program(B, T, H, REP, section, ROWS)
    n, j = h // OF_NOISE, h % OF_NOISE
    t = start + tl.arange(0, ROWS)
    low, full, high = keys_to_walk(queries, b, B, start, T, S, CAUSAL, RANGES, ROWS, KEYS)
    k = matrix_of(k, b, g, k_b, k_g, DESCRIPTORS)
    v = matrix_of(v, b, g, v_b, v_g, DESCRIPTORS)
    a = rows_of(head_of_group(q, b, n, j, q_b, q_n, q_j), start, q_t, T, ROWS, D, BD)
    m, total = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BV], tl.float32)
    if not RANGES:
        acc, m, total = _walk(
            acc, m, total, a, k, v, k_s, v_s, queries, t, b, g, low, full, B, T, S, c,
            False, CAUSAL, RANGES, DESCRIPTORS, KEYS, D, DV, BD, BV)  # fmt: skip
    acc, m, total = _walk(
        acc, m, total, a, k, v, k_s, v_s, queries, t, b, g, full, high, B, T, S, c,
        True, CAUSAL, RANGES, DESCRIPTORS, KEYS, D, DV, BD, BV)  # fmt: skip
    o, logs = _normalised(acc, m, total, c)
    if SIGNAL:
        weight = tl.load(matrix_of(lam, b, h, lam_b, lam_h) + tl.cast(t, tl.int64) * lam_t, mask=t < T, other=0.0)
        noise = rows_of(matrix_of(o2, b, n, o2_b, o2_n), start, o2_t, T, ROWS, DV, BV).to(tl.float32)
        o -= weight[:, None] * noise
    store_rows(matrix_of(out, b, h, out_b, out_h), start, out_t, T, o, ROWS, DV, BV)
    if SAVE:
        tl.store(lse + row_of_group(n, j, b, B, H // OF_NOISE, T) + t, logs, mask=t < T)


def forward(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    *,
    causal: bool,
    scale: float,
    queries: Tensor | None = None,
    save: bool = True,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The output (B, T, H, DV), and where `save` is set O2 and the log-sum-exps.

    Arguments as in `forward.forward`, but q1 (B, T, Hn, R, D): of each noise head its signal heads; and q2
    (B, T, Hn, D). The blocks are those of two maps, of which one map needs less.
    """
    B, T, noise_heads, R, D = q1.shape
    S, G, DV = k1.shape[1], k1.shape[2], v.shape[3]
    k1, k2, v = near_keys(k1, k2, v)
    if blocks is None:
        blocks = forward_blocks(chip_of(v.device), D, DV, k2 is k1)
    BD, BV = padded(D), padded(DV)
    out, o2 = v.new_empty(B, T, noise_heads * R, DV), v.new_empty(B, T, noise_heads, DV)
    lse = torch.empty(R + 1, B, noise_heads, T, dtype=torch.float32, device=v.device) if save else None
    descriptors = blocks.descriptors and all(describable(x) for x in (k1, k2, v))
    keys = [described(x, blocks.keys, w) if descriptors else x for x, w in ((k1, BD), (k2, BD), (v, BV))]
    parts = triton.cdiv(T, blocks.rows)
    noise = (q2.unsqueeze(3), k2, keys[1], o2, None if lse is None else lse[R:])
    for q, k, read, written, logs in (noise, (q1, k1, keys[0], out, lse)):
        of_noise = q.shape[3]
        H = noise_heads * of_noise
        _map[(parts * B * H,)](
            q, read, keys[2], lam, o2, queries, written, logs,
            *q.stride()[:4], *k.stride()[:3], *v.stride()[:3], *lam.stride(), *o2.stride()[:3], *written.stride()[:3],
            B, T, S, H, H // G, of_noise, scale * math.log2(math.e), heads_in_wave(v.device, parts, blocks.warps),
            CAUSAL=causal, RANGES=queries is not None, SIGNAL=written is out, SAVE=save, DESCRIPTORS=descriptors,
            ROWS=blocks.rows, KEYS=blocks.keys, D=D, DV=DV, BD=BD, BV=BV,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return (out, o2, lse) if save else (out, None, None)
