"""`diff_attention()`: one function, a table of backends, and every check of its arguments.

A backend is asked whether it supports a call and answers None or one sentence that begins with its name. "auto" takes
the first backend of the table that answers None. A backend asked for by name serves the call or raises its sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffattn.errors import ConfigError, UnsupportedError
from diffattn.ops import fused_cpu
from diffattn.ops.reference import diff_attention_reference
from diffattn.ops.standard import standard_diff_attention

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Backend(NamedTuple):
    """A way to compute differential attention. Both members take the arguments of `diff_attention`, less `backend`."""

    run: Callable[..., Tensor]
    supports: Callable[..., str | None]


def _supports_everything(*args: Any, **options: Any) -> str | None:
    return None


BACKENDS: dict[str, Backend] = {
    "fused_cpu": Backend(fused_cpu.fused_cpu_diff_attention, fused_cpu.unsupported),
    "standard": Backend(standard_diff_attention, _supports_everything),
    "reference": Backend(diff_attention_reference, _supports_everything),
}


def diff_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor | float,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_padding: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Differential attention: the difference of two softmax maps, applied to the values.

        output = (softmax(scale · q1 k1ᵀ) − lam · softmax(scale · q2 k2ᵀ)) v

    Args:
        q1, q2: queries of the signal map and of the noise map, each (B, T, H, D). The paper's Q1, Q2.
        k1, k2: their keys, each (B, S, G, D), with H a multiple of G; query head h reads group h // (H / G).
            V2 passes the same tensor as both, which also halves the width of the call.
        v: values (B, S, G, Dv). V1 has Dv = 2D, V2 has Dv = D; any width works.
        lam: λ, a float or a floating-point tensor that broadcasts to (B, T, H): (), (H,), (T, H), (B, T, H) …
            It is used in float32 beside float16, bfloat16 and float32 inputs, in float64 beside float64 ones.
        causal: bottom-right aligned, with S ≥ T: query t sees keys up to S − T + t. For T = 3, S = 5:

                1 1 1 0 0
                1 1 1 1 0
                1 1 1 1 1

        scale: factor of the scores, above 0; default 1/√D. V1's D is the half width, not that of the values.
        key_padding: bool (B, S), True where a key is padding and is ignored, as in PyTorch's `key_padding_mask`.
            A query that sees no key at all gives zeros.
        backend: "auto", or a name from the table `BACKENDS`: "fused_cpu" (the compiled kernel, for float32 and bfloat16
            on CPU), "standard" (one scaled_dot_product_attention call) or "reference" (the definition, which holds
            both maps in memory).

    The inputs share one device and one dtype: float16, bfloat16, float32 or float64.

    Returns:
        (B, T, H, Dv) in v's dtype. No norm and no factor (1 − λ_init) is applied: those belong to V1's layer.

    Raises:
        ConfigError: shapes, dtypes or options that cannot work, or a backend name that is not in the table.
        UnsupportedError: the backend that was asked for by name cannot serve this call.

    Source: arXiv 2410.05258v2, section 2.1, equation 1.

    >>> q1, k1, q2, k2 = (torch.randn(2, 5, 4, 8) for _ in range(4))
    >>> diff_attention(q1, k1, q2, k2, torch.randn(2, 5, 4, 16), lam=0.8).shape
    torch.Size([2, 5, 4, 16])
    """
    _check_tensors(q1, k1, q2, k2, v)
    _check_options(q1, k1, lam, causal, scale, key_padding)
    args = (q1, k1, q2, k2, v, lam)
    options: dict[str, Any] = {"causal": causal, "scale": scale, "key_padding": key_padding}

    if backend == "auto":
        reasons = []
        for candidate in BACKENDS.values():
            reason = candidate.supports(*args, **options)
            if reason is None:
                return candidate.run(*args, **options)
            reasons.append(reason)
        raise UnsupportedError("; ".join(reasons))
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r} is unknown; choose one of {', '.join(['auto', *BACKENDS])}")
    reason = BACKENDS[backend].supports(*args, **options)
    if reason is not None:
        raise UnsupportedError(reason)
    return BACKENDS[backend].run(*args, **options)


