"""Derivatives of every order, in both modes and under torch.func: right, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.backends import fused_cpu_diff_attention
from support.comparison import Inputs, compare, make_inputs
from support.fused_cases import needs_the_kernel, padded, require_kernel
from support.known_wrong import KNOWN_WRONG
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from diffattn.errors import UnsupportedError
from diffattn.ops import kernel_derivatives
from diffattn.ops.cpu import operator as fused_cpu
from diffattn.ops.dispatch import diff_attention
from diffattn.ops.reference import diff_attention_reference

Function = Callable[..., Tensor]

# PyTorch loads what forward mode needs with its own deprecated torch.jit, and loops over SDPA under vmap.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

ALL = tuple(range(6))


def numbers(like: Tensor, seed: int) -> Tensor:
    """Of the order of 1, without a draw, which `vmap` refuses, and the same in every dtype."""
    return (1.5 * torch.sin(torch.arange(like.numel(), dtype=torch.float64) * (seed + 0.7))).view(like.shape).to(like)


def tangents(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(numbers(t, 10 + i) for i, t in enumerate(x))


def loss(f: Function) -> Function:
    """No linear function of the output, so that the backward pass has a second derivative by its cotangent too."""

    def of_output(*x: Tensor) -> Tensor:
        y = f(*x)
        return (y * numbers(y.detach(), 3)).sum() + y.square().sum()

    return of_output


def of_gradients(gradients: Any) -> Tensor:
    return sum((g * numbers(g, 40 + i)).sum() for i, g in enumerate(gradients))


def grad_of_grad(f: Function, x: tuple[Tensor, ...]) -> Any:
    return grad(lambda *x: of_gradients(grad(loss(f), ALL)(*x)), ALL)(*x)


def leaves(x: tuple[Tensor, ...], wanted: tuple[int, ...] = ALL) -> list[Tensor]:
    return [t.clone().requires_grad_(i in wanted) for i, t in enumerate(x)]


def double_backward(f: Function, x: tuple[Tensor, ...], wanted: tuple[int, ...] = ALL) -> Any:
    x = leaves(x, wanted)
    wanted_leaves = [x[i] for i in wanted]
    # What is known to be wrong ignores some of them.
    first = torch.autograd.grad(loss(f)(*x), wanted_leaves, create_graph=True, materialize_grads=True)
    return torch.autograd.grad(of_gradients(first), wanted_leaves, materialize_grads=True)


def triple_backward(f: Function, x: tuple[Tensor, ...]) -> Any:
    x = leaves(x)
    first = torch.autograd.grad(loss(f)(*x), x, create_graph=True)
    second = torch.autograd.grad(of_gradients(first), x, create_graph=True)
    return torch.autograd.grad(of_gradients(second), x)


def transform_in_backward(f: Function, x: tuple[Tensor, ...]) -> Any:
    x = leaves(x)
    return torch.autograd.grad(of_gradients(grad(loss(f), ALL)(*x)), x)


def dual_numbers(f: Function, x: tuple[Tensor, ...], *, no_grad: bool = False) -> Any:
    with forward_ad.dual_level(), torch.set_grad_enabled(not no_grad):
        return forward_ad.unpack_dual(f(*(forward_ad.make_dual(t, d) for t, d in zip(x, tangents(x), strict=True))))


def dual_cotangent(f: Function, x: tuple[Tensor, ...]) -> Any:
    """A backward pass in forward mode behind a forward pass that was not."""
    x = leaves(x)
    y = f(*x)
    with forward_ad.dual_level():
        gradients = torch.autograd.grad(y, x, forward_ad.make_dual(numbers(y.detach(), 3), numbers(y.detach(), 4)))
        return [forward_ad.unpack_dual(g).tangent for g in gradients]


def batch(x: tuple[Tensor, ...], *which: int) -> tuple[Any, ...]:
    """Three of some of the arguments, along dimensions that differ, with `vmap`'s in_dims."""
    dims = tuple(i % 3 if i in which else None for i in ALL)
    stacked = (t if dim is None else torch.stack([t, 0.5 * t, 0.7 * t], dim) for t, dim in zip(x, dims, strict=True))
    return dims, tuple(stacked)


def mapped(f: Function, x: tuple[Tensor, ...], *which: int) -> Any:
    dims, x = batch(x, *which)
    return vmap(f, dims)(*x)


def grad_of_vmap(f: Function, x: tuple[Tensor, ...]) -> Any:
    dims, x = batch(x, 0, 5)
    return grad(lambda *x: vmap(loss(f), dims)(*x).sum(), ALL)(*x)


