"""Shared noise heads, windows and cross attention in every backend, against sums that are written out one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.comparison import Inputs, compare_forward_and_gradients, make_inputs
from support.fused_cases import needs_the_kernel
from support.known_wrong import assert_rejects_known_wrong
from torch import Tensor

from diffattn.errors import UnsupportedError
from diffattn.ops import dispatch
from diffattn.ops.backend import Backend
from diffattn.ops.dispatch import diff_attention
from diffattn.ops.reference import Call, diff_attention_reference, diff_maps_reference
from diffattn.ops.visibility import packed_queries, seeing_queries, visible_in_ranges


def padded(keys: int, left: int, right: int) -> Tensor:
    """Two sequences: the first has `left` padding keys in front, the second `right` behind."""
    key_padding = torch.zeros(2, keys, dtype=torch.bool)
    key_padding[0, :left] = True
    key_padding[1, keys - right :] = True
    return key_padding


def sees(x: Inputs, b: int, t: int, s: int) -> bool:
    T, S = x.q1.shape[1], x.k1.shape[1]
    own = S - T + t
    if x.key_padding is not None and x.key_padding[b, s]:
        return False
    if x.causal:
        return s <= own and (x.window is None or s > own - x.window)
    return x.window is None or abs(s - own) <= x.window


def written_out(x: Inputs) -> Tensor:
    """The definition by loops over every number but the widths."""
    (B, T, H, D), (S, G), Hn = x.q1.shape, x.k1.shape[1:3], x.q2.shape[2]
    scale = x.scale or D**-0.5

    def weights(q: Tensor, k: Tensor, b: int, t: int) -> list[float]:
        powers = [math.exp(scale * float(q @ k[s])) if sees(x, b, t, s) else 0.0 for s in range(S)]
        total = sum(powers) or 1.0
        return [power / total for power in powers]

    output = torch.zeros(B, T, H, x.v.shape[3], dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                noise, g = h // (H // Hn), h // (H // G)
                pos = weights(x.q1[b, t, h], x.k1[b, :, g], b, t)
                neg = weights(x.q2[b, t, noise], x.k2[b, :, g], b, t)
                for s in range(S):
                    output[b, t, h] += (pos[s] - float(x.lam[b, t, h]) * neg[s]) * x.v[b, s, g]
    return output


CASES: dict[str, dict[str, Any]] = {
    "two to one": {"T": 5, "S": 7, "H": 12, "noise_heads": 6, "G": 3},
    "six to one, one group": {"T": 5, "S": 7, "H": 6, "noise_heads": 1, "G": 1},
    "three to one, V2": {"T": 5, "S": 7, "H": 6, "noise_heads": 2, "G": 1, "one_key": True},
    "a window": {"T": 5, "S": 17, "window": 4},
    "a window of the query alone": {"T": 5, "S": 17, "window": 1},
    "a window, padded": {"T": 13, "window": 3, "key_padding": padded(13, 5, 6)},
    "a window to both sides": {"T": 11, "S": 11, "causal": False, "window": 2},
    "a window to both sides, T < S": {"T": 3, "S": 11, "causal": False, "window": 2},
    "a window to both sides, T > S": {"T": 11, "S": 5, "causal": False, "window": 2},
    "cross attention, T < S": {"T": 3, "S": 13, "causal": False},
    "cross attention, T > S": {"T": 13, "S": 3, "causal": False, "one_key": True},
    "cross attention, padded": {"T": 7, "S": 13, "causal": False, "key_padding": padded(13, 4, 9)},
    "cross attention of shared noise heads, padded": {
        "T": 7, "S": 5, "H": 8, "noise_heads": 2, "G": 2, "causal": False, "key_padding": padded(5, 3, 2),
    },
    "all at once": {
        "T": 7, "S": 23, "H": 8, "noise_heads": 4, "G": 2, "window": 5, "scale": 0.9, "key_padding": padded(23, 19, 2),
    },
}  # fmt: skip
BACKENDS = [pytest.param("fused_cpu", marks=needs_the_kernel), "standard"]


@pytest.mark.parametrize("case", CASES)
def test_the_definition_equals_the_sums_written_out(case: str) -> None:
    x = make_inputs(D=3, Dv=2, dtype=torch.float64, **CASES[case])
    torch.testing.assert_close(diff_attention(*x[:6], **x.options, backend="reference"), written_out(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case: str, dtype: torch.dtype, backend: str) -> None:
    x = make_inputs(dtype=dtype, **CASES[case])

    def ours(*tensors: Tensor, **options: Any) -> Tensor:
        return diff_attention(*tensors, **options, backend=backend)

    compare_forward_and_gradients(ours, diff_attention_reference, x)
    assert_rejects_known_wrong(x)


@pytest.mark.parametrize("backend", ["auto", "standard", "reference"])
def test_shared_noise_heads_are_repeated_ones(backend: str) -> None:
    x = make_inputs(S=11, H=12, noise_heads=3)
    repeated = diff_attention(*x[:2], x.q2.repeat_interleave(4, 2), *x[3:6], backend=backend)
    torch.testing.assert_close(diff_attention(*x[:6], backend=backend), repeated)


def test_noise_maps_are_given_once() -> None:
    x = make_inputs(S=11, H=12, noise_heads=3)
    maps = diff_maps_reference(Call(*x[:6]))
    assert [m.shape[1] for m in maps] == [12, 3, 12]
    lam = x.lam.transpose(1, 2)[..., None]
    torch.testing.assert_close(maps.map_diff, maps.map_pos - lam * maps.map_neg.repeat_interleave(4, 1))


def test_gradcheck() -> None:
    x = make_inputs(B=1, T=3, S=5, H=4, noise_heads=2, G=2, D=2, Dv=3, window=2, dtype=torch.float64)
    leaves = tuple(t.requires_grad_() for t in x[:6])
    for backend in ("reference", "standard"):
        assert torch.autograd.gradcheck(lambda *a, b=backend: diff_attention(*a, **x.options, backend=b), leaves)


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "window", "drawn"),
    [
        (4, 4, True, 2, ["1000", "1100", "0110", "0011"]),
        (2, 5, True, 3, ["01110", "00111"]),
        (4, 4, False, 1, ["1100", "1110", "0111", "0011"]),
        (2, 5, False, 1, ["00111", "00011"]),
        (4, 2, False, 1, ["00", "10", "11", "11"]),
        (3, 3, True, 5, ["100", "110", "111"]),
    ],
)
def test_windows_are_as_drawn(queries: int, keys: int, causal: bool, window: int, drawn: list[str]) -> None:
    ranges = seeing_queries(queries, keys, causal, torch.zeros(1, keys, dtype=torch.bool), window)
    assert ranges.dtype == torch.int32
    rows = visible_in_ranges(ranges, queries)[0, 0].int().tolist()
    assert ["".join(map(str, row)) for row in rows] == drawn


@pytest.mark.parametrize("causal", [True, False])
def test_windows_within_packed_sequences(causal: bool) -> None:
    begins, window = [0, 4, 5, 11], 2
    ranges = packed_queries(torch.tensor(begins), 11, causal, None, window)
    number = torch.tensor([0] * 4 + [1] + [2] * 6)
    token = torch.arange(11)
    distance = token[:, None] - token
    near = (distance >= 0) & (distance < window) if causal else distance.abs() <= window
    assert visible_in_ranges(ranges, 11)[0, 0].equal(near & (number[:, None] == number))


def test_a_window_that_hides_nothing_costs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Call] = []

    def kept(call: Call) -> None:
        seen.append(call)

    monkeypatch.setitem(dispatch.BACKENDS, "fused_cpu", Backend("fused_cpu", "none", kept, lambda call: call.v))
    x = make_inputs(T=5, S=7)
    for window in (None, 7, 100):
        diff_attention(*x[:6], window=window)
    assert [call.queries for call in seen] == [None] * 3


def test_a_backend_that_does_not_know_them_is_refused_or_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(call: Call) -> Tensor:
        raise AssertionError("a backend ran that does not know the call")

    old = Backend("old", "none", lambda call: None, unreachable)
    monkeypatch.setattr(dispatch, "BACKENDS", {"old": old, "reference": dispatch.BACKENDS["reference"]})
    shared, near = make_inputs(S=11, H=12, noise_heads=3), make_inputs(S=11)
    for x, options, words in (
        (shared, {}, "old: fewer heads in q2 than in q1 are not supported"),
        (near, {"window": 2}, r"old: packed sequences \(cu_seqlens\) and windows are not supported"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            diff_attention(*x[:6], **options, backend="old")
        assert diff_attention(*x[:6], **options).equal(diff_attention(*x[:6], **options, backend="reference"))
