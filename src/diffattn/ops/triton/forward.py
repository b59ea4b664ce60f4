"""Forward pass of differential attention on a GPU.

    output = O1 − λ ∘ O2,   Oi = softmax(scale · qi kiᵀ) v

A program takes ROWS queries of one output head and walks over the keys. The maps cannot be subtracted before the
product with v as on a CPU: neither normaliser is known before the last key. So there are two accumulators, subtracted
in float32 at the end and rounded once. Two forms, of equal work:

    together   both maps of a tile of keys at once; a tile of values is loaded once and multiplied twice
    apart      a walk for each map, the second first; half the registers, for wide heads. O2 is rounded in between

Saved for the backward pass: the log-sum-exps of both maps in powers of two, float32 (2, B, H, T), +inf for a row that
sees no key, and O2 in the inputs' dtype, which makes the sums of the backward pass free (see `backward.py`).

Shape letters: B batch, T queries, S keys, H output heads, G groups, D width of q and k, DV width of v.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffattn.ops.triton.configs import Blocks, chip_of, forward_blocks, heads_in_wave
from diffattn.ops.triton.tiles import (
    LOWEST,
    keys_to_walk,
    matrix_of,
    rows_of,
    rows_of_program,
    seen_keys,
    softmax_step,
    store_rows,
    tile_of,
)

# No tile of queries or of keys is longer.
MOST_ROWS = 128


@triton.jit
def _walk_together(
    acc1, m1, l1, acc2, m2, l2, q1, q2, k1, k2, v, k1_s, k2_s, v_s, queries, t, b, g, low, high, B, T, S, c,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, RANGES: tl.constexpr, ONE_KEY: tl.constexpr, DESCRIPTORS: tl.constexpr,
    KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    for start in tl.range(low, high, KEYS):
        k = tile_of(k1, k1_s, b, g, start, S, MASKED, KEYS, D, BD, DESCRIPTORS)
        s1 = tl.dot(q1, tl.trans(k), input_precision="ieee")
        if not ONE_KEY:
            k = tile_of(k2, k2_s, b, g, start, S, MASKED, KEYS, D, BD, DESCRIPTORS)
        s2 = tl.dot(q2, tl.trans(k), input_precision="ieee")
        if MASKED:
            seen = seen_keys(t, start, queries, b, B, T, S, CAUSAL, RANGES, KEYS)
            s1 = tl.where(seen, s1, float("-inf"))
            s2 = tl.where(seen, s2, float("-inf"))
        values = tile_of(v, v_s, b, g, start, S, MASKED, KEYS, DV, BV, DESCRIPTORS)
        # The first product with the values runs beside the second softmax.
        p, m1, l1, shrink = softmax_step(s1, m1, l1, c)
        acc1 = tl.dot(p.to(values.dtype), values, acc1 * shrink[:, None], input_precision="ieee")
        p, m2, l2, shrink = softmax_step(s2, m2, l2, c)
        acc2 = tl.dot(p.to(values.dtype), values, acc2 * shrink[:, None], input_precision="ieee")
    return acc1, m1, l1, acc2, m2, l2


@triton.jit
def _walk(
    acc, m, total, q, k, v, k_s, v_s, queries, t, b, g, low, high, B, T, S, c,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, RANGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
    KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    for start in tl.range(low, high, KEYS):
        keys = tile_of(k, k_s, b, g, start, S, MASKED, KEYS, D, BD, DESCRIPTORS)
        s = tl.dot(q, tl.trans(keys), input_precision="ieee")
        if MASKED:
            s = tl.where(seen_keys(t, start, queries, b, B, T, S, CAUSAL, RANGES, KEYS), s, float("-inf"))
        values = tile_of(v, v_s, b, g, start, S, MASKED, KEYS, DV, BV, DESCRIPTORS)
        p, m, total, shrink = softmax_step(s, m, total, c)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return acc, m, total


@triton.jit
def _normalised(acc, m, total, c):
    """An accumulator divided by its sum, zeros where no key was seen, and the log-sum-exp in powers of two."""
    dead = total == 0.0
    o = acc / tl.where(dead, 1.0, total)[:, None]
    return o, tl.where(dead, float("inf"), m * c + tl.math.log2(total))


@triton.jit(do_not_specialize=["B", "T", "S", "H", "REP", "section", "lam_b", "lam_t", "lam_h"])
def _forward(
    q1, k1, q2, k2, v, lam, queries, out, o2, lse,
    q1_b, q1_t, q1_h, k1_b, k1_s, k1_g, q2_b, q2_t, q2_h, k2_b, k2_s, k2_g, v_b, v_s, v_g,
    lam_b, lam_t, lam_h, out_b, out_t, out_h,
    B, T, S, H, REP, c, section,
    CAUSAL: tl.constexpr, RANGES: tl.constexpr, ONE_KEY: tl.constexpr, SAVE: tl.constexpr, TOGETHER: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    start, head, b, h, g = rows_of_program(B, T, H, REP, section, ROWS)
    t = start + tl.arange(0, ROWS)
    low, full, high = keys_to_walk(queries, b, B, start, T, S, CAUSAL, RANGES, ROWS, KEYS)
    k1 = matrix_of(k1, b, g, k1_b, k1_g, DESCRIPTORS)
    k2 = matrix_of(k2, b, g, k2_b, k2_g, DESCRIPTORS)
    v = matrix_of(v, b, g, v_b, v_g, DESCRIPTORS)
    weight = tl.load(matrix_of(lam, b, h, lam_b, lam_h) + tl.cast(t, tl.int64) * lam_t, mask=t < T, other=0.0)
    m1, l1 = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    m2, l2 = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    q1, q2 = matrix_of(q1, b, h, q1_b, q1_h), matrix_of(q2, b, h, q2_b, q2_h)
    out, o2 = matrix_of(out, b, h, out_b, out_h), matrix_of(o2, b, h, out_b, out_h)
    if TOGETHER:
        a = rows_of(q1, start, q1_t, T, ROWS, D, BD)
        n = rows_of(q2, start, q2_t, T, ROWS, D, BD)
        acc1, acc2 = tl.zeros([ROWS, BV], tl.float32), tl.zeros([ROWS, BV], tl.float32)
        if not RANGES:
            acc1, m1, l1, acc2, m2, l2 = _walk_together(
                acc1, m1, l1, acc2, m2, l2, a, n, k1, k2, v, k1_s, k2_s, v_s, queries, t, b, g, low, full, B, T, S, c,
                False, CAUSAL, RANGES, ONE_KEY, DESCRIPTORS, KEYS, D, DV, BD, BV)  # fmt: skip
        acc1, m1, l1, acc2, m2, l2 = _walk_together(
            acc1, m1, l1, acc2, m2, l2, a, n, k1, k2, v, k1_s, k2_s, v_s, queries, t, b, g, full, high, B, T, S, c,
            True, CAUSAL, RANGES, ONE_KEY, DESCRIPTORS, KEYS, D, DV, BD, BV)  # fmt: skip
        noise, lse2 = _normalised(acc2, m2, l2, c)
        signal, lse1 = _normalised(acc1, m1, l1, c)
        if SAVE:
            store_rows(o2, start, out_t, T, noise, ROWS, DV, BV)
    else:
        a = rows_of(q2, start, q2_t, T, ROWS, D, BD)
        acc2 = tl.zeros([ROWS, BV], tl.float32)
        if not RANGES:
            acc2, m2, l2 = _walk(
                acc2, m2, l2, a, k2, v, k2_s, v_s, queries, t, b, g, low, full, B, T, S, c,
                False, CAUSAL, RANGES, DESCRIPTORS, KEYS, D, DV, BD, BV)  # fmt: skip
        acc2, m2, l2 = _walk(
            acc2, m2, l2, a, k2, v, k2_s, v_s, queries, t, b, g, full, high, B, T, S, c,
            True, CAUSAL, RANGES, DESCRIPTORS, KEYS, D, DV, BD, BV)  # fmt: skip
        noise, lse2 = _normalised(acc2, m2, l2, c)
        store_rows(o2, start, out_t, T, noise, ROWS, DV, BV)
        # Read back below by other threads than those that wrote it, perhaps.
        tl.debug_barrier()
        a = rows_of(q1, start, q1_t, T, ROWS, D, BD)
        acc1 = tl.zeros([ROWS, BV], tl.float32)
        if not RANGES:
            acc1, m1, l1 = _walk(
                acc1, m1, l1, a, k1, v, k1_s, v_s, queries, t, b, g, low, full, B, T, S, c,
                False, CAUSAL, RANGES, DESCRIPTORS, KEYS, D, DV, BD, BV)  # fmt: skip
        acc1, m1, l1 = _walk(
            acc1, m1, l1, a, k1, v, k1_s, v_s, queries, t, b, g, full, high, B, T, S, c,
            True, CAUSAL, RANGES, DESCRIPTORS, KEYS, D, DV, BD, BV)  # fmt: skip
        signal, lse1 = _normalised(acc1, m1, l1, c)
        noise = rows_of(o2, start, out_t, T, ROWS, DV, BV).to(tl.float32)
    store_rows(out, start, out_t, T, signal - weight[:, None] * noise, ROWS, DV, BV)
    if SAVE:
        row = tl.cast(head, tl.int64) * T + t
        tl.store(lse + row, lse1, mask=t < T)
        tl.store(lse + tl.cast(B * H, tl.int64) * T + row, lse2, mask=t < T)


def padded(width: int) -> int:
    """The power of two that a tile of this width takes, 16 at least."""
    return max(16, int(triton.next_power_of_2(width)))


def describable(x: Tensor) -> bool:
    """Tells whether the copy engine takes tiles of (B, S, G, width): whole 16-byte steps, the last dimension dense.

    Its manual names no steps of 0 and no tensors without elements, so those are left to pointers.
    """
    step = 16 // x.element_size()
    steps = x.stride(-1) == 1 and all(n > 0 and n % step == 0 for n in x.stride()[:3])
    return steps and x.data_ptr() % 16 == 0 and x.numel() > 0


def described(x: Tensor, rows: int, block: int) -> object:
    """A descriptor of (B, S, G, width) as (B, G, S, width), whose tiles are `rows` rows of one head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = x.transpose(1, 2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, block])