REVERSE: dict[str, Callable[[Function, tuple[Tensor, ...]], Any]] = {
    "grad": lambda f, x: grad(loss(f), ALL)(*x),
    "vjp, called later": lambda f, x: vjp(f, *x)[1](numbers(x[4].new_empty(f(*x).shape), 3)),
    "jacrev": lambda f, x: jacrev(f, (0, 5))(*x),
    "vmap": lambda f, x: mapped(f, x, 0),
    "vmap of keys, values and λ": lambda f, x: mapped(f, x, 1, 4, 5),
    "vmap of all": lambda f, x: mapped(f, x, *ALL),
    "vmap of grad": lambda f, x: mapped(grad(loss(f), ALL), x, 0, 5),
    "vmap of vmap of grad": lambda f, x: vmap(lambda lam: mapped(grad(loss(f), ALL), (*x[:5], lam), 1))(
        torch.stack([x[5], x[5] / 2])
    ),
    "grad of vmap": grad_of_vmap,
}
FORWARD: dict[str, Callable[[Function, tuple[Tensor, ...]], Any]] = {
    "jvp": lambda f, x: jvp(f, x, tangents(x)),
    "jvp of λ alone": lambda f, x: jvp(lambda lam: f(*x[:5], lam), x[5:], tangents(x)[5:]),
    "jacfwd": lambda f, x: jacfwd(f, (0, 5))(*x),
    "vmap of jvp": lambda f, x: mapped(lambda *y: jvp(f, y, tangents(x))[1], x, 0, 5),
    "jvp of vmap": lambda f, x: jvp(lambda *y: mapped(f, y, 2), x, tangents(x)),
    "jvp of jvp": lambda f, x: jvp(lambda *y: jvp(f, y, tangents(x))[1], x, tangents(x)),
    "forward_ad": dual_numbers,
    "forward_ad without gradients": lambda f, x: dual_numbers(f, x, no_grad=True),
    "jvp of grad": lambda f, x: jvp(grad(loss(f), ALL), x, tangents(x)),
    "grad of jvp": lambda f, x: grad(lambda *y: jvp(loss(f), y, tangents(x))[1], ALL)(*x),
    "hessian": lambda f, x: hessian(loss(f), 5)(*x),
}
SECOND: dict[str, Callable[[Function, tuple[Tensor, ...]], Any]] = {
    "grad of grad": grad_of_grad,
    "jacrev of jacrev": lambda f, x: jacrev(jacrev(loss(f), 5), 5)(*x),
    "double backward": double_backward,
    "double backward of q2 and λ": lambda f, x: double_backward(f, x, (2, 5)),
    "triple backward": triple_backward,
    "grad in a backward pass": transform_in_backward,
    "torch.autograd.functional.hessian": lambda f, x: torch.autograd.functional.hessian(
        lambda lam: loss(f)(*x[:5], lam), x[5], vectorize=True
    ),
}
# Nothing shows before the call that it has a derivative beyond the first: the backward pass finds out.
LATE = {"dual cotangent": dual_cotangent}
DERIVATIVES = REVERSE | FORWARD | SECOND | LATE

SIZES: dict[str, int] = {"B": 2, "T": 5, "S": 7, "H": 4, "G": 2, "D": 3, "Dv": 5}
CASES: dict[str, dict[str, Any]] = {
    "V1": {},
    "V2, padded": {"one_key": True, "key_padding": padded(7, 2, 1)},
    "non-causal": {"causal": False, "scale": 0.9},
}


def bound(function: Function, x: Inputs) -> tuple[Function, tuple[Tensor, ...]]:
    """A function of six tensors; V2's keys are one, the fourth is not read."""
    one_key = x.k2 is x.k1

    def f(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
        y = function(q1, k1, q2, k1 if one_key else k2, v, lam, **x.options)
        # So that every argument has a derivative.
        return y + 0 * k2.sum() if one_key else y

    return f, tuple(x[:6])


def taken(derivative: str, function: Function, x: Inputs) -> list[Tensor]:
    return tree_leaves(DERIVATIVES[derivative](*bound(function, x)))


def compare_derivatives(
    derivative: str, function: Function, x: Inputs, reference: Function = diff_attention_reference
) -> None:
    wide = x.to(torch.float64)._replace(lam=x.lam.double())
    expected = taken(derivative, reference, wide)
    eager = taken(derivative, reference, x)
    names = [f"{derivative} {i}" for i in range(len(expected))]
    compare(taken(derivative, function, x), expected, eager, factor=3.0, names=names)


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
