"""Derivatives of every order, in both modes and under torch.func: right, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.backends import fused_cpu_diff_attention
from support.comparison import Inputs, make_inputs
from support.derivatives import (
    ALL,
    DERIVATIVES,
    FORWARD,
    LATE,
    REVERSE,
    SECOND,
    SIZES,
    Function,
    bound,
    compare_derivatives,
    leaves,
    loss,
    taken,
)
from support.fused_cases import needs_the_kernel, padded, require_kernel
from support.known_wrong import KNOWN_WRONG
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves

from diffattn.errors import UnsupportedError
from diffattn.ops import kernel_derivatives
from diffattn.ops.cpu import operator as fused_cpu
from diffattn.ops.dispatch import diff_attention
from diffattn.ops.reference import diff_attention_reference

# PyTorch loads what forward mode needs with its own deprecated torch.jit, and loops over SDPA under vmap.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

CASES: dict[str, dict[str, Any]] = {
    "V1": {},
    "V2, padded": {"one_key": True, "key_padding": padded(7, 2, 1)},
    "non-causal": {"causal": False, "scale": 0.9},
    "a noise head for two, a window": {"noise_heads": 2, "window": 5},
}


def by(backend: str) -> Function:
    return lambda *x, **options: diff_attention(*x, backend=backend, **options)


@needs_the_kernel
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_auto_has_every_derivative(derivative: str, case: str) -> None:
    compare_derivatives(derivative, diff_attention, make_inputs(**SIZES, **CASES[case]))


@needs_the_kernel
@pytest.mark.parametrize("derivative", ["grad", "vmap of all", "vmap of grad", "jvp", "jvp of vmap", "double backward"])
def test_a_row_packed_from_two_sequences(derivative: str) -> None:
    """Of 3 and 4 tokens, whose derivatives are those of two calls."""
    first = torch.tensor([0, 1, 2, 3, 4, 5, 6], dtype=torch.int32)
    end = torch.tensor([3, 3, 3, 7, 7, 7, 7], dtype=torch.int32)
    queries = torch.stack([first, end])[:, None].expand(2, SIZES["B"], 7)

    def packed(*x: Tensor, **options: Any) -> Tensor:
        return fused_cpu_diff_attention(*x, queries=queries)

    def one_by_one(*x: Tensor, **options: Any) -> Tensor:
        parts = [diff_attention_reference(*(t[:, span] for t in x)) for span in (slice(3), slice(3, None))]
        return torch.cat(parts, dim=1)

    compare_derivatives(derivative, packed, make_inputs(**(SIZES | {"T": 7})), one_by_one)


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_auto_has_every_derivative_without_a_kernel(derivative: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFATTN_FUSED", "0")
    compare_derivatives(derivative, diff_attention, make_inputs(**SIZES, key_padding=padded(7, 2, 1)))


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_standard_has_every_derivative(derivative: str) -> None:
    compare_derivatives(derivative, by("standard"), make_inputs(**SIZES))


@pytest.mark.parametrize("derivative", ["grad", "vmap of grad", "jvp", "jvp of grad", "double backward"])
def test_bfloat16(derivative: str) -> None:
    """Odd widths, which gain a column of zeros on the way to the kernel."""
    require_kernel(torch.bfloat16)
    compare_derivatives(derivative, diff_attention, make_inputs(**SIZES, dtype=torch.bfloat16))


@pytest.mark.parametrize("derivative", ["jvp", "grad", "double backward", "jvp of grad"])
def test_the_comparison_rejects_what_is_known_to_be_wrong(derivative: str) -> None:
    x = make_inputs(**SIZES)

    def zero_tangent(*arguments: Tensor, **options: Any) -> Tensor:
        return diff_attention_reference(*(t.detach() for t in arguments), **options) + 0 * sum(
            t.square().sum() for t in arguments
        )

    wrongs: dict[str, Function] = {"no derivative": zero_tangent}
    for wrong in KNOWN_WRONG:
        if wrong.applies(x) and not wrong.after_norm:
            wrongs[wrong.name] = lambda *t, wrong=wrong, **options: wrong.function(Inputs(*t, **options))
    assert len(wrongs) == 8
    for name, function in wrongs.items():
        print(name)
        with pytest.raises(AssertionError, match=derivative):
            compare_derivatives(derivative, function, x)


def test_float64_by_finite_differences() -> None:
    x = [t.double().requires_grad_() for t in make_inputs(B=1, T=2, S=3, H=2, G=1, D=2, Dv=2)[:6]]
    assert torch.autograd.gradcheck(diff_attention, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(diff_attention, x)


NO_FORWARD_MODE = "^fused_cpu: derivatives in forward mode are not supported; wanted a backend that serves this call: "
NO_SECOND = "^fused_cpu: second derivatives are not supported; wanted a backend that serves this call: "


@needs_the_kernel
@pytest.mark.parametrize("derivative", REVERSE)
def test_the_kernel_by_name_has_first_derivatives_in_reverse_mode(derivative: str) -> None:
    compare_derivatives(derivative, by("fused_cpu"), make_inputs(**SIZES))


@needs_the_kernel
@pytest.mark.parametrize("derivative", [*FORWARD, *SECOND, *LATE])
def test_the_kernel_by_name_refuses_the_others(derivative: str) -> None:
    sentence = NO_SECOND if derivative in SECOND else NO_FORWARD_MODE
    with pytest.raises(UnsupportedError, match=sentence):
        taken(derivative, by("fused_cpu"), make_inputs(**SIZES))
    # What comes after it is asked anew.
    compare_derivatives("double backward", diff_attention, make_inputs(**SIZES))


@needs_the_kernel
@pytest.mark.parametrize("derivative", REVERSE)
def test_first_derivatives_are_the_kernels(derivative: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No transform is served by the formulas, which hold the maps, or by another backend, where the kernel can."""

    def unreachable(*args: Any) -> Any:
        raise AssertionError("a map was computed")

    monkeypatch.setattr(kernel_derivatives, "softmax_map", unreachable)
    taken(derivative, fused_cpu_diff_attention, make_inputs(**SIZES))
    with pytest.raises(AssertionError, match="a map was computed"):
        taken("double backward", fused_cpu_diff_attention, make_inputs(**SIZES))