def near_keys(k1: Tensor, k2: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the three, copied where their rows lie so far apart that 32 bits do not reach through one tile."""
    near1, near2, near_v = (x if x.stride(1) * MOST_ROWS < 2**31 else x.contiguous() for x in (k1, k2, v))
    return near1, near1 if k2 is k1 else near2, near_v


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

    The last dimension of every input is dense. `lam` is float32 (B, T, H), by strides. `queries`, int32 (2, B, S)
    contiguous, replaces `causal`: query t sees key s where ``queries[0, b, s] <= t < queries[1, b, s]``. The same
    tensor object as k1 and k2 reads the keys once.
    """
    B, T, H, D = q1.shape
    S, G, DV = k1.shape[1], k1.shape[2], v.shape[3]
    k1, k2, v = near_keys(k1, k2, v)
    one_key = k2 is k1
    if blocks is None:
        blocks = forward_blocks(chip_of(v.device), D, DV, one_key)
    BD, BV = padded(D), padded(DV)
    out = v.new_empty(B, T, H, DV)
    o2 = torch.empty_like(out) if save or not blocks.together else None
    # Where O2 is written anyway, the code for ranges that keeps the log-sum-exps too spills a tenth on Hopper.
    keep = save or (queries is not None and not blocks.together)
    lse = torch.empty(2, B, H, T, dtype=torch.float32, device=v.device) if keep else None
    descriptors = blocks.descriptors and all(describable(x) for x in (k1, k2, v))
    keys = [described(x, blocks.keys, w) if descriptors else x for x, w in ((k1, BD), (k2, BD), (v, BV))]
    parts = triton.cdiv(T, blocks.rows)
    _forward[(parts * B * H,)](
        q1, keys[0], q2, keys[1], keys[2], lam, queries, out, out if o2 is None else o2, lse,
        *q1.stride()[:3], *k1.stride()[:3], *q2.stride()[:3], *k2.stride()[:3], *v.stride()[:3],
        *lam.stride(), *out.stride()[:3],
        B, T, S, H, H // G, scale * math.log2(math.e), heads_in_wave(v.device, parts, blocks.warps),
        CAUSAL=causal, RANGES=queries is not None, ONE_KEY=one_key, SAVE=keep, TOGETHER=blocks.together,
        DESCRIPTORS=descriptors, ROWS=blocks.rows, KEYS=blocks.keys, D=D, DV=DV, BD=BD, BV=BV,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return (out, o2, lse) if save else (out, None, None)
