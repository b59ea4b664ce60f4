"""Masks of the compiled kernel: padding anywhere, rows without keys, and `queries`: static caches and packed rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support.backends import fused_cpu_diff_attention
from support.comparison import NAMES, Inputs, compare, forward_and_gradients, make_inputs, rounding_floors
from support.fused_cases import CASES, both_dtypes, holes, padded, require_kernel
from torch import Tensor

from diffattn.ops.reference import as_lam, diff_attention_reference
from diffattn.ops.visibility import seeing_queries, visible_keys


@pytest.fixture(autouse=True)
def _kernel(request: pytest.FixtureRequest) -> None:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    require_kernel(parameters.get("dtype", torch.float32))


def attention_of(visible: Tensor) -> Callable[..., Tensor]:
    """The definition under any boolean mask (B, T, S), True where query t sees key s."""

    def softmax_map(q: Tensor, k: Tensor) -> Tensor:
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
        return scores.softmax(-1).masked_fill(~visible[:, None], 0.0)

    def attention(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor, **options: object) -> Tensor:
        lam = as_lam(lam, v).expand(q1.shape[:3]).transpose(1, 2)[..., None]
        difference = (softmax_map(q1, k1) - lam * softmax_map(q2, k2)).to(v.dtype)
        return torch.einsum("bhts,bshe->bthe", difference, v.repeat_interleave(q1.shape[2] // v.shape[2], dim=2))

    return attention


def visible_of(queries: Tensor, T: int) -> Tensor:
    """The boolean mask (B, T, S) that ranges of queries (2, B, S) stand for."""
    first, end = queries[:, :, None, :]
    t = torch.arange(T)[None, :, None]
    return (first <= t) & (t < end)


def check_queries(queries: Tensor, inputs: Inputs) -> None:
    """The kernel under `queries` against the definition under the boolean mask that they stand for."""
    visible = visible_of(queries, inputs.q1.shape[1])
    definition = attention_of(visible)

    def kernel(*args: Tensor, **options: object) -> Tensor:
        return fused_cpu_diff_attention(*args, queries=queries)

    actual = forward_and_gradients(kernel, inputs)
    expected = forward_and_gradients(definition, inputs.to(torch.float64))
    eager = forward_and_gradients(definition, inputs)
    floors = rounding_floors(definition, inputs)
    compare(actual[:1], expected[:1], eager[:1], floors=floors[:1])
    compare(actual[1:], expected[1:], eager[1:], factor=3.0, names=NAMES[1:], floors=floors[1:])
    dead = ~visible.any(-1)
    for i in (0, 1, 3, 6):
        assert actual[i][dead].eq(0).all()
    unseen = ~visible.any(1)
    for i in (2, 4, 5):
        assert actual[i][unseen].eq(0).all()


PADDED = [case for case in CASES if CASES[case].get("key_padding") is not None]


@both_dtypes
@pytest.mark.parametrize("case", PADDED)
def test_rows_without_keys_are_zero_and_nothing_is_nan(case: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype=dtype, **CASES[case])
    B, T = inputs.q1.shape[:2]
    visible = visible_keys(T, inputs.k1.shape[1], inputs.causal, inputs.key_padding, inputs.v.device)[:, 0]
    dead = ~visible.expand(B, T, -1).any(-1)
    output, *gradients = forward_and_gradients(fused_cpu_diff_attention, inputs)
    assert output[dead].eq(0).all()
    assert output[~dead].ne(0).any(-1).all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    for i in (0, 2, 5):
        assert gradients[i][dead].eq(0).all()
    for i in (1, 3, 4):
        assert inputs.key_padding is not None
        assert gradients[i][inputs.key_padding].eq(0).all()


@both_dtypes
@pytest.mark.parametrize("queries", [3, 40, 150])
def test_what_padding_holds_does_not_matter(queries: int, dtype: torch.dtype) -> None:
    """Other numbers in padding keys and values change no bit of the output, and none of the other gradients."""
    S = queries + 131
    padding = padded(S, 130, 17) | holes(S, (140, 145))
    x = make_inputs(T=queries, S=S, H=2, G=1, key_padding=padding, dtype=dtype)
    other = make_inputs(T=queries, S=S, H=2, G=1, dtype=dtype, seed=7)
    where = padding[:, :, None, None]
    changed = x._replace(**{n: torch.where(where, 1e4 * getattr(other, n), getattr(x, n)) for n in ("k1", "k2", "v")})
    for got, want in zip(
        forward_and_gradients(fused_cpu_diff_attention, changed),
        forward_and_gradients(fused_cpu_diff_attention, x),
        strict=True,
    ):
        assert got.equal(want)


def ranges(first: Tensor, end: Tensor | int) -> Tensor:
    return torch.stack(torch.broadcast_tensors(first, torch.as_tensor(end))).to(torch.int32)


def static_cache(T: int, S: int, past: list[int]) -> Tensor:
    """Each sequence has `past` keys, then those of its T queries; the rest of the cache's S places is not filled."""
    return ranges(torch.arange(S)[None, :] - torch.tensor(past)[:, None], T)


