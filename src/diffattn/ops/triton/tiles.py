"""The parts that the Triton kernels share: tiles of strided tensors, visibility, the order of programs.

Triton reads these functions as part of the kernels. Rules that they and the kernels keep, each for a reason:

- only loaded tiles are transposed, never computed ones: Triton 3.4 to 3.7.0 miscompiles those on Hopper;
- offsets of a sequence and of a row are 64-bit: index times stride passes 2³¹ in ordinary caches;
- a row's maximum starts at a finite number, so that a row without keys never meets −inf − (−inf).
"""

import triton
import triton.language as tl

# Below every score that means something, and finite.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def place(program, blocks, heads, section):
    """Returns the block and the head (of batch × heads) of a program: blocks descend, the longest causal rows first.

    `section` heads take turns before the next ones begin: as many as the card computes at once, which share its cache.
    """
    first = program // (section * blocks) * section
    here = tl.minimum(section, heads - first)
    rest = program - first * blocks
    return blocks - 1 - rest // here, first + rest % here


@triton.jit
def rows_of_program(B, T, H, REP, section, ROWS: tl.constexpr):
    """Returns the first query of this program, its head of batch × heads, and of that the sequence, head and group."""
    block, head = place(tl.program_id(0), tl.cdiv(T, ROWS), B * H, section)
    h = head % H
    return block * ROWS, head, head // H, h, h // REP


@triton.jit
def matrix_of(x, b, head, stride_b, stride_head, DESCRIPTORS: tl.constexpr = False):
    """The rows of one sequence and head. A descriptor stands for all of them, and `tile_of` names the two."""
    if not DESCRIPTORS:
        x += tl.cast(b, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_head
    return x


@triton.jit
def rows_of(base, start, stride, limit, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows start … start + ROWS of a matrix, (ROWS, BLOCK), with zeros behind its width.

    Behind the last row that row again: no predicate on every load. Whoever uses the tile gives those rows no weight.
    """
    row, column = tl.minimum(start + tl.arange(0, ROWS), limit - 1), tl.arange(0, BLOCK)
    pointers = base + (tl.cast(row, tl.int64) * stride)[:, None] + column[None, :]
    if WIDTH < BLOCK:  # noqa: SIM108
        tile = tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def tile_of(x, stride, b, head, start, limit, EDGE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
            BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr):  # fmt: skip
    """Reads the same inside a loop: by the copy engine where x describes (B, heads, rows, width), else by pointers.

    Only where EDGE is set may the tile reach behind the last row. The copy engine fills with zeros there.
    """
    if DESCRIPTORS:
        tile = x.load([b, head, start, 0]).reshape(ROWS, BLOCK)
    elif EDGE:
        tile = rows_of(x, start, stride, limit, ROWS, WIDTH, BLOCK)
    else:
        row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
        pointers = x + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
        if WIDTH < BLOCK:  # noqa: SIM108
            tile = tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(base, start, stride, limit, values, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Writes (ROWS, BLOCK) values to rows start … of a matrix, less what lies behind its last row and its width."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    pointers = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    inside = row[:, None] < limit - start
    if WIDTH < BLOCK:
        inside = inside & (column[None, :] < WIDTH)
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def softmax_step(s, m, total, c):
    """One tile of an online softmax: exponentials, the new maximum and sum, and by what the sum so far shrinks."""
    higher = tl.maximum(m, tl.max(s, 1))
    p = tl.math.exp2(s * c - (higher * c)[:, None])
    shrink = tl.math.exp2((m - higher) * c)
    return p, higher, total * shrink + tl.sum(p, 1), shrink


@triton.jit
def queries_of(queries, sequence, batches, start, S, KEYS: tl.constexpr):
    """The first query that sees each of KEYS keys, and the query behind the last; keys behind S are seen by none."""
    key = start + tl.arange(0, KEYS)
    at = queries + tl.cast(sequence, tl.int64) * S + key
    first = tl.load(at, mask=key < S, other=2147483647)
    end = tl.load(at + tl.cast(batches, tl.int64) * S, mask=key < S, other=0)
    return first, end


@triton.jit
def keys_in_reach(queries, sequence, batches, t_low, t_high, begin, behind, S, CHUNK: tl.constexpr):
    """Bounds of those of the keys begin … behind − 1 that any of the queries t_low … t_high − 1 may see.

    Where none does, the first bound is the greater one. Of the last CHUNK keys some may lie behind.
    """
    low, high = S, 0
    for start in range(begin, behind, CHUNK):
        first, end = queries_of(queries, sequence, batches, start, S, CHUNK)
        key = start + tl.arange(0, CHUNK)
        seen = (first < t_high) & (end > t_low) & (first < end)
        low = tl.minimum(low, tl.min(tl.where(seen, key, S), 0))
        high = tl.maximum(high, tl.max(tl.where(seen, key + 1, 0), 0))
    return low, high


@triton.jit
def keys_to_walk(queries, b, B, start, T, S, CAUSAL: tl.constexpr, RANGES: tl.constexpr,
                 ROWS: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """Bounds low, full, high: of the keys from low to full ROWS queries see every one, of those up to high some."""
    if RANGES:
        low, high = keys_in_reach(queries, b, B, start, tl.minimum(start + ROWS, T), 0, S, S, 1024)
        low = low // KEYS * KEYS
        full = low
    else:
        low, high, full = 0, S, S // KEYS * KEYS
        if CAUSAL:
            high = tl.minimum(S, S - T + start + ROWS)
            full = tl.minimum(S, S - T + start + 1) // KEYS * KEYS
    return low, full, high


@triton.jit
def seen_keys(t, start, queries, b, B, T, S, CAUSAL: tl.constexpr, RANGES: tl.constexpr, KEYS: tl.constexpr):
    """Returns which of KEYS keys each query sees."""
    key = start + tl.arange(0, KEYS)
    if RANGES:
        first, end = queries_of(queries, b, B, start, S, KEYS)
        seen = (first[None, :] <= t[:, None]) & (t[:, None] < end[None, :])
    elif CAUSAL:
        seen = key[None, :] <= (S - T + t)[:, None]
    else:
        seen = (key < S)[None, :]
    return seen
