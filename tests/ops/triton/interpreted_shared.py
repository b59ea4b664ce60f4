"""Tests of shared noise heads and of bidirectional calls, as a layer calls the backend `fused_triton`.

    TRITON_INTERPRET=1 python -m pytest tests/ops/triton/interpreted_shared.py

`test_operator.py` runs this: `TRITON_INTERPRET` must be set before the operators and the kernels are imported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.comparison import compare, compare_forward_and_gradients, make_inputs
from support.fused_cases import padded
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[3]))

from benchmarks.interpreter import mend_interpreter
from diffattn.errors import ConfigError
from diffattn.ops.dispatch import diff_attention
from diffattn.ops.reference import diff_attention_reference
from diffattn.ops.triton import operator as fused_triton
from diffattn.ops.visibility import seeing_queries

assert os.environ["TRITON_INTERPRET"] == "1"
mend_interpreter()

# As in `interpreted_operator.py`.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
BF16 = torch.bfloat16
D = 8


class LayerCall(NamedTuple):
    """What a layer passes: queries of each group side by side, its signal heads and then its noise head."""

    query: Tensor
    key: Tensor
    value: Tensor
    lam: Tensor

    def to(self, dtype: torch.dtype) -> LayerCall:
        wide = torch.promote_types(dtype, torch.float32)
        return LayerCall(*(x.to(dtype) for x in self[:3]), self.lam.to(wide))


def layer_call(
    signals: int, *, T: int = 11, S: int = 11, noises: int = 2, G: int = 1, one_key: bool = False
) -> LayerCall:
    generator = torch.Generator().manual_seed(signals)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    maps = 1 if one_key else 2
    query, key = normal(2, T, noises * (signals + 1), D), normal(2, S, G, maps * D)
    lam = 0.2 + 0.7 * torch.rand(2, T, noises * signals, generator=generator)
    # Heads in front of tokens, as views of what projections give.
    call = LayerCall(query.transpose(1, 2), key.transpose(1, 2), normal(2, S, G, maps * D).transpose(1, 2), lam)
    return call.to(BF16)


def wanted(
    query: Tensor, key: Tensor, value: Tensor, lam: Tensor, *, signals: int, queries: Tensor | None, causal: bool
) -> Tensor:
    """The definition."""
    grouped = query.transpose(1, 2).unflatten(2, (-1, signals + 1))
    q1, q2 = grouped[:, :, :, :-1].flatten(2, 3), grouped[:, :, :, -1]
    keys = key.transpose(1, 2).unflatten(3, (-1, D)).unbind(3)
    return diff_attention_reference(
        q1, keys[0], q2, keys[-1], value.transpose(1, 2), lam, causal=causal, queries=queries
    )


def padding(T: int, S: int, causal: bool) -> Tensor:
    """Ranges of queries where the first keys of a sequence, and the last ones of the other, are padding."""
    return seeing_queries(T, S, causal, padded(S, 3, 2))


# Shapes, whether causal, whether padded.
CASES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "4:1, V2, padded": ({"signals": 4, "noises": 1, "one_key": True}, True, True),
    "3:1, two groups, T < S": ({"signals": 3, "G": 2, "T": 9, "S": 19}, True, False),
    "2:1, not causal, padded": ({"signals": 2, "T": 13, "S": 10}, False, True),
    "1:1, not causal": ({"signals": 1, "T": 9, "S": 13}, False, False),
}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_as_a_layer_calls_it(case: str) -> None:
    options, causal, masked = CASES[case]
    call = layer_call(**options)
    queries = padding(call.query.shape[2], call.key.shape[2], causal) if masked else None
    rule = {"queries": queries, "causal": causal}
    assert fused_triton.refuses(*call, queries, signals_per_noise=options["signals"]) is None

    def results(function: Any, call: LayerCall, **names: Any) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in call]
        output = function(*leaves, **rule, **names)
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
        return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]

    got = results(fused_triton.attend, call, scale=None, signals_per_noise=options["signals"])
    exact, eager = (results(wanted, x, signals=options["signals"]) for x in (call.to(torch.float64), call))
    compare(got[0], exact[0], eager[0])
    compare(got[1:], exact[1:], eager[1:], factor=3.0, names=("d_query", "d_key", "d_value", "d_lam"))
    # Without gradients queries are read where they lie, and nothing is saved.
    with torch.no_grad():
        output = fused_triton.attend(*call, **rule, scale=None, signals_per_noise=options["signals"])
    compare(output, exact[0], eager[0])


CALLS: dict[str, dict[str, Any]] = {
    "2:1": {"H": 4, "noise_heads": 2},
    "3:1, V2, window": {"H": 3, "noise_heads": 1, "one_key": True, "Dv": 8, "window": 4},
    "window, T < S, padded": {"S": 19, "window": 6, "key_padding": padded(19, 5, 2)},
    "window, not causal": {"B": 1, "T": 13, "window": 3, "causal": False},
}


@pytest.mark.parametrize("case", CALLS)
def test_diff_attention(case: str) -> None:
    x = make_inputs(**{"T": 11, "H": 2, "G": 1, "D": 8, "Dv": 16} | CALLS[case], dtype=BF16)

    def by_name(*tensors: Any, **options: Any) -> Tensor:
        return diff_attention(*tensors, backend="fused_triton", **options)

    compare_forward_and_gradients(by_name, diff_attention_reference, x)
    few = x._replace(q1=x.q1[:, -3:], q2=x.q2[:, -3:], lam=x.lam[:, -3:])
    with torch.no_grad():
        output = by_name(*few[:6], **few.options)
    exact, eager = (diff_attention_reference(*y[:6], **y.options) for y in (few.to(torch.float64), few))
    compare(output, exact, eager)


@pytest.mark.parametrize(("signals", "one_key"), [(3, False), (4, True)])
@torch.no_grad()
def test_decoding_as_a_layer_calls_it(signals: int, one_key: bool) -> None:
    call = layer_call(signals, T=3, S=19, G=2, one_key=one_key)
    queries, eps = padding(3, 19, True), 1e-3
    assert fused_triton.decodes(call.query, call.value, signals_per_noise=signals)
    got = fused_triton.decode(*call, queries=queries, norm_scale=0.7, eps=eps, signals_per_noise=signals)
    exact = wanted(*call.to(torch.float64), signals=signals, queries=queries, causal=True)
    exact = 0.7 * exact / (exact.square().mean(-1, keepdim=True) + eps).sqrt()
    assert (got.dtype, got.shape) == (BF16, exact.shape)
    assert (got.double() - exact).norm() <= 1e-2 * exact.norm()
    both_ways = fused_triton.decode(*call, causal=False, signals_per_noise=signals)
    exact = wanted(*call.to(torch.float64), signals=signals, queries=None, causal=False)
    assert (both_ways.double() - exact).norm() <= 1e-2 * exact.norm()


def test_few_rows_of_a_group_are_decoded() -> None:
    """Its signal heads times its queries are the rows of one tile, of which there are 64 at most."""
    with torch.no_grad():
        for heads, decoded in ((8, True), (16, False)):
            query, value = torch.empty(1, heads + heads // 4, 8, D), torch.empty(1, 1, 5, D)
            assert fused_triton.decodes(query, value, signals_per_noise=4) == decoded


# `opcheck` reads `.grad` of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck() -> None:
    call = layer_call(2, noises=1, T=9, S=9)
    operators = torch.ops.diffattn
    q = call.query.transpose(1, 2).unflatten(2, (1, 3))
    k, v = call.key.transpose(1, 2).unflatten(3, (2, D)), call.value.transpose(1, 2)
    arguments = (q, k, v, call.lam, None)
    leaves = (*(t.clone().requires_grad_() for t in arguments[:4]), None, True, 0.4)
    # What else it checks holds for any numbers of heads: `interpreted_operator.py` has it.
    quick: dict[str, Any] = {"test_utils": ("test_schema", "test_faketensor", "test_autograd_registration")}
    torch.library.opcheck(operators.fused_triton.default, leaves, **quick)
    saved = operators.fused_triton(*arguments, True, 0.4)
    assert [x.shape for x in saved] == [(2, 9, 2, 16), (2, 9, 1, 16), (3, 2, 1, 9)]
    backward = (torch.randn_like(saved[0]), *arguments, *saved, True, 0.4)
    torch.library.opcheck(operators.fused_triton_backward.default, backward, **quick)
    apart = (q[:, :, :, :2], k[:, :, :, 0], q[:, :, :, 2], k[:, :, :, 1], v, call.lam, None, True, 0.4)
    torch.library.opcheck(operators.fused_triton_output.default, apart, **quick)
    few = (call.query[:, :, -3:], *call[1:3], call.lam[:, -3:], None, 0.4, None, 0.7, 1e-3, True, 2)
    torch.library.opcheck(operators.fused_triton_decoding.default, few, **quick)


def test_second_derivatives_are_those_of_formulas() -> None:
    call = layer_call(2, noises=1, T=4, S=4)
    penalties = []
    for function, names, x in (
        (fused_triton.attend, {"scale": None, "signals_per_noise": 2}, call),
        (wanted, {"signals": 2}, call.to(torch.float64)),
    ):
        leaves = [y.detach().requires_grad_() for y in x]
        output = function(*leaves, queries=None, causal=True, **names)
        first = torch.autograd.grad(output.double().square().sum(), leaves, create_graph=True)
        penalties.append(torch.autograd.grad(sum(y.double().square().sum() for y in first), leaves))
    for got, exact in zip(*penalties, strict=True):
        assert (got.double() - exact).norm() <= 3e-2 * exact.norm()


def test_the_operator_checks_what_it_would_read_beyond() -> None:
    x = layer_call(2)
    q, k, v = (
        x.query.transpose(1, 2).unflatten(2, (2, 3)),
        x.key.transpose(1, 2).unflatten(3, (2, D)),
        x.value.transpose(1, 2),
    )
    three = [y.repeat_interleave(3, 2) for y in (k, v)]
    for tensors, said in (
        ((q, *three, x.lam), "shapes that fit each other"),
        ((q, k, v, x.lam[:, :, :2]), r"float32 \(2, 11, 4\)"),
        ((q[:, :, :, :1], k, v, x.lam), "queries of 2 or more"),
    ):
        with pytest.raises(ConfigError, match=f"wanted {said}"):
            torch.ops.diffattn.fused_triton(*tensors, None, True, 0.4)
