"""Differential attention of few queries over a long cache on a GPU: split over the keys, then joined.

A program takes one span of the keys and the queries of all signal heads of one group as rows of one tile, those of its
noise heads as rows of another. So every cached byte is read once, and both maps are computed for each tile of values, a
noise map once for all signal heads that subtract it. Of its span a program walks only over the keys that a query sees,
where ranges say which.

It leaves its maxima, sums and unnormalised outputs in float32; a second launch joins the spans, subtracts, and applies
V1's norm where it is asked to. Neither the number of launches nor any size depends on what the tensors hold, so that
both can be captured in a CUDA graph.

Shape letters: as in `forward.py`, and R signal heads of each noise head, 1 where every head has a noise map of its own.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffattn.ops.triton.configs import Blocks, chip_of, decoding_blocks, spans_of_keys
from diffattn.ops.triton.forward import describable, described, padded
from diffattn.ops.triton.tiles import LOWEST, keys_in_reach, matrix_of, seen_keys, softmax_step, tile_of


@triton.jit
def _few_rows(q, b, g, T, HEADS, q_b, q_t, q_n, q_j, OF_NOISE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
              BD: tl.constexpr):  # fmt: skip
    """The queries of HEADS heads of a group as rows of one tile: the tile, which rows there are, their heads, and t."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BD)
    alive = row < HEADS * T
    h, t = g * HEADS + row // T, row % T
    at = tl.cast(b, tl.int64) * q_b + tl.cast(t, tl.int64) * q_t + tl.cast(h // OF_NOISE, tl.int64) * q_n
    at += tl.cast(h % OF_NOISE, tl.int64) * q_j
    tile = tl.load(q + at[:, None] + column[None, :], mask=alive[:, None] & (column < D)[None, :], other=0.0)
    return tile, alive, h, t


@triton.jit
def _leave(partial, maxima, place, alive, acc, m, total, DV: tl.constexpr, BV: tl.constexpr):
    """Writes what a span gave to each row."""
    value = tl.arange(0, BV)
    tl.store(partial + place[:, None] * DV + value[None, :], acc, mask=alive[:, None] & (value < DV)[None, :])
    tl.store(maxima + 2 * place, m, mask=alive)
    tl.store(maxima + 2 * place + 1, total, mask=alive)


@triton.jit(do_not_specialize=["B", "T", "S", "G", "REP", "SPLITS", "SPAN"])
def _span(
    q1, k1, q2, k2, v, queries, partial, maxima,
    q1_b, q1_t, q1_n, q1_j, k1_b, k1_s, k1_g, q2_b, q2_t, q2_n, k2_b, k2_s, k2_g, v_b, v_s, v_g,
    B, T, S, G, REP, SPLITS, SPAN, c,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, ONE_KEY: tl.constexpr, DESCRIPTORS: tl.constexpr,
    SIGNALS: tl.constexpr, ROWS: tl.constexpr, NOISE_ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    split, group = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    b, g = group // G, group % G
    k1 = matrix_of(k1, b, g, k1_b, k1_g, DESCRIPTORS)
    k2 = matrix_of(k2, b, g, k2_b, k2_g, DESCRIPTORS)
    v = matrix_of(v, b, g, v_b, v_g, DESCRIPTORS)
    noises = REP // SIGNALS
    a, alive1, h, t1 = _few_rows(q1, b, g, T, REP, q1_b, q1_t, q1_n, q1_j, SIGNALS, ROWS, D, BD)
    n, alive2, of_noise, t2 = _few_rows(q2, b, g, T, noises, q2_b, q2_t, q2_n, 0, 1, NOISE_ROWS, D, BD)
    m1, l1 = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    m2, l2 = tl.full([NOISE_ROWS], LOWEST, tl.float32), tl.zeros([NOISE_ROWS], tl.float32)
    acc1, acc2 = tl.zeros([ROWS, BV], tl.float32), tl.zeros([NOISE_ROWS, BV], tl.float32)
    low = split * SPAN
    high = tl.minimum(low + SPAN, S)
    if RANGES:
        first, behind = keys_in_reach(queries, b, B, 0, T, low, high, S, 256)
        low, high = tl.maximum(low, first // KEYS * KEYS), tl.minimum(high, behind)
    for start in tl.range(low, high, KEYS):
        k = tile_of(k1, k1_s, b, g, start, S, True, KEYS, D, BD, DESCRIPTORS)
        s1 = tl.dot(a, tl.trans(k), input_precision="ieee")
        if not ONE_KEY:
            k = tile_of(k2, k2_s, b, g, start, S, True, KEYS, D, BD, DESCRIPTORS)
        s2 = tl.dot(n, tl.trans(k), input_precision="ieee")
        values = tile_of(v, v_s, b, g, start, S, True, KEYS, DV, BV, DESCRIPTORS)
        seen1 = seen_keys(t1, start, queries, b, B, T, S, CAUSAL, RANGES, KEYS)
        p, m1, l1, shrink = softmax_step(tl.where(seen1, s1, float("-inf")), m1, l1, c)
        acc1 = tl.dot(p.to(values.dtype), values, acc1 * shrink[:, None], input_precision="ieee")
        seen2 = seen_keys(t2, start, queries, b, B, T, S, CAUSAL, RANGES, KEYS)
        p, m2, l2, shrink = softmax_step(tl.where(seen2, s2, float("-inf")), m2, l2, c)
        acc2 = tl.dot(p.to(values.dtype), values, acc2 * shrink[:, None], input_precision="ieee")
    # (batch, query, head, split) of the signal heads, then of the noise heads, and behind it the width or the maximum
    # and the sum.
    token1, token2 = tl.cast(b, tl.int64) * T + t1, tl.cast(b, tl.int64) * T + t2
    signals = tl.cast(B, tl.int64) * T * G * REP
    _leave(partial, maxima, (token1 * (G * REP) + h) * SPLITS + split, alive1, acc1, m1 * c, l1, DV, BV)
    noise = (signals + token2 * (G * noises) + of_noise) * SPLITS + split
    _leave(partial, maxima, noise, alive2, acc2, m2 * c, l2, DV, BV)


@triton.jit
def _joined(partial, maxima, first, SPLITS, DV: tl.constexpr, BV: tl.constexpr, BLOCK: tl.constexpr):
    """One map's output of one row: its spans, each by the weight of its maximum."""
    span, value = tl.arange(0, BLOCK), tl.arange(0, BV)
    inside = span < SPLITS
    m = tl.load(maxima + 2 * (first + span), mask=inside, other=float("-inf"))
    total = tl.load(maxima + 2 * (first + span) + 1, mask=inside, other=0.0)
    weight = tl.where(total > 0.0, tl.math.exp2(m - tl.max(m, 0)), 0.0)
    total = tl.sum(weight * total, 0)
    at = partial + (first + span)[:, None] * DV + value[None, :]
    parts = tl.load(at, mask=inside[:, None] & (value < DV)[None, :], other=0.0)
    return tl.sum(parts * weight[:, None], 0) / tl.where(total > 0.0, total, 1.0)


@triton.jit(do_not_specialize=["T", "H", "rows", "SPLITS", "lam_b", "lam_t", "lam_h"])
def _join(
    partial, maxima, lam, gain, out, lam_b, lam_t, lam_h, T, H, rows, SPLITS, norm_scale, eps,
    NORM: tl.constexpr, GAIN: tl.constexpr, SIGNALS: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    h, t, b = row % H, row // H % T, row // H // T
    value = tl.arange(0, BV)
    signal = _joined(partial, maxima, row * SPLITS, SPLITS, DV, BV, BLOCK)
    # Heads of a noise head are neighbours, so that rows of it are, too.
    noise = _joined(partial, maxima, (row // SIGNALS + rows) * SPLITS, SPLITS, DV, BV, BLOCK)
    y = signal - tl.load(lam + b * lam_b + t * lam_t + h * lam_h) * noise
    if NORM:
        y = y * (norm_scale * tl.math.rsqrt(tl.sum(y * y, 0) / DV + eps))
        if GAIN:
            y = y * tl.load(gain + value, mask=value < DV, other=0.0).to(tl.float32)
    tl.store(out + row * DV + value, y.to(out.dtype.element_ty), mask=value < DV)


def decode(
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
    gain: Tensor | None = None,
    norm_scale: float = 1.0,
    eps: float | None = None,
    blocks: Blocks | None = None,
    splits: int | None = None,
) -> Tensor:
    """The output (B, T, H, DV), for few queries and without gradients.

    Arguments are those of `forward.forward`, but q1 is (B, T, Hn, R, D), of each noise head its signal heads.

    Where eps is given the output is ``norm_scale · gain · y / sqrt(mean(y²) + eps)``, with ones where gain is None.
    """
    B, T, noise_heads, R, D = q1.shape
    S, G, DV, H = k1.shape[1], k1.shape[2], v.shape[3], noise_heads * R
    if blocks is None:
        blocks = decoding_blocks(chip_of(v.device), D, DV, k2 is k1)
    rows, noise_rows = (max(16, int(triton.next_power_of_2(heads // G * T))) for heads in (H, noise_heads))
    if splits is None:
        splits = spans_of_keys(q1.device, B * G, S, blocks)
    # One span that holds no key where there is none.
    span = max(1, triton.cdiv(triton.cdiv(S, splits), blocks.keys)) * blocks.keys
    splits = max(1, triton.cdiv(S, span))
    BD, BV = padded(D), padded(DV)
    parts = B * T * (H + noise_heads) * splits
    partial = torch.empty(parts, DV, dtype=torch.float32, device=v.device)
    maxima = torch.empty(parts, 2, dtype=torch.float32, device=v.device)
    out = v.new_empty(B, T, H, DV)
    descriptors = blocks.descriptors and all(describable(x) for x in (k1, k2, v))
    keys = [described(x, blocks.keys, w) if descriptors else x for x, w in ((k1, BD), (k2, BD), (v, BV))]
    _span[(B * G * splits,)](
        q1, keys[0], q2, keys[1], keys[2], queries, partial, maxima,
        # A constant where there is one: a kernel for one signal head has no such argument.
        *q1.stride()[:3], q1.stride(3) if R > 1 else 1,
        *k1.stride()[:3], *q2.stride()[:3], *k2.stride()[:3], *v.stride()[:3],
        B, T, S, G, H // G, splits, span, scale * math.log2(math.e),
        CAUSAL=causal, RANGES=queries is not None, ONE_KEY=k2 is k1, DESCRIPTORS=descriptors,
        SIGNALS=R, ROWS=rows, NOISE_ROWS=noise_rows, KEYS=blocks.keys, D=D, DV=DV, BD=BD, BV=BV,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    _join[(B * T * H,)](
        partial, maxima, lam, gain, out, *lam.stride(), T, H, B * T * H, splits, norm_scale, eps or 0.0,
        NORM=eps is not None, GAIN=gain is not None, SIGNALS=R, DV=DV, BV=BV,
        BLOCK=int(triton.next_power_of_2(splits)), num_warps=4,
    )  # fmt: skip
    return out
