"""Backward pass on a GPU where several output heads subtract one noise map: no atomic addition, as in `backward.py`.

    D1   = rowsum(dO ∘ O1) = rowsum(dO ∘ O) + λ ∘ rowsum(dO ∘ O2)      d_lam = −rowsum(dO ∘ O2)
    dO2  = −Σ λ ∘ dO, over the signal heads of a noise head            D2 = rowsum(dO2 ∘ O2)

With dO2 every head of the call, signal or noise, is one head of softmax attention, and the noise map's gradients are
computed once for all of its signal heads, not once for each:

    dS   = A ∘ (dO vᵀ − D),   A = 2^(c · q kᵀ − lse)
    d_q  = scale · dS k       d_k = scale · dSᵀ q       d_v = Aᵀ dO, all summed over the heads that read k or v

A kernel makes dO2 and the sums of each row. That of d_q has one map and is launched over the signal heads and over the
noise heads. The programs of d_k and d_v own keys: they walk over the queries of their group's signal heads, then of its
noise heads, so that at no time they hold sums for two keys.

Shape letters: as in `shared_forward.py`.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from diffattn.ops.triton.configs import Blocks, Walk, chip_of, heads_in_wave, key_walks, query_blocks
from diffattn.ops.triton.forward import MOST_ROWS, describable, described, near_keys, padded
from diffattn.ops.triton.shared_forward import head_of_group, row_of_group
from diffattn.ops.triton.tiles import (
    keys_to_walk,
    matrix_of,
    place,
    queries_of,
    rows_of,
    rows_of_program,
    seen_keys,
    store_rows,
    tile_of,
)


@triton.jit(do_not_specialize=["B", "T", "NOISE", "SIGNALS", "lam_b", "lam_t", "lam_h", "d_out_b", "d_out_h"])
def _statistics(
    d_out, out, o2, lam, lse, statistics, d_lam, d_o2,
    d_out_b, d_out_t, d_out_h, out_b, out_t, out_h, o2_b, o2_t, o2_n, lam_b, lam_t, lam_h,
    B, T, NOISE, SIGNALS, LENGTH, ROWS: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    blocks = LENGTH // ROWS
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, n = head // NOISE, head % NOISE
    start = block * ROWS
    t = start + tl.arange(0, ROWS)
    t64, inside = tl.cast(t, tl.int64), t < T
    noise = rows_of(matrix_of(o2, b, n, o2_b, o2_n), start, o2_t, T, ROWS, DV, BV).to(tl.float32)
    whole = tl.zeros([ROWS, BV], tl.float32)
    sums = statistics + tl.cast(B * NOISE, tl.int64) * (SIGNALS + 1) * LENGTH
    for j in range(SIGNALS):
        h = n * SIGNALS + j
        grad = rows_of(matrix_of(d_out, b, h, d_out_b, d_out_h), start, d_out_t, T, ROWS, DV, BV).to(tl.float32)
        o = rows_of(matrix_of(out, b, h, out_b, out_h), start, out_t, T, ROWS, DV, BV).to(tl.float32)
        weight = tl.load(matrix_of(lam, b, h, lam_b, lam_h) + t64 * lam_t, mask=inside, other=0.0)
        of_noise = tl.sum(grad * noise, 1)
        tl.store(d_lam + (tl.cast(b, tl.int64) * T + t64) * NOISE * SIGNALS + h, -of_noise, mask=inside)
        tl.store(
            sums + row_of_group(n, j, b, B, NOISE, LENGTH) + t,
            tl.where(inside, tl.sum(grad * o, 1) + weight * of_noise, 0.0),
        )
        whole -= weight[:, None] * grad
    store_rows(matrix_of(d_o2, b, n, o2_b, o2_n), start, o2_t, T, whole, ROWS, DV, BV)
    # What the products read, rounded as they read it.
    sum2 = tl.sum(whole.to(d_o2.dtype.element_ty).to(tl.float32) * noise, 1)
    tl.store(sums + row_of_group(n, SIGNALS, b, B, NOISE, LENGTH) + t, tl.where(inside, sum2, 0.0))
    for j in range(SIGNALS + 1):
        logs = tl.load(lse + row_of_group(n, j, b, B, NOISE, T) + t, mask=inside, other=float("inf"))
        tl.store(statistics + row_of_group(n, j, b, B, NOISE, LENGTH) + t, logs)


@triton.jit
def _walk_keys(
    dq, q, grad, logs, sums, k, v, k_s, v_s, queries, t, b, g, low, high, B, T, S, c,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, RANGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
    KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    for start in tl.range(low, high, KEYS):
        keys = tile_of(k, k_s, b, g, start, S, MASKED, KEYS, D, BD, DESCRIPTORS)
        values = tile_of(v, v_s, b, g, start, S, MASKED, KEYS, DV, BV, DESCRIPTORS)
        s = tl.dot(q, tl.trans(keys), input_precision="ieee")
        dp = tl.dot(grad, tl.trans(values), input_precision="ieee")
        p = tl.math.exp2(s * c - logs[:, None])
        if MASKED:
            p = tl.where(seen_keys(t, start, queries, b, B, T, S, CAUSAL, RANGES, KEYS), p, 0.0)
        dq = tl.dot((p * (dp - sums[:, None])).to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["B", "T", "S", "H", "REP", "OF_NOISE", "section", "d_out_b", "d_out_h"])
def _queries(
    d_out, q, k, v, queries, logs, sums, d_q,
    d_out_b, d_out_t, d_out_h, q_b, q_t, q_n, q_j, k_b, k_s, k_g, v_b, v_s, v_g, d_q_b, d_q_t, d_q_n, d_q_j,
    B, T, S, H, REP, OF_NOISE, LENGTH, c, scale, section,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    start, _, b, h, g = rows_of_program(B, T, H, REP, section, ROWS)
    n, j = h // OF_NOISE, h % OF_NOISE
    t = start + tl.arange(0, ROWS)
    low, full, high = keys_to_walk(queries, b, B, start, T, S, CAUSAL, RANGES, ROWS, KEYS)
    k = matrix_of(k, b, g, k_b, k_g, DESCRIPTORS)
    v = matrix_of(v, b, g, v_b, v_g, DESCRIPTORS)
    a = rows_of(head_of_group(q, b, n, j, q_b, q_n, q_j), start, q_t, T, ROWS, D, BD)
    grad = rows_of(matrix_of(d_out, b, h, d_out_b, d_out_h), start, d_out_t, T, ROWS, DV, BV)
    row = row_of_group(n, j, b, B, H // OF_NOISE, LENGTH) + t
    log, total = tl.load(logs + row), tl.load(sums + row)
    dq = tl.zeros([ROWS, BD], tl.float32)
    if not RANGES:
        dq = _walk_keys(
            dq, a, grad, log, total, k, v, k_s, v_s, queries, t, b, g, low, full, B, T, S, c,
            False, CAUSAL, RANGES, DESCRIPTORS, KEYS, D, DV, BD, BV)  # fmt: skip
    dq = _walk_keys(
        dq, a, grad, log, total, k, v, k_s, v_s, queries, t, b, g, full, high, B, T, S, c,
        True, CAUSAL, RANGES, DESCRIPTORS, KEYS, D, DV, BD, BV)  # fmt: skip
    store_rows(head_of_group(d_q, b, n, j, d_q_b, d_q_n, d_q_j), start, d_q_t, T, dq * scale, ROWS, D, BD)


@triton.jit
def _walk_queries(
    dk, dv, k, v, q, d_out, q_t, d_out_t, logs, sums, key, first, end, b, head, h, low, high, T, S, c,
    MASKED: tl.constexpr, RANGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
    MAKES_K: tl.constexpr, MAKES_V: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    for start in tl.range(low, high, ROWS):
        t = start + tl.arange(0, ROWS)
        # The log-sum-exps of rows behind T are +inf, so that their probabilities are 0.
        a = tile_of(q, q_t, b, head, start, T, True, ROWS, D, BD, DESCRIPTORS)
        s = tl.dot(k, tl.trans(a), input_precision="ieee")
        p = tl.math.exp2(s * c - tl.load(logs + t)[None, :])
        if MASKED:
            if RANGES:
                seen = (first[:, None] <= t[None, :]) & (t[None, :] < end[:, None])
            else:
                seen = key[:, None] <= S - T + t[None, :]
            p = tl.where(seen, p, 0.0)
        grad = tile_of(d_out, d_out_t, b, h, start, T, True, ROWS, DV, BV, DESCRIPTORS)
        if MAKES_V:
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
        if MAKES_K:
            dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
            ds = p * (dp - tl.load(sums + t)[None, :])
            dk = tl.dot(ds.to(a.dtype), a, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _walk_head(
    dk, dv, k, v, q, d_out, q_b, q_t, q_h, d_out_b, d_out_t, d_out_h, logs, sums, key, first, end, b, head, h,
    low, full, T, S, c,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
    MAKES_K: tl.constexpr, MAKES_V: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Adds what one head gives: `head` among those of q, h among those of d_out."""
    q = matrix_of(q, b, head, q_b, q_h, DESCRIPTORS)
    d_out = matrix_of(d_out, b, h, d_out_b, d_out_h, DESCRIPTORS)
    if CAUSAL or RANGES:
        dk, dv = _walk_queries(
            dk, dv, k, v, q, d_out, q_t, d_out_t, logs, sums, key, first, end, b, head, h, low, tl.minimum(full, T),
            T, S, c, True, RANGES, DESCRIPTORS, MAKES_K, MAKES_V, ROWS, D, DV, BD, BV)  # fmt: skip
    if not RANGES:
        dk, dv = _walk_queries(
            dk, dv, k, v, q, d_out, q_t, d_out_t, logs, sums, key, first, end, b, head, h, full, T,
            T, S, c, False, RANGES, DESCRIPTORS, MAKES_K, MAKES_V, ROWS, D, DV, BD, BV)  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=["B", "T", "S", "G", "PER", "SIGNALS", "section", "d_out_b", "d_out_h"])