@needs_the_kernel
@pytest.mark.parametrize("derivative", [*FORWARD, *SECOND, *LATE])
def test_the_operators_drop_no_derivative(derivative: str) -> None:
    """Called past `unsupported`, as by a compiled graph or an exported program."""
    compare_derivatives(derivative, fused_cpu_diff_attention, make_inputs(**SIZES))


@needs_the_kernel
def test_a_second_derivative_is_refused_only_where_it_is_taken() -> None:
    x = leaves(make_inputs(**SIZES)[:6])
    gradients = torch.autograd.grad(loss(by("fused_cpu"))(*x), x, create_graph=True)
    for got, want in zip(gradients, grad(loss(by("fused_cpu")), ALL)(*x), strict=True):
        assert got.equal(want)


@needs_the_kernel
@pytest.mark.parametrize("derivative", ["grad", "vmap of grad", "jvp", "forward_ad"])
def test_compiled(derivative: str) -> None:
    x = make_inputs(**SIZES)
    torch._dynamo.reset()
    take = torch.compile(DERIVATIVES[derivative], fullgraph=True, backend="aot_eager")
    f, tensors = bound(diff_attention, x)
    for got, want in zip(tree_leaves(take(f, tensors)), taken(derivative, diff_attention, x), strict=True):
        torch.testing.assert_close(got, want)


@pytest.fixture
def forward_mode() -> Iterator[None]:
    with forward_ad.dual_level():
        yield


@torch.no_grad()
def test_no_transform_is_decoded(forward_mode: None) -> None:
    query, value = torch.randn(2, 4, 1, 6), torch.randn(2, 2, 9, 6)
    assert not fused_cpu.decodes(query, value)


@torch.no_grad()
def test_no_batch_is_decoded() -> None:
    query, value = torch.randn(2, 4, 1, 6), torch.randn(2, 2, 9, 6)
    assert fused_cpu.decodes(query, value)

    def decodes(x: Tensor) -> Tensor:
        return x.new_tensor(fused_cpu.decodes(x[None], value))

    assert not vmap(decodes)(query).any()
