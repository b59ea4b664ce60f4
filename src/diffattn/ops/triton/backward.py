"""Backward pass of differential attention on a GPU, deterministic: no atomic addition, the same bits in every run.

    D2 = rowsum(dO ∘ O2)                   d_lam = −D2
    D1 = rowsum(dO ∘ O) + λ ∘ D2           = rowsum(dO ∘ O1)
    dP = dO vᵀ,   Ai = 2^(c · qi kiᵀ − lse_i)
    d_v  = (A1 − λ ∘ A2)ᵀ dO
    dS1  = A1 ∘ (dP − D1),                 dS2 = λ ∘ A2 ∘ (D2 − dP)
    d_qi = scale · dSi ki,                 d_ki = scale · dSiᵀ qi

Three kernels: the sums of each row; d_q, whose programs own queries and walk over keys; d_k and d_v, whose programs own
keys and walk over the queries of all heads of their group, on transposed scores so that no computed tile is ever
transposed. dP and d_v are shared by both maps. Where the gradients of wide heads do not fit into registers together,
d_v and d_k are two walks of the same kernel.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from diffattn.ops.triton.configs import Blocks, Walk, chip_of, heads_in_wave, key_walks, query_blocks
from diffattn.ops.triton.forward import MOST_ROWS, describable, described, near_keys, padded
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


@triton.jit(do_not_specialize=["B", "T", "H", "lam_b", "lam_t", "lam_h", "d_out_b", "d_out_h"])
def _statistics(
    d_out, out, o2, lam, lse, statistics, d_lam, d_out_b, d_out_t, d_out_h, out_b, out_t, out_h, lam_b, lam_t, lam_h,
    B, T, H, LENGTH, ROWS: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    blocks = LENGTH // ROWS
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = head // H, head % H
    start = block * ROWS
    t = start + tl.arange(0, ROWS)
    t64, inside = tl.cast(t, tl.int64), t < T
    grad = rows_of(matrix_of(d_out, b, h, d_out_b, d_out_h), start, d_out_t, T, ROWS, DV, BV).to(tl.float32)
    o = rows_of(matrix_of(out, b, h, out_b, out_h), start, out_t, T, ROWS, DV, BV).to(tl.float32)
    noise = rows_of(matrix_of(o2, b, h, out_b, out_h), start, out_t, T, ROWS, DV, BV).to(tl.float32)
    weight = tl.load(matrix_of(lam, b, h, lam_b, lam_h) + t64 * lam_t, mask=inside, other=0.0)
    sum2 = tl.sum(grad * noise, 1)
    sum1 = tl.sum(grad * o, 1) + weight * sum2
    tl.store(d_lam + (tl.cast(b, tl.int64) * T + t64) * H + h, -sum2, mask=inside)
    row = tl.cast(head, tl.int64) * T + t
    lse1 = tl.load(lse + row, mask=inside, other=float("inf"))
    lse2 = tl.load(lse + tl.cast(B * H, tl.int64) * T + row, mask=inside, other=float("inf"))
    at = statistics + tl.cast(head, tl.int64) * LENGTH + t
    step = tl.cast(B * H, tl.int64) * LENGTH
    tl.store(at, lse1)
    tl.store(at + step, lse2)
    tl.store(at + 2 * step, tl.where(inside, sum1, 0.0))
    tl.store(at + 3 * step, tl.where(inside, sum2, 0.0))
    tl.store(at + 4 * step, weight)


@triton.jit
def _walk_keys(
    dq1, dq2, q1, q2, grad, lse1, lse2, sum1, sum2, k1, k2, v, k1_s, k2_s, v_s, queries, t, b, g, low, high, B, T, S, c,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, RANGES: tl.constexpr, ONE_KEY: tl.constexpr, DESCRIPTORS: tl.constexpr,
    KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    for start in tl.range(low, high, KEYS):
        k = tile_of(k1, k1_s, b, g, start, S, MASKED, KEYS, D, BD, DESCRIPTORS)
        values = tile_of(v, v_s, b, g, start, S, MASKED, KEYS, DV, BV, DESCRIPTORS)
        s1 = tl.dot(q1, tl.trans(k), input_precision="ieee")
        dp = tl.dot(grad, tl.trans(values), input_precision="ieee")
        p = tl.math.exp2(s1 * c - lse1[:, None])
        if MASKED:
            seen = seen_keys(t, start, queries, b, B, T, S, CAUSAL, RANGES, KEYS)
            p = tl.where(seen, p, 0.0)
        dq1 = tl.dot((p * (dp - sum1[:, None])).to(k.dtype), k, dq1, input_precision="ieee")
        if not ONE_KEY:
            k = tile_of(k2, k2_s, b, g, start, S, MASKED, KEYS, D, BD, DESCRIPTORS)
        s2 = tl.dot(q2, tl.trans(k), input_precision="ieee")
        p = tl.math.exp2(s2 * c - lse2[:, None])
        if MASKED:
            p = tl.where(seen, p, 0.0)
        dq2 = tl.dot((p * (sum2[:, None] - dp)).to(k.dtype), k, dq2, input_precision="ieee")
    return dq1, dq2


@triton.jit(do_not_specialize=["B", "T", "S", "H", "REP", "section", "d_out_b", "d_out_h"])
def _queries(
    d_out, q1, k1, q2, k2, v, queries, statistics, d_q1, d_q2,
    d_out_b, d_out_t, d_out_h, q1_b, q1_t, q1_h, k1_b, k1_s, k1_g, q2_b, q2_t, q2_h, k2_b, k2_s, k2_g, v_b, v_s, v_g,
    d_q_b, d_q_t, d_q_h,
    B, T, S, H, REP, LENGTH, c, scale, section,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, ONE_KEY: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    start, head, b, h, g = rows_of_program(B, T, H, REP, section, ROWS)
    t = start + tl.arange(0, ROWS)
    low, full, high = keys_to_walk(queries, b, B, start, T, S, CAUSAL, RANGES, ROWS, KEYS)
    k1 = matrix_of(k1, b, g, k1_b, k1_g, DESCRIPTORS)
    k2 = matrix_of(k2, b, g, k2_b, k2_g, DESCRIPTORS)
    v = matrix_of(v, b, g, v_b, v_g, DESCRIPTORS)
    a = rows_of(matrix_of(q1, b, h, q1_b, q1_h), start, q1_t, T, ROWS, D, BD)
    n = rows_of(matrix_of(q2, b, h, q2_b, q2_h), start, q2_t, T, ROWS, D, BD)
    grad = rows_of(matrix_of(d_out, b, h, d_out_b, d_out_h), start, d_out_t, T, ROWS, DV, BV)
    at = statistics + tl.cast(head, tl.int64) * LENGTH + t
    step = tl.cast(B * H, tl.int64) * LENGTH
    lse1, lse2 = tl.load(at), tl.load(at + step)
    sum1, sum2 = tl.load(at + 2 * step), tl.load(at + 3 * step)
    dq1, dq2 = tl.zeros([ROWS, BD], tl.float32), tl.zeros([ROWS, BD], tl.float32)
    if not RANGES:
        dq1, dq2 = _walk_keys(
            dq1, dq2, a, n, grad, lse1, lse2, sum1, sum2, k1, k2, v, k1_s, k2_s, v_s, queries, t, b, g, low, full,
            B, T, S, c, False, CAUSAL, RANGES, ONE_KEY, DESCRIPTORS, KEYS, D, DV, BD, BV)  # fmt: skip
    dq1, dq2 = _walk_keys(
        dq1, dq2, a, n, grad, lse1, lse2, sum1, sum2, k1, k2, v, k1_s, k2_s, v_s, queries, t, b, g, full, high,
        B, T, S, c, True, CAUSAL, RANGES, ONE_KEY, DESCRIPTORS, KEYS, D, DV, BD, BV)  # fmt: skip
    weight = tl.load(at + 4 * step)
    store_rows(matrix_of(d_q1, b, h, d_q_b, d_q_h), start, d_q_t, T, dq1 * scale, ROWS, D, BD)
    store_rows(matrix_of(d_q2, b, h, d_q_b, d_q_h), start, d_q_t, T, dq2 * (scale * weight)[:, None], ROWS, D, BD)


@triton.jit
def _walk_queries(
    dk1, dk2, dv, k1, k2, v, q1, q2, d_out, q1_t, q2_t, d_out_t, statistics, step, key, first, end, b, h,
    low, high, T, S, c,
    MASKED: tl.constexpr, RANGES: tl.constexpr, ONE_KEY: tl.constexpr, DESCRIPTORS: tl.constexpr,
    MAKES_K: tl.constexpr, MAKES_V: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    for start in tl.range(low, high, ROWS):
        t = start + tl.arange(0, ROWS)
        at = statistics + t
        # The log-sum-exps of rows behind T are +inf, so that their probabilities are 0.
        a = tile_of(q1, q1_t, b, h, start, T, True, ROWS, D, BD, DESCRIPTORS)
        s1 = tl.dot(k1, tl.trans(a), input_precision="ieee")
        n = tile_of(q2, q2_t, b, h, start, T, True, ROWS, D, BD, DESCRIPTORS)
        s2 = tl.dot(k2, tl.trans(n), input_precision="ieee")
        p1 = tl.math.exp2(s1 * c - tl.load(at)[None, :])
        p2 = tl.math.exp2(s2 * c - tl.load(at + step)[None, :]) * tl.load(at + 4 * step)[None, :]
        if MASKED:
            if RANGES:
                seen = (first[:, None] <= t[None, :]) & (t[None, :] < end[:, None])
            else:
                seen = key[:, None] <= S - T + t[None, :]
            p1 = tl.where(seen, p1, 0.0)
            p2 = tl.where(seen, p2, 0.0)
        grad = tile_of(d_out, d_out_t, b, h, start, T, True, ROWS, DV, BV, DESCRIPTORS)
        if MAKES_V:
            dv = tl.dot((p1 - p2).to(grad.dtype), grad, dv, input_precision="ieee")
        if MAKES_K:
            dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
            ds1 = p1 * (dp - tl.load(at + 2 * step)[None, :])
            dk1 = tl.dot(ds1.to(a.dtype), a, dk1, input_precision="ieee")
            ds2 = (p2 * (tl.load(at + 3 * step)[None, :] - dp)).to(n.dtype)
            if ONE_KEY:
                dk1 = tl.dot(ds2, n, dk1, input_precision="ieee")
            else:
                dk2 = tl.dot(ds2, n, dk2, input_precision="ieee")
    return dk1, dk2, dv


@triton.jit(do_not_specialize=["B", "T", "S", "G", "REP", "section", "d_out_b", "d_out_h"])
def _keys(
    d_out, q1, k1, q2, k2, v, queries, statistics, d_k1, d_k2, d_v,
    d_out_b, d_out_t, d_out_h, q1_b, q1_t, q1_h, k1_b, k1_s, k1_g, q2_b, q2_t, q2_h, k2_b, k2_s, k2_g, v_b, v_s, v_g,
    d_k_b, d_k_s, d_k_g, d_v_b, d_v_s, d_v_g,
    B, T, S, G, REP, LENGTH, c, scale, section,
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
    keys1 = rows_of(matrix_of(k1, b, g, k1_b, k1_g), start, k1_s, S, KEYS, D, BD)
    if ONE_KEY:  # noqa: SIM108
        keys2 = keys1
    else:
        keys2 = rows_of(matrix_of(k2, b, g, k2_b, k2_g), start, k2_s, S, KEYS, D, BD)
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

    dk1, dk2 = tl.zeros([KEYS, BD], tl.float32), tl.zeros([KEYS, BD], tl.float32)
    dv = tl.zeros([KEYS, BV], tl.float32)
    step = tl.cast(B * G * REP, tl.int64) * LENGTH
    for repeat in range(REP):
        h = g * REP + repeat
        rows = statistics + (tl.cast(b * G, tl.int64) * REP + h) * LENGTH
        qa = matrix_of(q1, b, h, q1_b, q1_h, DESCRIPTORS)
        qn = matrix_of(q2, b, h, q2_b, q2_h, DESCRIPTORS)
        grads = matrix_of(d_out, b, h, d_out_b, d_out_h, DESCRIPTORS)
        if CAUSAL or RANGES:
            dk1, dk2, dv = _walk_queries(
                dk1, dk2, dv, keys1, keys2, values, qa, qn, grads, q1_t, q2_t, d_out_t, rows, step, key,
                first, end, b, h, low, tl.minimum(full, T), T, S, c, True, RANGES, ONE_KEY, DESCRIPTORS,
                MAKES_K, MAKES_V, ROWS, D, DV, BD, BV)  # fmt: skip
        if not RANGES:
            dk1, dk2, dv = _walk_queries(
                dk1, dk2, dv, keys1, keys2, values, qa, qn, grads, q1_t, q2_t, d_out_t, rows, step, key,
                first, end, b, h, full, T, T, S, c, False, RANGES, ONE_KEY, DESCRIPTORS,
                MAKES_K, MAKES_V, ROWS, D, DV, BD, BV)  # fmt: skip
    if MAKES_K:
        store_rows(matrix_of(d_k1, b, g, d_k_b, d_k_g), start, d_k_s, S, dk1 * scale, KEYS, D, BD)
        if not ONE_KEY:
            store_rows(matrix_of(d_k2, b, g, d_k_b, d_k_g), start, d_k_s, S, dk2 * scale, KEYS, D, BD)
    if MAKES_V:
        store_rows(matrix_of(d_v, b, g, d_v_b, d_v_g), start, d_v_s, S, dv, KEYS, DV, BV)


def row_statistics(d_out: Tensor, lam: Tensor, out: Tensor, o2: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Returns for each row both log-sum-exps, D1, D2 and λ, float32 (5, B, H, T rounded up), and d_lam (B, T, H).

    Rows behind T, up to whole tiles, have a log-sum-exp of +inf. So no kernel has to ask where T ends.
    """
    B, T, H, DV = out.shape
    length = triton.cdiv(T, MOST_ROWS) * MOST_ROWS
    statistics, d_lam = lse.new_empty(5, B, H, length), lse.new_empty(B, T, H)
    _statistics[(length // 32 * B * H,)](
        d_out, out, o2, lam, lse, statistics, d_lam, *d_out.stride()[:3], *out.stride()[:3], *lam.stride(),
        B, T, H, length, ROWS=32, DV=DV, BV=padded(DV), num_warps=4,
    )  # fmt: skip
    return statistics, d_lam


class Gradients:
    """The launches of one backward pass: what the two kernels share, and each of them."""

    def __init__(
        self,
        d_out: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        statistics: Tensor,
        *,
        causal: bool,
        scale: float,
        queries: Tensor | None,
    ) -> None:
        q1, k1, q2, k2, v = self.inputs = inputs
        (self.B, self.T, self.H, D), (self.S, self.G), DV = q1.shape, k1.shape[1:3], v.shape[3]
        self.d_out, self.statistics, self.ranges = d_out, statistics, queries
        self.one_key = k2 is k1
        self.scale = scale
        self.strides = [n for x in (d_out, q1, k1, q2, k2, v) for n in x.stride()[:3]]
        self.sizes = {"D": D, "DV": DV, "BD": padded(D), "BV": padded(DV)}
        self.flags = {"CAUSAL": causal, "RANGES": queries is not None, "ONE_KEY": self.one_key}

    def queries(self, blocks: Blocks) -> Tensor:
        """d_q1 and d_q2, (B, T, H, 2, D)."""
        q1, k1, _, k2, v = self.inputs
        d_q = q1.new_empty(self.B, self.T, self.H, 2, q1.shape[3])
        descriptors = blocks.descriptors and all(describable(x) for x in (k1, k2, v))
        BD, BV = self.sizes["BD"], self.sizes["BV"]
        keys = [described(x, blocks.keys, w) if descriptors else x for x, w in ((k1, BD), (k2, BD), (v, BV))]
        parts = triton.cdiv(self.T, blocks.rows)
        _queries[(parts * self.B * self.H,)](
            self.d_out, q1, keys[0], self.inputs[2], keys[1], keys[2], self.ranges, self.statistics, *d_q.unbind(3),
            *self.strides, *d_q.stride()[:3],
            self.B, self.T, self.S, self.H, self.H // self.G, self.statistics.shape[3],
            self.scale * math.log2(math.e), self.scale,
            heads_in_wave(v.device, parts, blocks.warps), **self.flags, **self.sizes,
            DESCRIPTORS=descriptors, ROWS=blocks.rows, KEYS=blocks.keys,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        return d_q

    def keys(self, walks: tuple[Walk, ...]) -> tuple[Tensor, Tensor]:
        """d_k1 and d_k2, (B, S, G, 2, D), or of the one k (B, S, G, 1, D), and d_v."""
        q1, k1, q2, k2, v = self.inputs
        d_k = k1.new_empty(self.B, self.S, self.G, 1 if self.one_key else 2, k1.shape[3])
        d_v = v.new_empty(v.shape)
        BD, BV = self.sizes["BD"], self.sizes["BV"]
        for blocks, makes_k, makes_v in walks:
            descriptors = blocks.descriptors and all(describable(x) for x in (q1, q2, self.d_out))
            tiles = ((self.d_out, BV), (q1, BD), (q2, BD))
            rows = [described(x, blocks.rows, width) if descriptors else x for x, width in tiles]
            parts = triton.cdiv(self.S, blocks.keys)
            _keys[(parts * self.B * self.G,)](
                rows[0], rows[1], k1, rows[2], k2, v, self.ranges, self.statistics,
                d_k[:, :, :, 0], d_k[:, :, :, -1], d_v, *self.strides, *d_k.stride()[:3], *d_v.stride()[:3],
                self.B, self.T, self.S, self.G, self.H // self.G, self.statistics.shape[3],
                self.scale * math.log2(math.e), self.scale,
                heads_in_wave(v.device, parts, blocks.warps), **self.flags, **self.sizes,
                DESCRIPTORS=descriptors, MAKES_K=makes_k, MAKES_V=makes_v, ROWS=blocks.rows, KEYS=blocks.keys,
                num_warps=blocks.warps, num_stages=blocks.stages,
            )  # fmt: skip
        return d_k, d_v


def backward(
    d_out: Tensor,
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
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
    """Gradients from what `forward` saved.

    Returns:
        of q1 and q2, (B, T, H, 2, D); of k1 and k2, (B, S, G, 2, D), or of the k of both maps (B, S, G, 1, D); of v; of
        λ, float32 (B, T, H). The two maps lie side by side, as the projections of a layer have them.
    """
    if d_out.stride(-1) != 1:
        d_out = d_out.contiguous()
    k1, k2, v = near_keys(k1, k2, v)
    if blocks is None:
        case = (chip_of(v.device), q1.shape[3], v.shape[3], k2 is k1)
        blocks = query_blocks(*case), key_walks(*case)
    for_queries, for_keys = blocks
    statistics, d_lam = row_statistics(d_out, lam, out, o2, lse)
    launches = Gradients(d_out, (q1, k1, q2, k2, v), statistics, causal=causal, scale=scale, queries=queries)
    d_q = launches.queries(for_queries)
    d_k, d_v = launches.keys(for_keys)
    return d_q, d_k, d_v, d_lam