def _keys(
    d_out, d_o2, q, k1, k2, v, queries, logs, sums, d_k1, d_k2, d_v,
    d_out_b, d_out_t, d_out_h, d_o2_b, d_o2_t, d_o2_n, q_b, q_t, q_h, k1_b, k1_s, k1_g, k2_b, k2_s, k2_g, v_b, v_s, v_g,
    d_k_b, d_k_s, d_k_g, d_v_b, d_v_s, d_v_g,
    B, T, S, G, PER, SIGNALS, LENGTH, c, scale, section,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, ONE_KEY: tl.constexpr, DESCRIPTORS: tl.constexpr,
    MAKES_K: tl.constexpr, MAKES_V: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S, KEYS)
    block, head = place(tl.program_id(0), blocks, B * G, section)
    # The first keys are seen by the most queries.
    start = (blocks - 1 - block) * KEYS
    b, g = head // G, head % G
    key = start + tl.arange(0, KEYS)
    values = rows_of(matrix_of(v, b, g, v_b, v_g), start, v_s, S, KEYS, DV, BV)
    first, end = key, key
    if RANGES:
        first, end = queries_of(queries, b, B, start, S, KEYS)
        alive = first < end
        low = tl.maximum(tl.min(tl.where(alive, first, T), 0), 0) // ROWS * ROWS
        full = tl.minimum(tl.max(tl.where(alive, end, 0), 0), T)
    else:
        low, full = 0, 0
        if CAUSAL:
            low = tl.maximum(start - (S - T), 0) // ROWS * ROWS
            full = tl.cdiv(tl.maximum(start + KEYS - 1 - (S - T), 0), ROWS) * ROWS

    keys = rows_of(matrix_of(k1, b, g, k1_b, k1_g), start, k1_s, S, KEYS, D, BD)
    dk, dv = tl.zeros([KEYS, BD], tl.float32), tl.zeros([KEYS, BV], tl.float32)
    for repeat in range(PER * SIGNALS):
        n, j = g * PER + repeat // SIGNALS, repeat % SIGNALS
        row = row_of_group(n, j, b, B, G * PER, LENGTH)
        dk, dv = _walk_head(
            dk, dv, keys, values, q, d_out, q_b, q_t, q_h, d_out_b, d_out_t, d_out_h, logs + row, sums + row, key,
            first, end, b, n * (SIGNALS + 1) + j, n * SIGNALS + j, low, full, T, S, c,
            CAUSAL, RANGES, DESCRIPTORS, MAKES_K, MAKES_V, ROWS, D, DV, BD, BV)  # fmt: skip
    if not ONE_KEY:
        if MAKES_K:
            store_rows(matrix_of(d_k1, b, g, d_k_b, d_k_g), start, d_k_s, S, dk * scale, KEYS, D, BD)
        dk = tl.zeros([KEYS, BD], tl.float32)
        keys = rows_of(matrix_of(k2, b, g, k2_b, k2_g), start, k2_s, S, KEYS, D, BD)
    for repeat in range(PER):
        n = g * PER + repeat
        row = row_of_group(n, SIGNALS, b, B, G * PER, LENGTH)
        dk, dv = _walk_head(
            dk, dv, keys, values, q, d_o2, q_b, q_t, q_h, d_o2_b, d_o2_t, d_o2_n, logs + row, sums + row, key,
            first, end, b, n * (SIGNALS + 1) + SIGNALS, n, low, full, T, S, c,
            CAUSAL, RANGES, DESCRIPTORS, MAKES_K, MAKES_V, ROWS, D, DV, BD, BV)  # fmt: skip
    if MAKES_K:
        store_rows(matrix_of(d_k2, b, g, d_k_b, d_k_g), start, d_k_s, S, dk * scale, KEYS, D, BD)
    if MAKES_V:
        store_rows(matrix_of(d_v, b, g, d_v_b, d_v_g), start, d_v_s, S, dv, KEYS, DV, BV)


