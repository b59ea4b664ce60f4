"""Derivatives in forward mode and beyond the first, which attention kernels do not have: who asks, and what serves.

PyTorch's kernels behind `scaled_dot_product_attention` and ours have one derivative, in reverse mode. Forward mode
(`torch.func.jvp`, `jacfwd`, `torch.autograd.forward_ad`) shows before the call, in the tensors that it is given. A
second derivative may not: with `create_graph=True` it is taken long after the backend has been chosen.

Everything here is for calls in eager mode. A compiled graph has no second derivative, which PyTorch says itself, and
the kernels' operators see tangents by themselves (`kernel_derivatives`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffattn.ops.torch_private import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    in_forward_mode,
    in_transform,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
)


def transformed() -> bool:
    """Tells whether this code runs in forward mode or within a transform of `torch.func`, `torch.vmap` included."""
    return in_forward_mode() or in_transform()


def has_tangent(x: Any) -> bool:
    """Tells whether `x` has a tangent of its own; those of the tensors that a transform wraps do not count."""
    # `vmap` has tangents in what it wraps only, and cannot unpack.
    if not isinstance(x, Tensor) or is_batchedtensor(x):
        return False
    # PyTorch has one level of dual tensors; `torch.func.jvp` within another one wraps them.
    return forward_ad.unpack_dual(x, level=0).tangent is not None


def forward_mode(*tensors: Any) -> bool:
    """Tells whether a derivative in forward mode is taken with respect to one of these, at any level of transforms."""
    if torch.compiler.is_compiling() or not transformed():
        return False
    return any(has_tangent(layer) for x in tensors for layer in _layers(x))


def _layers(x: Any) -> list[Any]:
    """Returns a tensor and what it wraps, from the innermost transform to none."""
    layers = [x]
    while isinstance(x, Tensor) and is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
        layers.append(x)
    return layers


def _beyond_first(tensors: Sequence[Any]) -> bool:
    """Tells whether the transforms around this code take more than one derivative, or one in forward mode."""
    if not transformed():
        return False
    levels = get_interpreter_stack() or []
    kinds = (TransformType.Grad, TransformType.Jvp)
    order = sum(level.key() in kinds for level in levels)
    # A transform within ordinary autograd, as in `torch.func.grad(f)(x).sum().backward()`.
    order += any(isinstance(x, Tensor) and _layers(x)[-1].requires_grad for x in tensors)
    return order > 1 or forward_mode(*tensors)


def through_sdpa(call: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """``call(*tensors)``, which calls `scaled_dot_product_attention`, with derivatives of every order in both modes.

    Those that PyTorch's kernels do not have are those of its math backend, which holds all scores, O(B·H·T·S). A
    backward pass with ``create_graph=True`` computes through it as well, since it has to have a derivative.
    """
    if torch.compiler.is_compiling():
        return call(*tensors)
    if _beyond_first(tensors):
        with sdpa_kernel(SDPBackend.MATH):
            return call(*tensors)
    output = call(*tensors)
    if not output.requires_grad or in_transform():
        return output
    return _DifferentiableBackward.apply(call, output, *tensors)


class _DifferentiableBackward(torch.autograd.Function):
    """An identity behind a call whose backward pass, where it is differentiated, goes around the call's."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., Tensor], output: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        if not (torch.is_grad_enabled() or forward_mode(d_output)):
            return (None, d_output, *[None for _ in ctx.saved_tensors])
        with sdpa_kernel(SDPBackend.MATH):
            gradients = pullback(ctx.call, ctx.saved_tensors, ctx.needs_input_grad[2:], d_output)
        return (None, None, *gradients)


def pullback(
    function: Callable[..., Any], arguments: Sequence[Any], wanted: Sequence[bool], cotangent: Any
) -> list[Tensor | None]:
    """Gradients of `function` at `arguments` for the ones that are `wanted`, differentiable themselves."""

    def of_wanted(*chosen: Tensor) -> Any:
        rest = iter(chosen)
        return function(*(next(rest) if want else x for x, want in zip(arguments, wanted, strict=True)))

    vjp = torch.func.vjp(of_wanted, *(x for x, want in zip(arguments, wanted, strict=True) if want))[1]
    gradients = iter(vjp(cotangent))
    return [next(gradients) if want else None for want in wanted]