@both_dtypes
@pytest.mark.parametrize("one_key", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize(
    ("queries", "keys", "past"),
    [(1, 16, [0, 9]), (1, 700, [3, 600]), (5, 48, [11, 0]), (13, 160, [0, 130]), (70, 400, [1, 257])],
)
def test_static_cache(queries: int, keys: int, past: list[int], one_key: bool, dtype: torch.dtype) -> None:
    x = make_inputs(T=queries, S=keys, H=4, G=2, one_key=one_key, dtype=dtype)
    seeing = static_cache(queries, keys, past)
    check_queries(seeing, x)
    # The same bits as a cache of just those keys, where the mask is none but causal.
    for b, filled in enumerate(past):
        S = filled + queries
        one = [t[b : b + 1] for t in x[:6]]
        short = [one[0], one[1][:, :S], one[2], one[1][:, :S] if one_key else one[3][:, :S], one[4][:, :S], one[5]]
        compare_bits = fused_cpu_diff_attention(*one, queries=seeing[:, b : b + 1])
        torch.testing.assert_close(compare_bits, fused_cpu_diff_attention(*short))


@both_dtypes
@pytest.mark.parametrize("queries", [2, 8, 9, 33, 64, 97])
def test_any_ranges(queries: int, dtype: torch.dtype) -> None:
    """Random: keys that every query sees, that none sees, ends before the first, any numbers in any order."""
    generator = torch.Generator().manual_seed(queries)

    def numbers(keys: int) -> Tensor:
        return torch.randint(-5, queries + 9, (2, keys), dtype=torch.int32, generator=generator)

    for keys in (1, 31, 133, 300):
        first, end = numbers(keys), numbers(keys)
        # Half of them are no range that can be empty: their end lies behind their first.
        end = torch.where(torch.rand(2, keys, generator=generator) < 0.5, first + end.abs(), end)
        first[0, torch.rand(keys, generator=generator) < 0.3] = 2**31 - 1
        first[1, keys // 2], end[1, keys // 2] = -(2**31), 2**31 - 1
        end[1, torch.rand(keys, generator=generator) < 0.1] = -(2**31)
        check_queries(ranges(first, end), make_inputs(T=queries, S=keys, H=2, G=1, dtype=dtype))


@both_dtypes
@pytest.mark.parametrize("queries", [3, 40])
def test_ranges_of_no_query_and_of_every_query(queries: int, dtype: torch.dtype) -> None:
    x = make_inputs(T=queries, S=50, dtype=dtype)
    every = torch.zeros(2, 50, dtype=torch.int32)
    for nothing in (ranges(every + queries, queries), ranges(every, 0), ranges(every + 2, 2), ranges(every + 2, 1)):
        check_queries(nothing, x)
    everything = ranges(every, queries)
    seen = fused_cpu_diff_attention(*x[:6], queries=everything)
    assert seen.equal(fused_cpu_diff_attention(*x[:6], causal=False))
    # It replaces the other masks.
    assert seen.equal(fused_cpu_diff_attention(*x[:6], queries=everything, key_padding=padded(50, 3, 3)))


@pytest.mark.parametrize("causal", [False, True])
def test_seeing_queries_are_the_mask(causal: bool) -> None:
    for queries, keys in ((1, 1), (4, 9), (9, 9)):
        padding = padded(keys, keys // 2, keys // 3)
        seeing = seeing_queries(queries, keys, causal, padding)
        assert seeing.dtype == torch.int32
        wanted = visible_keys(queries, keys, causal, padding, padding.device)
        assert visible_of(seeing, queries)[:, None].equal(wanted.expand(2, 1, queries, keys))


def test_ranges_need_not_be_contiguous() -> None:
    x = make_inputs(T=20, S=50)
    seeing = static_cache(20, 50, [3, 29])
    want = fused_cpu_diff_attention(*x[:6], queries=seeing)
    for strided in (seeing.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([seeing, seeing], -1)[..., 1]):
        assert not strided.is_contiguous()
        assert fused_cpu_diff_attention(*x[:6], queries=strided).equal(want)
    same = seeing[:, :1].expand(2, 2, 50)
    want = fused_cpu_diff_attention(*x[:6], queries=same.contiguous())
    assert fused_cpu_diff_attention(*x[:6], queries=same).equal(want)


# Lengths of the sequences that two rows are packed from: within a tile, over tiles, one token long, all of one row.
PACKED = {
    "decoding": ([3, 1, 4], [5, 3]),
    "short": ([5, 9, 7, 1, 11], [33]),
    "blocks of 64 rows": ([64, 64, 64], [1, 63, 65, 63]),
    "several tiles": ([130, 3, 257, 70, 140], [1, 599]),
}


def packed(*rows: list[int]) -> Tensor:
    """Key s is seen from query s to the end of its sequence."""
    ends = [torch.tensor(row).cumsum(0).repeat_interleave(torch.tensor(row)) for row in rows]
    end = torch.stack(ends)
    return ranges(torch.arange(end.shape[1]), end)


@both_dtypes
@pytest.mark.parametrize("one_key", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize("case", PACKED)
def test_packed_rows(case: str, one_key: bool, dtype: torch.dtype) -> None:
    queries = packed(*PACKED[case])
    T = queries.shape[-1]
    x = make_inputs(T=T, H=2, G=1, D=8, Dv=12, one_key=one_key, dtype=dtype)
    check_queries(queries, x)
    # Each sequence alone, with every gradient.
    whole = forward_and_gradients(lambda *args, **options: fused_cpu_diff_attention(*args, queries=queries), x)
    wide = x.to(torch.float64)
    for b, lengths in enumerate(PACKED[case]):
        start = 0
        for length in lengths:
            own = (slice(b, b + 1), slice(start, start + length))
            part = Inputs(*(t[own] for t in wide[:6]))
            if one_key:
                part = part._replace(k2=part.k1)
            cotangent = torch.randn(whole[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)[own]
            leaves = [t.clone().requires_grad_() for t in part[:6]]
            leaves[3] = leaves[1] if one_key else leaves[3]
            output = diff_attention_reference(*leaves)
            alone = [output, *torch.autograd.grad(output, leaves, cotangent.double())]
            for got, want in zip(whole, alone, strict=True):
                allowed = (2e-6 if dtype == torch.float32 else 2e-2) * max(1.0, want.abs().max().item())
                torch.testing.assert_close(got[own].double(), want, rtol=0, atol=allowed)
            start += length


@pytest.mark.parametrize("case", PACKED)
def test_a_kernel_that_ignores_where_a_sequence_ends_is_found_out(case: str) -> None:
    queries = packed(*PACKED[case])
    x = make_inputs(T=queries.shape[-1], H=2, G=1)
    for wrong in (ranges(queries[0], queries.shape[-1]), ranges(queries[0], queries[1] + 1)):
        definition = attention_of(visible_of(queries, x.q1.shape[1]))
        output = fused_cpu_diff_attention(*x[:6], queries=wrong)
        with pytest.raises(AssertionError, match="max error"):
            compare(output, definition(*x.to(torch.float64)[:6]), definition(*x[:6]))


@torch.no_grad()
def test_a_block_reads_only_the_keys_that_its_queries_see() -> None:
    """What the other sequences of a row hold, infinities and NaN, is never multiplied where a whole tile is theirs."""
    x = make_inputs(B=1, T=512, H=2, G=1, D=8, Dv=8)
    queries = packed([128, 256, 128])
    want = fused_cpu_diff_attention(*x[:6], queries=queries)
    for t in (x.k1, x.k2, x.v):
        t[:, 128:384] = float("nan")
    got = fused_cpu_diff_attention(*x[:6], queries=queries)
    for own in (slice(0, 128), slice(384, 512)):
        assert got[:, own].equal(want[:, own])