def row_statistics(d_out: Tensor, lam: Tensor, out: Tensor, o2: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what the rows of a call need of themselves.

    Returns:
        log-sum-exps and D, float32 (2, R + 1, B, Hn, T rounded up), of each noise head its signal heads and then
        itself; rows behind T, up to whole tiles, have a log-sum-exp of +inf. Then d_lam (B, T, H), and dO2.
    """
    (B, T, noise_heads, DV), R = o2.shape, lse.shape[0] - 1
    length = triton.cdiv(T, MOST_ROWS) * MOST_ROWS
    statistics, d_lam = lse.new_empty(2, R + 1, B, noise_heads, length), lse.new_empty(lam.shape)
    d_o2 = o2.new_empty(o2.shape)
    _statistics[(length // 32 * B * noise_heads,)](
        d_out, out, o2, lam, lse, statistics, d_lam, d_o2,
        *d_out.stride()[:3], *out.stride()[:3], *o2.stride()[:3], *lam.stride(),
        B, T, noise_heads, R, length, ROWS=32, DV=DV, BV=padded(DV), num_warps=4 if DV <= 128 else 8,
    )  # fmt: skip
    return statistics, d_lam, d_o2


class Gradients:
    """The launches of one backward pass: what they share, and each of them."""

    def __init__(
        self,
        d_outs: tuple[Tensor, Tensor],
        q: Tensor,
        keys: tuple[Tensor, Tensor],
        v: Tensor,
        statistics: Tensor,
        *,
        causal: bool,
        scale: float,
        queries: Tensor | None,
    ) -> None:
        self.d_outs, self.q, self.k, self.v, self.statistics, self.ranges = d_outs, q, keys, v, statistics, queries
        (self.B, self.T, self.noise_heads, many, D), (self.S, self.G, DV) = q.shape, v.shape[1:]
        self.signals = many - 1
        self.scale = scale
        self.sizes = {"D": D, "DV": DV, "BD": padded(D), "BV": padded(DV)}
        self.flags = {"CAUSAL": causal, "RANGES": queries is not None}

    def queries(self, blocks: Blocks) -> Tensor:
        """d_q, (B, T, Hn, R + 1, D)."""
        d_q = self.q.new_empty(self.q.shape)
        descriptors = blocks.descriptors and all(describable(x) for x in (*self.k, self.v))
        parts = triton.cdiv(self.T, blocks.rows)
        v = described(self.v, blocks.keys, self.sizes["BV"]) if descriptors else self.v
        for heads, k, d_out in zip((slice(self.signals), slice(self.signals, None)), self.k, self.d_outs, strict=True):
            q, d = self.q[:, :, :, heads], d_q[:, :, :, heads]
            H = self.noise_heads * q.shape[3]
            _queries[(parts * self.B * H,)](
                d_out, q, described(k, blocks.keys, self.sizes["BD"]) if descriptors else k, v, self.ranges,
                *self.statistics[:, heads], d,
                *d_out.stride()[:3], *q.stride()[:4], *k.stride()[:3], *self.v.stride()[:3], *d.stride()[:4],
                self.B, self.T, self.S, H, H // self.G, q.shape[3], self.statistics.shape[4],
                self.scale * math.log2(math.e), self.scale, heads_in_wave(self.v.device, parts, blocks.warps),
                **self.flags, **self.sizes, DESCRIPTORS=descriptors,
                ROWS=blocks.rows, KEYS=blocks.keys, num_warps=blocks.warps, num_stages=blocks.stages,
            )  # fmt: skip
        return d_q

    def keys(self, walks: tuple[Walk, ...]) -> tuple[Tensor, Tensor]:
        """d_k1 and d_k2, (B, S, G, 2, D), or of the one k (B, S, G, 1, D), and d_v."""
        (k1, k2), v = self.k, self.v
        d_k = k1.new_empty(self.B, self.S, self.G, 1 if k2 is k1 else 2, k1.shape[3])
        d_v = v.new_empty(v.shape)
        # Steps from head to head that are all alike: a copy only where nobody's projection has them so.
        q = self.q.flatten(2, 3)
        tiles = ((self.d_outs[0], "BV"), (self.d_outs[1], "BV"), (q, "BD"))
        for blocks, makes_k, makes_v in walks:
            descriptors = blocks.descriptors and all(describable(x) for x, _ in tiles)
            rows = [described(x, blocks.rows, self.sizes[w]) if descriptors else x for x, w in tiles]
            parts = triton.cdiv(self.S, blocks.keys)
            _keys[(parts * self.B * self.G,)](
                *rows, k1, k2, v, self.ranges, *self.statistics, d_k[:, :, :, 0], d_k[:, :, :, -1], d_v,
                *(n for x in (*self.d_outs, q, k1, k2, v) for n in x.stride()[:3]),
                *d_k.stride()[:3], *d_v.stride()[:3],
                self.B, self.T, self.S, self.G, self.noise_heads // self.G, self.signals, self.statistics.shape[4],
                self.scale * math.log2(math.e), self.scale, heads_in_wave(v.device, parts, blocks.warps),
                **self.flags, **self.sizes, ONE_KEY=k2 is k1, DESCRIPTORS=descriptors,
                MAKES_K=makes_k, MAKES_V=makes_v, ROWS=blocks.rows, KEYS=blocks.keys,
                num_warps=blocks.warps, num_stages=blocks.stages,
            )  # fmt: skip
        return d_k, d_v


def backward(
    d_out: Tensor,
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    out: Tensor,
    o2: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
    queries: Tensor | None = None,
    blocks: tuple[Blocks, tuple[Walk, ...]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients from what `shared_forward.forward` saved; arguments and result as in `backward.backward`.

    q is (B, T, Hn, R + 1, D), of each noise head its signal heads and then itself, and so is its gradient.
    """
    if d_out.stride(-1) != 1:
        d_out = d_out.contiguous()
    k1, k2, v = near_keys(k1, k2, v)
    if blocks is None:
        case = (chip_of(v.device), q.shape[4], v.shape[3], k2 is k1)
        blocks = query_blocks(*case), key_walks(*case)
    for_queries, for_keys = blocks
    statistics, d_lam, d_o2 = row_statistics(d_out, lam, out, o2, lse)
    outs = (d_out, d_o2)
    launches = Gradients(outs, q, (k1, k2), v, statistics, causal=causal, scale=scale, queries=queries)
    d_q = launches.queries(for_queries)
    d_k, d_v = launches.keys(for_keys)
    return d_q, d_k, d_v, d_lam
