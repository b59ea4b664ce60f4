"""Derivatives of every order, in both modes and under torch.func, by name, and the comparison with the definition's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.comparison import Inputs, compare
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from diffattn.ops.reference import diff_attention_reference

Function = Callable[..., Tensor]

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
