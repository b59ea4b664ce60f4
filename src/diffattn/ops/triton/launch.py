"""The operators of `operator.py` on a device: arguments checked, views taken, kernels launched.

Kernels get pointers, which carry no sizes, so that everything is checked that they would read beyond. Triton is
imported by the first launch.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from diffattn.config_fields import dtype_name
from diffattn.errors import ConfigError
from diffattn.ops.triton.configs import MOST_DECODED

# Rows at most that a group's heads make with the queries that are decoded.
DECODING_ROWS = 64


def few(queries: int, heads: int, groups: int) -> bool:
    """Tells whether a call without gradients is decoded: its queries of a group are the rows of one tile."""
    return queries <= MOST_DECODED and heads // groups * queries <= DECODING_ROWS


def _kernels(name: str) -> Any:
    """A module of kernels, which imports Triton."""
    return importlib.import_module(f"diffattn.ops.triton.{name}")


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its pointers are of."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _dense(x: Tensor) -> Tensor:
    """The tensor with unit stride along the width."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _apart(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q1 (B, T, Hn, R, D), k1, q2 and k2 as views; the same object as k1 and k2 where there is one k."""
    q, keys = _dense(q), _dense(k).unbind(3)
    if q.shape[3] < 2 or len(keys) not in (1, 2):
        raise ConfigError(
            f"queries of {q.shape[3]} maps and keys of {len(keys)}",
            "queries of 2 or more and keys of 1 or 2",
            "join the maps",
        )
    return q[:, :, :, :-1], keys[0], q[:, :, :, -1], keys[-1]


def _ready(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    lam: Tensor,
    queries: Tensor | None,
    causal: bool,
    operator: str,
) -> Tensor | None:
    """Checks everything that the kernels would read beyond, and returns `queries` as they read it."""
    q1, k1, q2, k2, v = inputs
    B, T, noise_heads, R, D = q1.shape
    S, G = k1.shape[1:3]
    way_out = f"call diff_attention, which checks its arguments, and not the operator {operator}"
    fit = q2.shape == (B, T, noise_heads, D) and k1.shape == k2.shape == (B, S, G, D) and v.shape[:3] == (B, S, G)
    if not fit or noise_heads % G:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ConfigError(f"q1, k1, q2, k2 and v of {shapes}", "shapes that fit each other", way_out)
    if any(x.dtype != v.dtype for x in inputs):
        raise ConfigError(f"dtypes {', '.join(dtype_name(x.dtype) for x in inputs)}", "one dtype", way_out)
    wanted = (B, T, noise_heads * R)
    if lam.dtype != torch.float32 or lam.shape != wanted:
        raise ConfigError(
            f"lam of {dtype_name(lam.dtype)} {tuple(lam.shape)}", f"float32 {wanted}: batch, queries, heads", way_out
        )
    if queries is None:
        if causal and T > S:
            raise ConfigError(f"{T} causal queries over {S} keys", "at least as many keys as queries", way_out)
        return None
    if queries.dtype != torch.int32 or queries.shape != (2, B, S):
        raise ConfigError(
            f"queries of {dtype_name(queries.dtype)} {tuple(queries.shape)}", f"int32 {(2, B, S)}", way_out
        )
    return queries.contiguous()


def _with_own_maps(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Returns the same with q1 (B, T, H, D) where each head subtracts a noise map of its own, else None."""
    q1, *others = inputs
    return (q1.squeeze(3), *others) if q1.shape[3] == 1 else None  # type: ignore[return-value]


def _forward(inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], lam: Tensor, **options: Any) -> Any:
    own = _with_own_maps(inputs)
    if own is None:
        return _kernels("shared_forward").forward(*inputs, lam, **options)
    return _kernels("forward").forward(*own, lam, **options)


def forward(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, queries: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (*_apart(q, k), _dense(v))
    queries = _ready(inputs, lam, queries, causal, "fused_triton")
    with _on(v.device):
        output, o2, lse = _forward(inputs, lam, causal=causal, scale=scale, queries=queries)
    return output, o2, lse


def backward(
    d_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor,
    queries: Tensor | None,
    output: Tensor,
    o2: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = _dense(q)
    inputs = (*_apart(q, k), _dense(v))
    queries = _ready(inputs, lam, queries, causal, "fused_triton_backward")
    if d_output.shape != output.shape or d_output.dtype != v.dtype:
        raise ConfigError(
            f"d_output of {dtype_name(d_output.dtype)} {tuple(d_output.shape)}",
            f"{dtype_name(v.dtype)} {tuple(output.shape)}, as the output",
            "take the gradient of what fused_triton returned",
        )
    saved = (output.contiguous(), o2.contiguous(), lse.contiguous())
    options = {"causal": causal, "scale": scale, "queries": queries}
    own = _with_own_maps(inputs)
    with _on(v.device):
        if own is not None:
            return _kernels("backward").backward(d_output, *own, lam, *saved, **options)
        _, k1, _, k2, v = inputs
        return _kernels("shared_backward").backward(d_output, q, k1, k2, v, lam, *saved, **options)


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
    q1, k1, q2, v = (_dense(x) for x in (q1, k1, q2, v))
    if q1.dim() == 4:
        q1 = q1.unflatten(2, (q2.shape[2], -1))
    inputs = (q1, k1, q2, k1 if k2 is None else _dense(k2), v)
    queries = _ready(inputs, lam, queries, causal, "fused_triton_output")
    with _on(v.device):
        if few(lam.shape[1], lam.shape[2], k1.shape[2]):
            return _kernels("decoding").decode(*inputs, lam, causal=causal, scale=scale, queries=queries)
        return _forward(inputs, lam, causal=causal, scale=scale, queries=queries, save=False)[0]


def decoding(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lam: Tensor,
    queries: Tensor | None,
    scale: float,
    gain: Tensor | None,
    norm_scale: float,
    eps: float | None,
    causal: bool,
    signals_per_noise: int,
) -> Tensor:
    q = query.transpose(1, 2).unflatten(2, (-1, signals_per_noise + 1))
    k = key.transpose(1, 2).unflatten(3, (-1, query.shape[3]))
    v = _dense(value.transpose(1, 2))
    inputs = (*_apart(q, k), v)
    lam = lam.expand(*q.shape[:2], q.shape[2] * signals_per_noise)
    queries = _ready(inputs, lam, queries, causal, "fused_triton_decoding")
    if gain is not None and gain.shape != v.shape[3:]:
        raise ConfigError(f"gain of {tuple(gain.shape)}", f"{tuple(v.shape[3:])}, the width of a value", "correct it")
    with _on(v.device):
        return _kernels("decoding").decode(
            *inputs, lam, causal=causal, scale=scale, queries=queries,
            gain=None if gain is None else gain.contiguous(), norm_scale=norm_scale, eps=eps,
        )  # fmt: skip