def _check_tensors(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor) -> None:
    """Ranks, dtypes, devices and shapes of the five tensors, in the order in which a mistake is easiest to read."""
    tensors = {"q1": q1, "k1": k1, "q2": q2, "k2": k2, "v": v}
    for name, x in tensors.items():
        if x.dim() != 4:
            raise ConfigError(
                f"{name} has {x.dim()} dimensions, {_shape(x)}; wanted (batch, sequence, heads, width): "
                "unflatten the width of a projection into heads first"
            )
        if 0 in x.shape[2:]:
            raise ConfigError(f"{name} is {_shape(x)}; wanted at least one head and a width of at least 1")
    if any((x.dtype, x.device) != (q1.dtype, q1.device) for x in tensors.values()):
        given = ", ".join(f"{name} {_dtype(x)} on {x.device}" for name, x in tensors.items())
        raise ConfigError(f"inputs mix dtypes or devices ({given}); wanted one of each: cast or move them with .to()")
    if q1.dtype not in DTYPES:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ConfigError(f"inputs are {_dtype(q1)}; wanted one of {wanted}: cast them with .to()")
    for first, second in (("q1", "q2"), ("k1", "k2")):
        if tensors[first].shape != tensors[second].shape:
            raise ConfigError(
                f"{first} is {_shape(tensors[first])} and {second} is {_shape(tensors[second])}; "
                "wanted equal shapes: both maps have the same heads and width"
            )
    if q1.shape[-1] != k1.shape[-1]:
        raise ConfigError(
            f"q1 has width {q1.shape[-1]} and k1 has width {k1.shape[-1]}; wanted the same width: "
            "V1 passes halves, q1 with k1 and q2 with k2, never the two halves joined"
        )
    if not q1.shape[0] == k1.shape[0] == v.shape[0]:
        raise ConfigError(
            f"batch is {q1.shape[0]} in q1, {k1.shape[0]} in k1 and {v.shape[0]} in v; wanted one batch size: "
            "expand() the smaller ones"
        )
    if k1.shape[1:3] != v.shape[1:3]:
        raise ConfigError(
            f"k1 is {_shape(k1)} and v is {_shape(v)}; wanted the same sequence and groups, (B, S, G): "
            "each key belongs to one value"
        )
    if q1.shape[2] % k1.shape[2]:
        raise ConfigError(
            f"{q1.shape[2]} query heads cannot share {k1.shape[2]} key/value groups; "
            "wanted a multiple of the groups: change either number"
        )


def _check_options(
    q1: Tensor, k1: Tensor, lam: Tensor | float, causal: bool, scale: float | None, key_padding: Tensor | None
) -> None:
    """λ, the scale and the masks, against shapes that have been checked."""
    batch, queries, heads, _ = q1.shape
    keys = k1.shape[1]
    if causal and queries > keys:
        raise ConfigError(
            f"{queries} queries over {keys} keys with causal=True: the first {queries - keys} would see no key; "
            "wanted keys >= queries: pass the cached keys too, or causal=False"
        )
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ConfigError(f"scale={scale}; wanted a finite number above 0, or None for 1/sqrt(D)")
    if isinstance(lam, Tensor):
        if not lam.dtype.is_floating_point:
            raise ConfigError(f"lam is {_dtype(lam)}; wanted a floating-point dtype: cast it with .float()")
        # Broadcasting aligns from the right; a dimension may be missing, 1, or equal.
        wanted = (batch, queries, heads)[max(0, 3 - lam.dim()) :]
        if lam.dim() > 3 or any(n not in (1, m) for n, m in zip(lam.shape, wanted, strict=True)):
            raise ConfigError(
                f"lam is {_shape(lam)}; wanted a shape that broadcasts to (batch, queries, heads) = "
                f"({batch}, {queries}, {heads}): for one value per sequence use lam[:, None, None]"
            )
    elif not isinstance(lam, int | float):
        raise ConfigError(f"lam is a {type(lam).__name__}; wanted a float or a tensor: wrap it in torch.tensor()")
    if key_padding is not None and (key_padding.dtype != torch.bool or key_padding.shape != (batch, keys)):
        raise ConfigError(
            f"key_padding is {_dtype(key_padding)} {_shape(key_padding)}; wanted bool ({batch}, {keys}), "
            "True where a key is padding: for a 1/0 attention_mask pass attention_mask == 0"
        )


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
