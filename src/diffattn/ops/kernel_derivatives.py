"""Derivatives of the kernels' operators, of every order, in both modes, under every transform of `torch.func`.

A kernel has two operators, NAME and NAME_backward:

    NAME             its backward pass is the operator NAME_backward
    NAME_backward    its backward pass, which a second derivative takes, is that of `gradients` below
    forward mode     tensors with tangents are computed by `output` and `gradients` instead of the kernel
    vmap             the new dimension is folded into the batch, and the kernel called once

The formulas are on tensors, in float32 at least. They hold both maps and what is made of them, O(B·H·T·S), where a
kernel holds no map: a second derivative costs the memory of `reference`.

The operators have an autograd kernel of their own because the one that `torch.library.register_autograd` makes drops
tangents without a word, and does not work within `torch.func`. It is otherwise the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffattn.ops import torch_private
from diffattn.ops.backend import refusal
from diffattn.ops.derivatives import has_tangent, pullback, transformed
from diffattn.ops.reference import Call, apply_map, as_lam, of_signals, softmax_map
from diffattn.ops.visibility import seeing_queries, visible_in_ranges, visible_keys


class Operators(NamedTuple):
    """The two operators of a kernel, whose last arguments are `queries`, `causal` and `scale`.

    NAME_backward takes the gradient of the output, the tensors of NAME, what NAME saved, `causal` and `scale`. It
    returns a gradient for each tensor in front of `queries`; what it returns for one that is None is not read.
    """

    name: str
    output: Callable[..., tuple[Tensor, ...]]
    """The formulas of NAME, with anything for what its backward pass alone reads."""
    gradients: Callable[..., tuple[Tensor, ...]]
    """The formulas of NAME_backward."""
    batch_of_inputs: tuple[int, ...]
    """The dimension of each tensor that is the batch."""
    batch_of_outputs: tuple[int, ...]
    """The dimension of each output that is the batch."""
    saved: int
    """The number of outputs, the last ones, that its backward pass reads."""


# True while calls of the operators, and later derivatives of them, are to be the kernel's or an error.
_ALONE = ContextVar("_ALONE", default=False)


@contextmanager
def without_formulas() -> Iterator[None]:
    """Within this, calls of the operators raise `UnsupportedError` for derivatives that the kernel does not have."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def with_formulas(wanted: bool) -> AbstractContextManager[None]:
    """Within this, calls of the operators have all derivatives if they are wanted, else `without_formulas`."""
    # A compiled graph has no second derivatives.
    return nullcontext() if wanted or torch.compiler.is_compiling() else without_formulas()


def arguments_of(
    call: Call,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None, bool, float]:
    """Returns q1, k1, q2, k2 (None where both maps share their keys), v, lam, queries, causal and scale of a call.

    λ is (B, T, H), in float32 at least; padding is among `queries`.
    """
    q1, k1, q2, k2, v, lam, causal, scale, key_padding, queries = call
    if queries is None and key_padding is not None:
        queries = seeing_queries(q1.shape[1], k1.shape[1], causal, key_padding)
    scale = 1.0 / math.sqrt(q1.shape[-1]) if scale is None else scale
    return q1, k1, q2, None if k2 is k1 else k2, v, as_lam(lam, v).expand(q1.shape[:3]), queries, causal, scale


def no_forward_mode(backend: str) -> str:
    """Returns the sentence of a backend that refuses a derivative in forward mode."""
    return f"{backend}: derivatives in forward mode are not supported"


