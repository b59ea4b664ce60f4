"""The one-call form against the definition: output and every gradient, over shapes and masks that have gone wrong."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backends import standard_diff_attention
from support.comparison import Inputs, compare_forward_and_gradients, forward_and_gradients, make_inputs
from support.known_wrong import KNOWN_WRONG, assert_rejects_known_wrong
from torch import Tensor

from diffattn.ops.reference import diff_attention_reference
from diffattn.ops.standard import pad_queries, subtract


def padded(keys: int, left: int, right: int) -> Tensor:
    """Two sequences: the first has `left` padding keys in front, the second `right` behind."""
    key_padding = torch.zeros(2, keys, dtype=torch.bool)
    key_padding[0, :left] = True
    key_padding[1, keys - right :] = True
    return key_padding


CASES: dict[str, dict[str, Any]] = {
    "T = S": {},
    "T < S": {"S": 11},
    "non-causal": {"S": 11, "causal": False},
    "non-causal, T > S": {"T": 11, "S": 7, "causal": False},
    "padded": {"S": 11, "key_padding": padded(11, 3, 2)},
    "padded, T = S: rows without keys": {"T": 11, "key_padding": padded(11, 3, 2)},
    "a sequence of padding": {"S": 11, "key_padding": padded(11, 11, 0)},
    "non-causal, a sequence of padding": {"S": 11, "causal": False, "key_padding": padded(11, 2, 11)},
    "63 queries, Dv = 2D": {"T": 63, "D": 16, "Dv": 32},
    "63 queries over 111 keys": {"T": 63, "S": 111, "D": 17, "Dv": 31},
    "v narrower than k": {"T": 13, "D": 11, "Dv": 3},
    "one group": {"G": 1},
    "no groups": {"G": 6},
    "T = 1": {"T": 1, "S": 13},
    "T = 1, padded": {"T": 1, "S": 13, "key_padding": padded(13, 5, 3)},
    "S = 1": {"T": 1, "S": 1},
    "scale": {"scale": 0.9},
    "more keys than one block of a kernel": {"B": 1, "T": 557, "H": 2, "G": 1, "D": 7, "Dv": 13},
    "V2": {"one_key": True},
    "V2, T < S, padded": {"one_key": True, "S": 11, "key_padding": padded(11, 3, 2)},
    "V2, Dv = D": {"one_key": True, "T": 63, "D": 16, "Dv": 16},
    "two signal heads to a noise head": {"S": 11, "H": 12, "noise_heads": 6},
    "four to one, V2": {"S": 11, "H": 8, "noise_heads": 2, "G": 2, "one_key": True},
    "five to one, padded": {"S": 11, "H": 10, "noise_heads": 2, "G": 1, "key_padding": padded(11, 3, 2)},
}


def nearly_equal_maps(x: Inputs) -> Inputs:
    """q2 ≈ q1, k2 ≈ k1 and λ = 0.999: the output is a thousandth of what it is the difference of."""
    nudge = make_inputs(*x.q1.shape[:2], x.k1.shape[1], *x.q1.shape[2:3], *x.k1.shape[2:], dtype=x.v.dtype, seed=5)
    k2 = x.k1 if x.k2 is x.k1 else x.k1 + 0.01 * nudge.k1
    return x._replace(q2=x.q1 + 0.01 * nudge.q1, k2=k2, lam=torch.full_like(x.lam, 0.999))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype=dtype, **CASES[case])
    compare_forward_and_gradients(standard_diff_attention, diff_attention_reference, inputs)
    assert_rejects_known_wrong(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["T = S", "T < S", "padded", "63 queries over 111 keys", "V2"])
def test_nearly_equal_maps(case: str, dtype: torch.dtype) -> None:
    inputs = nearly_equal_maps(make_inputs(dtype=dtype, **CASES[case]))
    compare_forward_and_gradients(standard_diff_attention, diff_attention_reference, inputs)
    # In bfloat16 the rounding of two maps is larger than their difference here, whatever computes it.
    if dtype == torch.float32:
        assert_rejects_known_wrong(inputs)


def test_every_known_wrong_is_rejected_by_one_of_two_cases() -> None:
    cases = ({"S": 11}, {"T": 5, "S": 17, "H": 12, "noise_heads": 6, "G": 3, "window": 4})
    rejected = {name for case in cases for name in assert_rejects_known_wrong(make_inputs(**case))}
    assert rejected == {wrong.name for wrong in KNOWN_WRONG}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    B, T, G, causal = draw(1, 3), draw(1, 9), draw(1, 3), data.draw(st.booleans())
    noise_heads = G * draw(1, 3)
    S = T + draw(0, 5) if causal else draw(1, 12)
    key_padding = data.draw(st.none() | st.lists(st.booleans(), min_size=B * S, max_size=B * S))
    inputs = make_inputs(
        B, T, S, noise_heads * draw(1, 3), G, draw(1, 6), draw(1, 12), noise_heads=noise_heads,
        one_key=data.draw(st.booleans()), causal=causal, window=data.draw(st.none() | st.integers(1, 5)),
        key_padding=None if key_padding is None else torch.tensor(key_padding).view(B, S), seed=draw(0, 99),
    )  # fmt: skip
    compare_forward_and_gradients(standard_diff_attention, diff_attention_reference, inputs)


@pytest.mark.parametrize("one_key", [False, True], ids=["V1", "V2"])
def test_strided_inputs(one_key: bool) -> None:
    """Heads first in memory, as after RoPE, and a last dimension that is not contiguous."""
    x = make_inputs(S=11, one_key=one_key)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x[:5]]
    width_second = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in x[:5]]
    for q1, k1, q2, k2, v in (heads_first, width_second):
        strided = Inputs(q1, k1, q2, k1 if one_key else k2, v, x.lam)
        assert not strided.q1.is_contiguous()
        compare_forward_and_gradients(standard_diff_attention, diff_attention_reference, strided)


@pytest.mark.parametrize("case", ["padded, T = S: rows without keys", "a sequence of padding", "V2, T < S, padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rows_without_keys_are_zero_and_nothing_is_nan(case: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype=dtype, **CASES[case])
    dead = diff_attention_reference(*inputs[:6], **inputs.options).eq(0).all(dim=-1).all(dim=-1)
    output, *gradients = forward_and_gradients(standard_diff_attention, inputs)
    assert output[dead].eq(0).all()
    assert output[~dead].ne(0).any(-1).all()
    for gradient in gradients:
        assert gradient.isfinite().all()
    for i in (0, 2, 5):
        assert gradients[i][dead].eq(0).all()


@pytest.mark.parametrize("case", CASES)
def test_makes_exactly_one_standard_call(case: str) -> None:
    inputs = make_inputs(**CASES[case])
    original = F.scaled_dot_product_attention
    with mock.patch.object(F, "scaled_dot_product_attention", side_effect=original) as call:
        standard_diff_attention(*inputs[:6], **inputs.options)
    assert call.call_count == 1
    q, k, v = call.call_args.args
    assert (q.shape[1], k.shape[1]) == (inputs.q1.shape[2] + inputs.q2.shape[2], inputs.k1.shape[2])
    key_width = inputs.q1.shape[-1] * (1 if inputs.k1 is inputs.k2 else 2)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] == max(key_width, inputs.v.shape[-1])
    T, S = inputs.q1.shape[1], inputs.k1.shape[1]
    needs_mask = inputs.key_padding is not None or (inputs.causal and 1 < T < S)
    assert (call.call_args.kwargs["attn_mask"] is not None) == needs_mask
    assert call.call_args.kwargs["is_causal"] == (inputs.causal and T == S and not needs_mask)


@pytest.mark.parametrize("signals", [1, 2, 5])
def test_groups_are_padded_and_subtracted(signals: int) -> None:
    """[s … s n]: each signal head meets the first half of a key, its noise head the second, and is subtracted."""
    n, d = 3 * (signals + 1), 2
    q = torch.randn(1, 2, n, d, dtype=torch.float64, requires_grad=True)
    noise = torch.arange(n) % (signals + 1) == signals
    padded_q = pad_queries(q, signals)
    assert padded_q[..., ~noise, :].equal(torch.cat([q[..., ~noise, :], torch.zeros(1, 2, 3 * signals, d)], -1))
    assert padded_q[..., noise, :].equal(torch.cat([torch.zeros(1, 2, 3, d), q[..., noise, :]], -1))
    for shape in ((), (1,), (3 * signals,), (2, 1), (1, 2, 3 * signals)):
        lam = torch.rand(shape, dtype=torch.float64, requires_grad=True)
        full = lam.expand(1, 2, 3 * signals)[..., None]
        want = q[..., ~noise, :] - full * q[..., noise, :].repeat_interleave(signals, 2)
        torch.testing.assert_close(subtract(q, lam, signals), want)
        assert torch.autograd.gradcheck(lambda o, lam: subtract(o, lam, signals), (q, lam))
    assert torch.autograd.gradcheck(lambda q: pad_queries(q, signals), q)


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4, 5), (0, 3, 4, 5)])
def test_pad_queries(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    padded_q, d = pad_queries(q), shape[-1]
    assert padded_q.shape == (*shape[:-1], 2 * d)
    assert padded_q[..., 0::2, :d].equal(q[..., 0::2, :])
    assert padded_q[..., 1::2, d:].equal(q[..., 1::2, :])
    assert padded_q[..., 0::2, d:].eq(0).all()
    assert padded_q[..., 1::2, :d].eq(0).all()
    assert torch.autograd.gradcheck(pad_queries, q)


def test_pad_queries_keeps_an_infinity_in_its_half() -> None:
    assert pad_queries(torch.tensor([[float("inf")], [1.0]])).tolist() == [[float("inf"), 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("lam_shape", [(), (3,), (5, 3), (2, 1, 3), (2, 5, 3)])
def test_subtract(lam_shape: tuple[int, ...]) -> None:
    o = torch.randn(2, 5, 6, 7, dtype=torch.float64, requires_grad=True)
    lam = torch.rand(lam_shape, dtype=torch.float64, requires_grad=True)
    want = torch.stack([o[:, :, 2 * i] - lam.expand(2, 5, 3)[:, :, i, None] * o[:, :, 2 * i + 1] for i in range(3)], 2)
    torch.testing.assert_close(subtract(o, lam), want)
    assert torch.autograd.gradcheck(subtract, (o, lam))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_subtract_is_exact_where_half_precision_would_cancel(dtype: torch.dtype) -> None:
    o = torch.tensor([1.0, 1.0], dtype=dtype).view(1, 1, 2, 1)
    result = subtract(o, torch.tensor(0.9990234375))
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.item() == 2**-10


@pytest.mark.parametrize("one_key", [False, True], ids=["V1", "V2"])
def test_compiles_to_one_graph(one_key: bool) -> None:
    x = make_inputs(S=11, one_key=one_key, key_padding=padded(11, 3, 2))
    torch._dynamo.reset()
    compiled = torch.compile(standard_diff_attention, fullgraph=True, backend="aot_eager")
    got, want = forward_and_gradients(compiled, x), forward_and_gradients(standard_diff_attention, x)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_building_blocks_compile_to_one_graph(dtype: torch.dtype) -> None:
    def blocks(q: Tensor, lam: Tensor) -> Tensor:
        return subtract(pad_queries(q), lam)

    torch._dynamo.reset()
    q, lam = torch.randn(2, 5, 6, 7).to(dtype), torch.rand(2, 5, 3)
    assert torch.compile(blocks, fullgraph=True, backend="eager")(q, lam).equal(blocks(q, lam))
