"""The definition, against itself: its gradients, its mask as drawn, its maps, and a sum written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from support.comparison import Inputs, make_inputs
from torch import Tensor

from diffattn.ops.reference import (
    Call,
    diff_attention_reference,
    diff_maps_reference,
    softmax_attention_reference,
    visible_keys,
)


def padding(*rows: str) -> Tensor:
    """Bool (B, S) from rows such as "..##": # is padding."""
    return torch.tensor([[c == "#" for c in row] for row in rows])


def call(x: Inputs, **options: object) -> Tensor:
    return diff_attention_reference(*x[:6], **{**x.options, **options})


@pytest.mark.parametrize(
    "inputs",
    [
        make_inputs(B=1, T=3, S=5, H=4, G=2, D=2, Dv=3, dtype=torch.float64),
        make_inputs(B=1, T=3, S=5, H=2, G=1, D=3, Dv=2, dtype=torch.float64, causal=False, scale=0.7),
        make_inputs(B=2, T=3, H=2, G=2, D=2, Dv=3, dtype=torch.float64, key_padding=padding("#..", "..#")),
        make_inputs(B=2, T=2, S=3, H=2, G=1, D=2, Dv=2, dtype=torch.float64, key_padding=padding("###", "...")),
    ],
    ids=["grouped, T < S", "non-causal, scale", "padded", "a sequence of padding"],
)
def test_gradcheck(inputs: Inputs) -> None:
    leaves = tuple(x.requires_grad_() for x in inputs[:6])
    assert torch.autograd.gradcheck(lambda *a: diff_attention_reference(*a, **inputs.options), leaves)


def test_gradgradcheck() -> None:
    inputs = make_inputs(B=1, T=2, S=3, H=2, G=1, D=2, Dv=1, dtype=torch.float64)
    leaves = tuple(x.requires_grad_() for x in inputs[:6])
    assert torch.autograd.gradgradcheck(diff_attention_reference, leaves)


def test_equals_the_sums_written_out() -> None:
    x = make_inputs(B=2, T=3, S=5, H=6, G=3, D=2, Dv=7, dtype=torch.float64, key_padding=padding("#....", ".#..."))
    output = call(x)
    assert x.key_padding is not None

    def weights(b: int, t: int, h: int, q: Tensor, k: Tensor) -> list[float]:
        seen = [s for s in range(5) if s <= 5 - 3 + t and not x.key_padding[b, s]]
        powers = {s: math.exp(float(q[b, t, h] @ k[b, s, h // 2]) / math.sqrt(2)) for s in seen}
        return [powers.get(s, 0.0) / sum(powers.values()) for s in range(5)]

    for b, t, h in ((0, 0, 0), (0, 2, 3), (1, 1, 5), (1, 2, 4)):
        pos, neg = weights(b, t, h, x.q1, x.k1), weights(b, t, h, x.q2, x.k2)
        want = sum((pos[s] - x.lam[b, t, h] * neg[s]) * x.v[b, s, h // 2] for s in range(5))
        torch.testing.assert_close(output[b, t, h], want)


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "pad", "drawn"),
    [
        (3, 3, True, None, ["100", "110", "111"]),
        (3, 5, True, None, ["11100", "11110", "11111"]),
        (1, 4, True, None, ["1111"]),
        (3, 5, True, "#...#", ["01100", "01110", "01110"]),
        (2, 3, False, "##.", ["001", "001"]),
        (2, 2, True, "#.", ["00", "01"]),
    ],
)
def test_visible_keys_are_as_drawn(queries: int, keys: int, causal: bool, pad: str | None, drawn: list[str]) -> None:
    mask = visible_keys(queries, keys, causal, None if pad is None else padding(pad), torch.device("cpu"))
    rows = mask.expand(1, 1, queries, keys)[0, 0].int().tolist()
    assert ["".join(map(str, row)) for row in rows] == drawn


def test_maps() -> None:
    x = make_inputs(B=2, T=3, S=5, H=6, G=3, dtype=torch.float64, key_padding=padding("#....", "....#"))
    output, maps = diff_attention_reference(*x[:6], **x.options), diff_maps_reference(Call(*x))
    seen = visible_keys(3, 5, True, x.key_padding, x.v.device).expand(2, 6, 3, 5)
    lam = x.lam.transpose(1, 2)
    for attention, total in ((maps.map_pos, torch.ones_like(lam)), (maps.map_neg, torch.ones_like(lam))):
        assert attention.shape == (2, 6, 3, 5)
        assert attention[~seen].eq(0).all()
        assert attention[seen].gt(0).all()
        torch.testing.assert_close(attention.sum(-1), total)
    torch.testing.assert_close(maps.map_diff, maps.map_pos - lam[..., None] * maps.map_neg)
    torch.testing.assert_close(maps.map_diff.sum(-1), 1 - lam)
    torch.testing.assert_close(output, torch.einsum("bhts,bshe->bthe", maps.map_diff, x.v.repeat_interleave(2, 2)))


def test_lam_0_is_softmax_attention_and_v_may_have_any_width() -> None:
    x = make_inputs(T=5, S=7, dtype=torch.float64)
    twin = softmax_attention_reference(x.q1, x.k1, x.v, **x.options)
    torch.testing.assert_close(call(x._replace(lam=torch.zeros(()))), twin)
    torch.testing.assert_close(diff_attention_reference(x.q1, x.k1, x.q2, x.k2, x.v, 0.0), twin)


def test_a_row_without_keys_is_zero_and_its_neighbours_are_untouched() -> None:
    x = make_inputs(B=2, T=3, S=3, dtype=torch.float64, key_padding=padding("#..", "###"))
    leaves = [t.requires_grad_() for t in x[:6]]
    output = diff_attention_reference(*leaves, **x.options)
    assert output[0, 0].eq(0).all()
    assert output[1].eq(0).all()
    assert output[0, 1:].ne(0).all()
    for gradient in torch.autograd.grad(output.sum(), leaves):
        assert gradient.isfinite().all()
        assert gradient[1].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_has_the_dtype_of_v(dtype: torch.dtype) -> None:
    x = make_inputs(dtype=dtype)
    output, maps = diff_attention_reference(*x[:6]), diff_maps_reference(Call(*x[:6]))
    assert {output.dtype, *(m.dtype for m in maps)} == {dtype}