def output(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor,
    queries: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """Returns the output (B, T, H, Dv). `k2` is None where both maps share their keys."""
    map_pos, map_neg, lam_BHT1 = _maps(q1, k1, q2, k2, lam, queries, causal, scale)
    return apply_map(map_pos - lam_BHT1 * of_signals(map_neg, q1.shape[2]), v.to(map_pos.dtype)).to(v.dtype)


def gradients(
    d_output: Tensor,
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor,
    queries: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Returns the gradients of q1, k1, q2, k2 (None where there is none), v and lam."""
    map_pos, map_neg, lam_BHT1 = _maps(q1, k1, q2, k2, lam, queries, causal, scale)
    G, wide = k1.shape[2], map_pos.dtype

    def of_group(map_BHTS: Tensor, x_BTHD: Tensor) -> Tensor:
        """mapᵀ x, summed over the heads of each group: (B, S, G, D)."""
        return torch.einsum("bgrts,btgrd->bsgd", map_BHTS.unflatten(1, (G, -1)), x_BTHD.unflatten(2, (G, -1)).to(wide))

    H, dtype = q1.shape[2], v.dtype
    map_neg = of_signals(map_neg, H)
    d_map = torch.einsum("bthe,bshe->bhts", d_output.to(wide), v.to(wide).repeat_interleave(H // G, dim=2))
    d_row1, d_row2 = ((m * d_map).sum(-1, keepdim=True) for m in (map_pos, map_neg))
    d_scores1 = scale * map_pos * (d_map - d_row1)
    d_scores2 = -scale * lam_BHT1 * map_neg * (d_map - d_row2)
    # Of a noise head, over the heads that subtract it.
    d_scores2 = d_scores2.unflatten(1, (q2.shape[2], -1)).sum(2)
    d_q1 = apply_map(d_scores1, k1.to(wide))
    d_q2 = apply_map(d_scores2, (k1 if k2 is None else k2).to(wide))
    d_k1, d_k2 = of_group(d_scores1, q1), of_group(d_scores2, q2)
    d_k1 = d_k1 + d_k2 if k2 is None else d_k1
    d_v = of_group(map_pos - lam_BHT1 * map_neg, d_output)
    d_lam = -d_row2.squeeze(-1).transpose(1, 2)
    return (
        d_q1.to(dtype),
        d_k1.to(dtype),
        d_q2.to(dtype),
        None if k2 is None else d_k2.to(dtype),
        d_v.to(dtype),
        d_lam.to(lam.dtype),
    )


def _maps(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor | None,
    lam: Tensor,
    queries: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the maps (B, H, T, S) and (B, Hn, T, S) and λ (B, H, T, 1), in float32 at least."""
    T, S = q1.shape[1], k1.shape[1]
    visible = visible_keys(T, S, causal, None, q1.device) if queries is None else visible_in_ranges(queries, T)
    q1, k1, q2, k2 = (x.to(lam.dtype) for x in (q1, k1, q2, k1 if k2 is None else k2))
    map_pos, map_neg = softmax_map(q1, k1, scale, visible), softmax_map(q2, k2, scale, visible)
    return map_pos, map_neg, lam.transpose(1, 2)[..., None]


def register(operators: Operators) -> None:
    """Registers all of this for the operators of a kernel, once they are defined."""
    name, backward_name = operators.name, f"{operators.name}_backward"
    number = len(operators.batch_of_inputs)
    saved_batches = operators.batch_of_outputs[len(operators.batch_of_outputs) - operators.saved :]
    backward_op = getattr(torch.ops.diffattn, backward_name)

    def backward(ctx: Any, d_output: Tensor, *unread: Tensor) -> tuple[Any, ...]:
        # Read once: gradient checkpointing gives each of them out once.
        every = ctx.saved_tensors
        tensors, saved = every[:number], every[number:]
        # The formulas do not read what was saved, so that it has no derivative.
        grads = backward_op(d_output, *tensors, *(x.detach() for x in saved), *ctx.numbers)
        of_tensors = (None if x is None else grad for x, grad in zip(tensors[:-1], grads, strict=True))
        return (*of_tensors, None, None, None)

    def second_backward(ctx: Any, *d_gradients: Tensor) -> tuple[Any, ...]:
        if ctx.alone:
            raise refusal(f"{name}: second derivatives are not supported")
        arguments = (*ctx.saved_tensors, *ctx.numbers)
        return tuple(pullback(operators.gradients, arguments, ctx.needs_input_grad[1:], d_gradients))

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        outputs = getattr(torch.ops.diffattn, name)(*_fold(info, in_dims, args, operators.batch_of_inputs))
        dims = operators.batch_of_outputs
        return tuple(_unfold(info, x, dim) for x, dim in zip(outputs, dims, strict=True)), dims

    def vmap_of_backward(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        batches = (0, *operators.batch_of_inputs, *saved_batches)
        grads = backward_op(*_fold(info, in_dims, args, batches))
        # What stands for the gradient of a tensor that is not given has no batch.
        given = zip(args[1:number], operators.batch_of_inputs[:-1], strict=True)
        dims = tuple(None if x is None else dim for x, dim in given)
        unfolded = (g if dim is None else _unfold(info, g, dim) for g, dim in zip(grads, dims, strict=True))
        return tuple(unfolded), dims

    _register(name, name, operators.output, backward, operators.saved)
    _register(backward_name, name, operators.gradients, second_backward, 0)
    torch.library.register_vmap(f"diffattn::{name}", vmap)
    torch.library.register_vmap(f"diffattn::{backward_name}", vmap_of_backward)


def register_output(
    name: str, differentiable: Callable[..., Tensor], batch_of_inputs: tuple[int, ...], batch_of_output: int
) -> None:
    """Registers vmap, and what computes the same with derivatives, for an operator that returns the output alone."""
    op = getattr(torch.ops.diffattn, name).default

    def kernel(keyset: Any, *args: Any) -> Tensor:
        if _tangents(args) or _wants_gradients(args):
            return differentiable(*args)
        with torch_private.below_autograd():
            return op.redispatch(keyset & torch_private.AFTER_AUTOGRAD, *args)

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        folded = _fold(info, in_dims, args, batch_of_inputs)
        return _unfold(info, op(*folded), batch_of_output), batch_of_output

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    torch.library.register_vmap(f"diffattn::{name}", vmap)


def _tangents(args: Sequence[Any]) -> bool:
    """Tells whether a derivative in forward mode is taken with respect to an argument, at this level of transforms."""
    # While a graph is traced, which a mode does, `transformed` does not see forward mode.
    return (transformed() or torch_private.modes_that_see_operators() > 0) and any(has_tangent(x) for x in args)


def _wants_gradients(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and torch_private.any_requires_grad(*args)


def _register(
    name: str,
    backend: str,
    formulas: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Any, ...]],
    saved_outputs: int,
) -> None:
    """Registers an autograd kernel that calls the operator, or the formulas where an argument has a tangent."""
    op = getattr(torch.ops.diffattn, name).default
    after = torch_private.AFTER_AUTOGRAD

    class Node(torch_private.SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, ...]:
            # A Function switches both modes off, for the transforms outside of this one as well.
            with torch.enable_grad(), torch_private.forward_mode_enabled(True), torch_private.below_autograd():
                outputs = op.redispatch(keyset & after, *args)
            *tensors, causal, scale = args
            ctx.numbers, ctx.alone = (causal, scale), _ALONE.get()
            ctx.save_for_backward(*tensors, *outputs[len(outputs) - saved_outputs :])
            return outputs

        @staticmethod
        def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Any, ...]:
            with without_formulas() if ctx.alone else nullcontext():
                return (None, *backward(ctx, *d_outputs))

    Node.__name__ = Node.__qualname__ = name

    def kernel(keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        if _tangents(args):
            if _ALONE.get():
                raise refusal(no_forward_mode(backend))
            return formulas(*args)
        if _wants_gradients(args):
            # Within a transform this is its own level, which is all that this kernel is called for.
            inside = transformed()
            with torch_private.enable_single_level_autograd_function() if inside else nullcontext():
                return Node.apply(keyset, *args)  # type: ignore[attr-defined]
        with torch_private.below_autograd():
            return op.redispatch(keyset & after, *args)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _fold(info: Any, in_dims: Sequence[int | None], args: Sequence[Any], batches: Sequence[int]) -> list[Any]:
    """Arguments whose batch holds the new dimension too, in front; `batches` says where each tensor has its batch."""
    folded = []
    for i, (x, new) in enumerate(zip(args, in_dims, strict=True)):
        if isinstance(x, Tensor):
            batch = batches[i]
            if new is None:
                x = x.unsqueeze(batch).expand(*x.shape[:batch], info.batch_size, *x.shape[batch:])
            else:
                x = x.movedim(new, batch)
            x = x.flatten(batch, batch + 1)
        folded.append(x)
    return folded


def _unfold(info: Any, x: Tensor, batch: int) -> Tensor:
    return x.unflatten(batch, (info.batch_size, x.shape[batch] // info.batch_size))


# Registrations last as long as this object.
_LIBRARY = torch.library.Library("diffattn", "FRAGMENT")
