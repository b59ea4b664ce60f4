"""Derivatives of the fused kernel's operators, of every order, in both modes, under every transform of `torch.func`.

    fused_cpu             its backward pass is the operator `fused_cpu_backward`
    fused_cpu_backward    its backward pass, which a second derivative takes, is that of `gradients` below
    forward mode          tensors with tangents are computed by `output` and `gradients` instead of the kernel
    vmap                  the new dimension is folded into the batch, and the kernel called once

The formulas are those of `fused_cpu`, on tensors, in float32 at least. They hold both maps and what is made of them,
O(B·H·T·S), where the kernel holds no map: a second derivative costs the memory of `reference`.

The operators have an autograd kernel of their own because the one that `torch.library.register_autograd` makes drops
tangents without a word, and does not work within `torch.func`. It is otherwise the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from diffattn.ops import torch_private
from diffattn.ops.backend import refusal
from diffattn.ops.derivatives import has_tangent, pullback, transformed
from diffattn.ops.reference import apply_map, softmax_map
from diffattn.ops.visibility import visible_in_ranges, visible_keys

NO_FORWARD_MODE = "fused_cpu: derivatives in forward mode are not supported"
NO_SECOND_DERIVATIVE = "fused_cpu: second derivatives are not supported"

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
) -> tuple[Tensor, Tensor]:
    """Returns what the operator `fused_cpu` returns, with zeros for what its backward pass alone reads."""
    map_pos, map_neg, lam_BHT1 = _maps(q1, k1, q2, k2, lam, queries, causal, scale)
    B, T, H, _ = q1.shape
    rows = map_pos.new_zeros(4, B, H, T)
    return apply_map(map_pos - lam_BHT1 * map_neg, v.to(map_pos.dtype)).to(v.dtype), rows


def gradients(
    d_output: Tensor,
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor,
    queries: Tensor | None,
    rows: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns what the operator `fused_cpu_backward` returns."""
    map_pos, map_neg, lam_BHT1 = _maps(q1, k1, q2, k2, lam, queries, causal, scale)
    G, wide = k1.shape[2], map_pos.dtype

    def of_group(map_BHTS: Tensor, x_BTHD: Tensor) -> Tensor:
        """mapᵀ x, summed over the heads of each group: (B, S, G, D)."""
        return torch.einsum("bgrts,btgrd->bsgd", map_BHTS.unflatten(1, (G, -1)), x_BTHD.unflatten(2, (G, -1)).to(wide))

    heads = q1.shape[2] // G
    d_map = torch.einsum("bthe,bshe->bhts", d_output.to(wide), v.to(wide).repeat_interleave(heads, dim=2))
    d_row1, d_row2 = ((m * d_map).sum(-1, keepdim=True) for m in (map_pos, map_neg))
    d_scores1 = scale * map_pos * (d_map - d_row1)
    d_scores2 = -scale * lam_BHT1 * map_neg * (d_map - d_row2)
    d_q1 = apply_map(d_scores1, k1.to(wide))
    d_q2 = apply_map(d_scores2, (k1 if k2 is None else k2).to(wide))
    d_k1, d_k2 = of_group(d_scores1, q1), of_group(d_scores2, q2)
    if k2 is None:
        d_k1, d_k2 = d_k1 + d_k2, d_k1.new_empty(0)
    d_v = of_group(map_pos - lam_BHT1 * map_neg, d_output)
    d_lam = -d_row2.squeeze(-1).transpose(1, 2)
    dtype = v.dtype
    return d_q1.to(dtype), d_k1.to(dtype), d_q2.to(dtype), d_k2.to(dtype), d_v.to(dtype), d_lam.to(lam.dtype)


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
    """Returns both maps (B, H, T, S) and λ (B, H, T, 1), in float32 at least."""
    T, S = q1.shape[1], k1.shape[1]
    visible = visible_keys(T, S, causal, None, q1.device) if queries is None else visible_in_ranges(queries, T)
    q1, k1, q2, k2 = (x.to(lam.dtype) for x in (q1, k1, q2, k1 if k2 is None else k2))
    map_pos, map_neg = softmax_map(q1, k1, scale, visible), softmax_map(q2, k2, scale, visible)
    return map_pos, map_neg, lam.transpose(1, 2)[..., None]


