"""Masks of the compiled kernel: padding anywhere, rows without keys, and `first_query`, the mask of static caches."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from comparison import NAMES, Inputs, compare, forward_and_gradients, make_inputs, rounding_floors
from fused_cases import CASES, both_dtypes, holes, padded, require_kernel
from torch import Tensor

from diffattn.ops.fused_cpu import first_visible_query, fused_cpu_diff_attention
from diffattn.ops.reference import as_lam, visible_keys


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


def check_first_query(first_query: Tensor, inputs: Inputs) -> None:
    """The kernel under `first_query` against the definition under the boolean mask that it stands for."""
    T = inputs.q1.shape[1]
    visible = first_query[:, None, :] <= torch.arange(T)[None, :, None]
    definition = attention_of(visible)

    def kernel(*args: Tensor, **options: object) -> Tensor:
        return fused_cpu_diff_attention(*args, first_query=first_query)

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


def static_cache(T: int, S: int, past: list[int]) -> Tensor:
    """Each sequence has `past` keys, then those of its T queries; the rest of the cache's S places is not filled."""
    position = torch.arange(S, dtype=torch.int32)[None, :]
    first = position - torch.tensor(past, dtype=torch.int32)[:, None]
    return torch.where(first >= T, torch.tensor(2**31 - 1, dtype=torch.int32), first)


@both_dtypes
@pytest.mark.parametrize("one_key", [False, True], ids=["V1", "V2"])
@pytest.mark.parametrize(
    ("queries", "keys", "past"),
    [(1, 16, [0, 9]), (1, 700, [3, 600]), (5, 48, [11, 0]), (13, 160, [0, 130]), (70, 400, [1, 257])],
)
def test_static_cache(queries: int, keys: int, past: list[int], one_key: bool, dtype: torch.dtype) -> None:
    x = make_inputs(T=queries, S=keys, H=4, G=2, one_key=one_key, dtype=dtype)
    first = static_cache(queries, keys, past)
    check_first_query(first, x)
    # The same bits as a cache of just those keys, where the mask is none but causal.
    for b, filled in enumerate(past):
        S = filled + queries
        one = [t[b : b + 1] for t in x[:6]]
        short = [one[0], one[1][:, :S], one[2], one[1][:, :S] if one_key else one[3][:, :S], one[4][:, :S], one[5]]
        compare_bits = fused_cpu_diff_attention(*one, first_query=first[b : b + 1])
        torch.testing.assert_close(compare_bits, fused_cpu_diff_attention(*short))


@both_dtypes
@pytest.mark.parametrize("queries", [2, 8, 9, 33, 64, 97])
def test_any_first_query(queries: int, dtype: torch.dtype) -> None:
    """Random: keys that every query sees, that none sees, negative numbers, any order."""
    generator = torch.Generator().manual_seed(queries)
    for keys in (1, 31, 133, 300):
        first = torch.randint(-5, queries + 9, (2, keys), dtype=torch.int32, generator=generator)
        first[0, torch.rand(keys, generator=generator) < 0.3] = 2**31 - 1
        first[1, keys // 2] = -(2**31)
        check_first_query(first, make_inputs(T=queries, S=keys, H=2, G=1, dtype=dtype))


@both_dtypes
@pytest.mark.parametrize("queries", [3, 40])
def test_first_query_of_none_and_of_all(queries: int, dtype: torch.dtype) -> None:
    x = make_inputs(T=queries, S=50, dtype=dtype)
    nothing = torch.full((2, 50), queries, dtype=torch.int32)
    check_first_query(nothing, x)
    everything = torch.zeros(2, 50, dtype=torch.int32)
    seen = fused_cpu_diff_attention(*x[:6], first_query=everything)
    assert seen.equal(fused_cpu_diff_attention(*x[:6], causal=False))
    # It replaces the other masks.
    assert seen.equal(fused_cpu_diff_attention(*x[:6], first_query=everything, key_padding=padded(50, 3, 3)))


@pytest.mark.parametrize("causal", [False, True])
def test_first_visible_query_is_the_mask(causal: bool) -> None:
    for queries, keys in ((1, 1), (4, 9), (9, 9)):
        padding = padded(keys, keys // 2, keys // 3)
        first = first_visible_query(queries, keys, causal, padding)
        assert first.dtype == torch.int32
        visible = first[:, None, None, :] <= torch.arange(queries)[None, None, :, None]
        wanted = visible_keys(queries, keys, causal, padding, padding.device)
        assert visible.equal(wanted.expand_as(visible))


def test_first_query_need_not_be_contiguous() -> None:
    x = make_inputs(T=20, S=50)
    first = static_cache(20, 50, [3, 29])
    want = fused_cpu_diff_attention(*x[:6], first_query=first)
    for strided in (first.t().contiguous().t(), torch.stack([first, first], -1)[..., 1]):
        assert not strided.is_contiguous()
        assert fused_cpu_diff_attention(*x[:6], first_query=strided).equal(want)
    same = first[:1].expand(2, 50)
    want = fused_cpu_diff_attention(*x[:6], first_query=same.contiguous())
    assert fused_cpu_diff_attention(*x[:6], first_query=same).equal(want)
