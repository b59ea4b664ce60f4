"""Differential attention of few queries over a long cache on a GPU: split over the keys, then joined.

A program takes one span of the keys and the queries of all heads of one group as rows of one tile, so that every cached
byte is read once, and both maps for each tile of values. It leaves its maxima, sums and unnormalised outputs in
float32; a second launch joins the spans, subtracts, and applies V1's norm where it is asked to. Neither the number of
launches nor any size depends on what the tensors hold, so that both can be captured in a CUDA graph.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffattn.ops.triton.configs import Blocks, chip_of, decoding_blocks, spans_of_keys
from diffattn.ops.triton.forward import describable, described, padded
from diffattn.ops.triton.tiles import LOWEST, matrix_of, seen_keys, softmax_step, tile_of


@triton.jit(do_not_specialize=["B", "T", "S", "G", "REP", "SPLITS", "SPAN"])
def _span(
    q1, k1, q2, k2, v, queries, partial, maxima,
    q1_b, q1_t, q1_h, k1_b, k1_s, k1_g, q2_b, q2_t, q2_h, k2_b, k2_s, k2_g, v_b, v_s, v_g,
    B, T, S, G, REP, SPLITS, SPAN, c,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, ONE_KEY: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    split, group = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    b, g = group // G, group % G
    b64 = tl.cast(b, tl.int64)
    k1 = matrix_of(k1, b, g, k1_b, k1_g, DESCRIPTORS)
    k2 = matrix_of(k2, b, g, k2_b, k2_g, DESCRIPTORS)
    v = matrix_of(v, b, g, v_b, v_g, DESCRIPTORS)
    row, column, value = tl.arange(0, ROWS), tl.arange(0, BD), tl.arange(0, BV)
    alive = row < REP * T
    h, t = g * REP + row // T, row % T
    inside = alive[:, None] & (column < D)[None, :]
    at1 = b64 * q1_b + tl.cast(t, tl.int64) * q1_t + tl.cast(h, tl.int64) * q1_h
    at2 = b64 * q2_b + tl.cast(t, tl.int64) * q2_t + tl.cast(h, tl.int64) * q2_h
    a = tl.load(q1 + at1[:, None] + column[None, :], mask=inside, other=0.0)
    n = tl.load(q2 + at2[:, None] + column[None, :], mask=inside, other=0.0)
    m1, l1 = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    m2, l2 = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    acc1, acc2 = tl.zeros([ROWS, BV], tl.float32), tl.zeros([ROWS, BV], tl.float32)
    begin = split * SPAN
    for start in tl.range(begin, tl.minimum(begin + SPAN, S), KEYS):
        k = tile_of(k1, k1_s, b, g, start, S, True, KEYS, D, BD, DESCRIPTORS)
        s1 = tl.dot(a, tl.trans(k), input_precision="ieee")
        if not ONE_KEY:
            k = tile_of(k2, k2_s, b, g, start, S, True, KEYS, D, BD, DESCRIPTORS)
        s2 = tl.dot(n, tl.trans(k), input_precision="ieee")
        values = tile_of(v, v_s, b, g, start, S, True, KEYS, DV, BV, DESCRIPTORS)
        seen = seen_keys(t, start, queries, b, B, T, S, CAUSAL, RANGES, KEYS)
        p, m1, l1, shrink = softmax_step(tl.where(seen, s1, float("-inf")), m1, l1, c)
        acc1 = tl.dot(p.to(values.dtype), values, acc1 * shrink[:, None], input_precision="ieee")
        p, m2, l2, shrink = softmax_step(tl.where(seen, s2, float("-inf")), m2, l2, c)
        acc2 = tl.dot(p.to(values.dtype), values, acc2 * shrink[:, None], input_precision="ieee")
    # (map, batch, query, head, split), and behind it the width or the maximum and the sum.
    place = ((b64 * T + t) * (G * REP) + h) * SPLITS + split
    second = tl.cast(B, tl.int64) * T * G * REP * SPLITS
    inside = alive[:, None] & (value < DV)[None, :]
    tl.store(partial + place[:, None] * DV + value[None, :], acc1, mask=inside)
    tl.store(partial + (second + place)[:, None] * DV + value[None, :], acc2, mask=inside)
    tl.store(maxima + 2 * place, m1 * c, mask=alive)
    tl.store(maxima + 2 * place + 1, l1, mask=alive)
    tl.store(maxima + 2 * (second + place), m2 * c, mask=alive)
    tl.store(maxima + 2 * (second + place) + 1, l2, mask=alive)


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
    NORM: tl.constexpr, GAIN: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    h, t, b = row % H, row // H % T, row // H // T
    value = tl.arange(0, BV)
    signal = _joined(partial, maxima, row * SPLITS, SPLITS, DV, BV, BLOCK)
    noise = _joined(partial, maxima, (row + rows) * SPLITS, SPLITS, DV, BV, BLOCK)
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
    """The output (B, T, H, DV); arguments as in `forward.forward`, for few queries and without gradients.

    Where eps is given the output is ``norm_scale · gain · y / sqrt(mean(y²) + eps)``, with ones where gain is None.
    """
    B, T, H, D = q1.shape
    S, G, DV = k1.shape[1], k1.shape[2], v.shape[3]
    if blocks is None:
        blocks = decoding_blocks(chip_of(v.device), D, DV, k2 is k1)
    rows = max(16, int(triton.next_power_of_2(H // G * T)))
    if splits is None:
        splits = spans_of_keys(q1.device, B * G, S, blocks)
    # One span that holds no key where there is none.
    span = max(1, triton.cdiv(triton.cdiv(S, splits), blocks.keys)) * blocks.keys
    splits = max(1, triton.cdiv(S, span))
    BD, BV = padded(D), padded(DV)
    partial = torch.empty(2, B, T, H, splits, DV, dtype=torch.float32, device=v.device)
    maxima = torch.empty(2, B, T, H, splits, 2, dtype=torch.float32, device=v.device)
    out = v.new_empty(B, T, H, DV)
    descriptors = blocks.descriptors and all(describable(x) for x in (k1, k2, v))
    keys = [described(x, blocks.keys, w) if descriptors else x for x, w in ((k1, BD), (k2, BD), (v, BV))]
    _span[(B * G * splits,)](
        q1, keys[0], q2, keys[1], keys[2], queries, partial, maxima,
        *q1.stride()[:3], *k1.stride()[:3], *q2.stride()[:3], *k2.stride()[:3], *v.stride()[:3],
        B, T, S, G, H // G, splits, span, scale * math.log2(math.e),
        CAUSAL=causal, RANGES=queries is not None, ONE_KEY=k2 is k1, DESCRIPTORS=descriptors,
        ROWS=rows, KEYS=blocks.keys, D=D, DV=DV, BD=BD, BV=BV, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    _join[(B * T * H,)](
        partial, maxima, lam, gain, out, *lam.stride(), T, H, B * T * H, splits, norm_scale, eps or 0.0,
        NORM=eps is not None, GAIN=gain is not None, DV=DV, BV=BV,
        BLOCK=int(triton.next_power_of_2(splits)), num_warps=4,
    )  # fmt: skip
    return out