def _backward(ctx: Any, d_output: Tensor, d_rows: Tensor) -> tuple[Any, ...]:
    *tensors, rows = ctx.saved_tensors
    grads = torch.ops.diffattn.fused_cpu_backward(d_output, *tensors, rows, *ctx.numbers)
    d_q1, d_k1, d_q2, d_k2, d_v, d_lam = grads
    return d_q1, d_k1, d_q2, (None if tensors[3] is None else d_k2), d_v, d_lam, None, None, None


def _second_backward(ctx: Any, *d_gradients: Tensor) -> tuple[Any, ...]:
    if ctx.alone:
        raise refusal(NO_SECOND_DERIVATIVE)
    arguments = (*ctx.saved_tensors, *ctx.numbers)
    return tuple(pullback(gradients, arguments, ctx.needs_input_grad[1:], d_gradients))


def _register(
    name: str, formulas: Callable[..., tuple[Tensor, ...]], backward: Callable[..., tuple[Any, ...]], saved_outputs: int
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
        inside = transformed()
        # While a graph is traced, which a mode does, `transformed` does not see forward mode.
        if (inside or torch_private.modes_that_see_operators()) and any(has_tangent(x) for x in args):
            if _ALONE.get():
                raise refusal(NO_FORWARD_MODE)
            return formulas(*args)
        if torch.is_grad_enabled() and torch_private.any_requires_grad(*args):
            # Within a transform this is its own level, which is all that this kernel is called for.
            with torch_private.enable_single_level_autograd_function() if inside else nullcontext():
                return Node.apply(keyset, *args)  # type: ignore[attr-defined]
        with torch_private.below_autograd():
            return op.redispatch(keyset & after, *args)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _fold(info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...], batch_dims: tuple[int, ...]) -> list[Any]:
    """Arguments whose batch holds the new dimension too, in front; `batch_dims` says where each has its batch."""
    folded = []
    for x, new, batch in zip(args, in_dims, batch_dims, strict=True):
        if isinstance(x, Tensor):
            if new is None:
                x = x.unsqueeze(batch).expand(*x.shape[:batch], info.batch_size, *x.shape[batch:])
            else:
                x = x.movedim(new, batch)
            x = x.flatten(batch, batch + 1)
        folded.append(x)
    return folded


def _unfold(info: Any, x: Tensor, batch: int = 0) -> Tensor:
    return x.unflatten(batch, (info.batch_size, x.shape[batch] // info.batch_size))


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    o, rows = torch.ops.diffattn.fused_cpu(*_fold(info, in_dims, args, (0, 0, 0, 0, 0, 0, 1, 0, 0)))
    return (_unfold(info, o), _unfold(info, rows, 1)), (0, 1)


def _vmap_of_backward(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    grads = torch.ops.diffattn.fused_cpu_backward(*_fold(info, in_dims, args, (0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0)))
    # The gradient of keys that are not given is empty and has no batch.
    dims = (0, 0, 0, None if args[4] is None else 0, 0, 0)
    return tuple(g if dim is None else _unfold(info, g) for g, dim in zip(grads, dims, strict=True)), dims


# Registrations last as long as this object.
_LIBRARY = torch.library.Library("diffattn", "FRAGMENT")


def register() -> None:
    """Registers all of this, once the operators are defined."""
    _register("fused_cpu", output, _backward, saved_outputs=1)
    _register("fused_cpu_backward", gradients, _second_backward, saved_outputs=0)
    torch.library.register_vmap("diffattn::fused_cpu", _vmap)
    torch.library.register_vmap("diffattn::fused_cpu_backward", _vmap_of_backward)
