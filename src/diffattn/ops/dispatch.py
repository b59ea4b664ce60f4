"""`diff_attention()`: one function, a table of backends, and every check of its arguments.

A backend is asked whether it supports a call and answers None or one sentence that begins with its name. "auto" takes
the first backend of the table that answers None. A backend asked for by name serves the call or raises its sentence.
"""

from __future__ import annotations

import math
import numbers
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffattn.config_fields import DTYPES, dtype_name
from diffattn.errors import ConfigError
from diffattn.ops.backend import Backend, installed, load, refusal
from diffattn.ops.cpu import operator as fused_cpu
from diffattn.ops.reference import Call, apply_map, diff_maps_reference
from diffattn.ops.standard import standard_diff_attention
from diffattn.ops.triton import operator as fused_triton
from diffattn.ops.visibility import packed_queries, ranges_of

# Inputs of these are taken: the dtypes that a configuration may name.
_TAKEN = tuple(getattr(torch, name) for name in DTYPES)


def _supports_everything(call: Call) -> str | None:
    return None


def _by_definition(call: Call) -> Tensor:
    return apply_map(diff_maps_reference(call).map_diff, call.v)


_ANY_DEVICE = "every device of PyTorch"
BACKENDS: dict[str, Backend] = {
    "fused_cpu": Backend(
        "fused_cpu",
        "CPU, on Linux and macOS",
        fused_cpu.unsupported,
        fused_cpu.fused_cpu_diff_attention,
        partial(fused_cpu.fused_cpu_diff_attention, formulas=False),
        packs=True,
        shares_noise=True,
    ),
    "fused_triton": Backend(
        "fused_triton",
        "GPUs of NVIDIA and AMD, with Triton",
        fused_triton.unsupported,
        fused_triton.fused_triton_diff_attention,
        partial(fused_triton.fused_triton_diff_attention, formulas=False),
        fused_triton.passed_over,
        packs=True,
        shares_noise=True,
    ),
    "standard": Backend(
        "standard", _ANY_DEVICE, _supports_everything, standard_diff_attention, packs=True, shares_noise=True
    ),
    "reference": Backend("reference", _ANY_DEVICE, _supports_everything, _by_definition, packs=True, shares_noise=True),
}
# The backends of other packages that were asked for in this process.
_loaded: dict[str, Backend] = {}


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
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Differential attention: the difference of two softmax maps, applied to the values.

        output = (softmax(scale · q1 k1ᵀ) − lam · softmax(scale · q2 k2ᵀ)) v

    Args:
        q1, q2: queries of the signal maps (B, T, H, D) and of the noise maps (B, T, Hn, D). The paper's Q1, Q2 have
            Hn = H; in grouped differential attention H is a multiple of Hn, and output head h subtracts the map of
            noise head h // (H / Hn), which the fused kernels compute once.
        k1, k2: their keys, each (B, S, G, D), with Hn a multiple of G; query head h of H or Hn reads group
            h // (H / G) or h // (Hn / G).
            V2 passes the same tensor as both, which also halves the width of the call.
        v: values (B, S, G, Dv). V1 has Dv = 2D, V2 has Dv = D; any width works.
        lam: λ, a number or a floating-point tensor that broadcasts to (B, T, H): (), (H,), (T, H), (B, T, H) …
            It is used in float32 beside float16, bfloat16 and float32 inputs, in float64 beside float64 ones.
        causal: bottom-right aligned, with S ≥ T: query t sees keys up to S − T + t. For T = 3, S = 5:

                1 1 1 0 0
                1 1 1 1 0
                1 1 1 1 1

        scale: factor of the scores, above 0; default 1/√D. V1's D is the half width, not that of the values.
        key_padding: bool (B, S), True where a key is padding and is ignored, as in PyTorch's `key_padding_mask`.
            A query that sees no key at all gives zeros.
        cu_seqlens: integers (N + 1,), where a row (B = 1, T = S) holds N sequences one behind another, each of which
            sees itself alone: the tokens at which they begin, and T behind them, as flash attention takes them. The
            fused kernels hold no tensor of T × T for it. Values on a GPU are not checked, which would wait for it.
        window: how far a query sees, or None for no limit. With `causal` a query sees the last `window` keys up to its
            own, itself among them; without, the keys at most `window` away on either side. Counted within a sequence.
        backend: "auto", or a name from the table `BACKENDS`: "fused_cpu" (the compiled kernel, for float32, bfloat16
            and float16 on CPU), "fused_triton" (Triton kernels, for bfloat16 and float16 on a GPU), "standard" (one
            scaled_dot_product_attention call) or "reference" (the definition, which holds both maps in memory); or
            the name of a backend that another package brings.

    The inputs share one device and one dtype: float16, bfloat16, float32 or float64. Numbers may be numpy's.

    Derivatives of every order, in reverse and in forward mode and under the transforms of `torch.func`, are those of
    the definition. Forward mode and the second derivative hold both maps in memory; "fused_cpu" and "fused_triton"
    refuse them where they were asked for by name.

    Returns:
        (B, T, H, Dv) in v's dtype. No norm and no factor (1 − λ_init) is applied: those belong to V1's layer.

    Raises:
        ConfigError: shapes, dtypes or options that cannot work, or the name of a backend that there is not.
        UnsupportedError: the backend that was asked for by name cannot serve this call, or a derivative of it, or
            cannot be loaded.

    Source: arXiv 2410.05258v2, section 2.1, equation 1.

    >>> q1, k1, q2, k2 = (torch.randn(2, 5, 4, 8) for _ in range(4))
    >>> diff_attention(q1, k1, q2, k2, torch.randn(2, 5, 4, 16), lam=0.8).shape
    torch.Size([2, 5, 4, 16])
    """
    _check_tensors(q1, k1, q2, k2, v)
    lam, causal = _checked_lam(lam, q1), _python(causal)
    _check_masks(q1, k1, causal, key_padding)
    if scale is not None:
        scale = _number("scale", scale, v.dtype)
        if scale < torch.finfo(torch.float32).tiny:
            raise ConfigError(f"scale={scale}", "a number above 0, at least 1.2e-38", "pass None for 1/sqrt(D)")
    window = _checked_window(window, q1, k1)
    call = Call(q1, k1, q2, k2, v, lam, causal, scale, key_padding)
    if cu_seqlens is not None:
        cu_seqlens = _checked_cu_seqlens(cu_seqlens, q1, k1)
        queries = packed_queries(cu_seqlens, q1.shape[1], causal, key_padding, window)
        call = call._replace(key_padding=None, queries=queries)
    elif window is not None:
        call = call._replace(key_padding=None, queries=ranges_of(q1, k1, causal, key_padding, window))

    if backend == "auto":
        reasons = []
        for candidate in BACKENDS.values():
            reason = candidate.refuses(call) or candidate.passed_over(call)
            if reason is None:
                return candidate.run(call)
            reasons.append(reason)
        raise refusal("; ".join(reasons))
    if not isinstance(backend, str):
        raise ConfigError(f"backend={backend!r}", "the name of a backend", 'pass text, such as "auto"')
    named = BACKENDS.get(backend) or _of_another_package(backend)
    reason = named.refuses(call)
    if reason is not None:
        raise refusal(reason)
    return (named.run_by_name or named.run)(call)


def _of_another_package(name: str) -> Backend:
    """Returns a backend that another package brings, imported once in a process."""
    if name not in _loaded:
        others = installed()
        if name not in others:
            known = ", ".join(["auto", *BACKENDS, *others])
            raise ConfigError(f"backend={name!r}", f"one of {known}", "correct the name, or install its package")
        _loaded[name] = load(others[name])
    return _loaded[name]


def _check_tensors(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor) -> None:
    """Checks ranks, dtypes, devices and shapes of the five tensors, in the order that makes a mistake easy to read."""
    tensors = {"q1": q1, "k1": k1, "q2": q2, "k2": k2, "v": v}
    for name, x in tensors.items():
        _check_dense(name, x)
        if x.dim() != 4:
            raise ConfigError(
                f"{name} has {x.dim()} dimensions, {_shape(x)}",
                "(batch, sequence, heads, width)",
                "unflatten the width of a projection into heads first",
            )
        if 0 in x.shape[2:]:
            raise ConfigError(f"{name} is {_shape(x)}", "at least one head and a width of at least 1", "correct it")
    if any((x.dtype, x.device) != (q1.dtype, q1.device) for x in tensors.values()):
        given = ", ".join(f"{name} {_dtype(x)} on {x.device}" for name, x in tensors.items())
        raise ConfigError(
            f"inputs mix dtypes or devices ({given})", "one dtype and one device", "cast or move them with .to()"
        )
    if q1.dtype not in _TAKEN:
        raise ConfigError(f"inputs are {_dtype(q1)}", f"one of {', '.join(DTYPES)}", "cast them with .to()")
    if k1.shape != k2.shape:
        raise ConfigError(
            f"k1 is {_shape(k1)} and k2 is {_shape(k2)}", "equal shapes", "give both maps the same groups and width"
        )
    if (*q1.shape[:2], q1.shape[3]) != (*q2.shape[:2], q2.shape[3]):
        raise ConfigError(
            f"q1 is {_shape(q1)} and q2 is {_shape(q2)}",
            "equal shapes, but for the heads",
            "give both maps the same batch, queries and width",
        )
    if q1.shape[-1] != k1.shape[-1]:
        raise ConfigError(
            f"q1 has width {q1.shape[-1]} and k1 has width {k1.shape[-1]}",
            "the same width",
            "pass the halves of V1 alone, q1 with k1 and q2 with k2, and not joined",
        )
    if not q1.shape[0] == k1.shape[0] == v.shape[0]:
        raise ConfigError(
            f"batch is {q1.shape[0]} in q1, {k1.shape[0]} in k1 and {v.shape[0]} in v",
            "one batch size",
            "expand() the smaller ones",
        )
    if k1.shape[1:3] != v.shape[1:3]:
        raise ConfigError(
            f"k1 is {_shape(k1)} and v is {_shape(v)}",
            "the same sequence and groups, (B, S, G)",
            "give each key one value",
        )
    if q1.shape[2] % k1.shape[2]:
        raise ConfigError(
            f"{q1.shape[2]} query heads with {k1.shape[2]} key/value groups",
            "a multiple of the groups",
            "change either number",
        )
    if q1.shape[2] % q2.shape[2]:
        raise ConfigError(
            f"q1 has {q1.shape[2]} heads and q2 has {q2.shape[2]}",
            "a number of heads in q2 that divides the number in q1",
            "let each head of q2 be the noise of equally many heads of q1",
        )
    if q2.shape[2] % k1.shape[2]:
        raise ConfigError(
            f"q2 has {q2.shape[2]} heads with {k1.shape[2]} key/value groups",
            "a multiple of the groups",
            "give each group at least one head of q2, and each equally many",
        )


def _check_dense(name: str, x: Any) -> None:
    """Checks that `x` is a tensor whose elements lie in memory one by one, which is what every backend reads."""
    if not isinstance(x, Tensor):
        raise ConfigError(f"{name} is of type {_type(x)}", "a tensor", "make one of an array with torch.as_tensor()")
    if x.is_nested:
        raise ConfigError(f"{name} is a nested tensor", "a dense one", "pad it, and pass key_padding")
    if x.layout != torch.strided:
        raise ConfigError(f"{name} is {dtype_name(x.layout)}", "a dense tensor", "call .to_dense()")
    if x.is_quantized:
        raise ConfigError(f"{name} is quantized to {_dtype(x)}", "a dense tensor", "call .dequantize()")


def _python(x: Any) -> Any:
    """Returns numpy's scalars, and its arrays without dimensions, as Python's numbers, and the rest as it is."""
    return x if isinstance(x, int | float | Tensor) or getattr(x, "shape", None) != () else x.item()


def _number(name: str, x: Any, dtype: torch.dtype) -> float:
    """Returns a real number, Python's or numpy's, as a float that is finite in the dtype that backends compute in."""
    x = _python(x)
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        wanted = "a number or a tensor" if name == "lam" else "a number"
        raise ConfigError(f"{name} is of type {_type(x)}", wanted, f"pass float({name}) if it stands for one number")
    largest = torch.finfo(torch.promote_types(dtype, torch.float32)).max
    try:
        number = float(x)
    except OverflowError:
        number = math.inf
    if not abs(number) <= largest:
        raise ConfigError(f"{name}={number}", f"a finite number, at most {largest:.2g}", "see how it was computed")
    return number


def _checked_lam(lam: Any, q1: Tensor) -> Tensor | float:
    """Returns λ as a float or as a tensor that fits the queries."""
    if not isinstance(lam, Tensor):
        return _number("lam", lam, q1.dtype)
    _check_dense("lam", lam)
    if not lam.dtype.is_floating_point:
        raise ConfigError(f"lam is {_dtype(lam)}", "a floating-point dtype", "cast it with .float()")
    # A tensor of one number on the CPU goes with tensors on any device, as elsewhere in PyTorch.
    if lam.device != q1.device and not (lam.dim() == 0 and lam.device.type == "cpu"):
        raise ConfigError(f"lam is on {lam.device} and q1 on {q1.device}", "one device", "move it with .to()")
    batch, queries, heads, _ = q1.shape
    # Broadcasting aligns from the right; a dimension may be missing, 1, or equal.
    wanted = (batch, queries, heads)[max(0, 3 - lam.dim()) :]
    if lam.dim() > 3 or any(n not in (1, m) for n, m in zip(lam.shape, wanted, strict=True)):
        raise ConfigError(
            f"lam is {_shape(lam)}",
            f"a shape that broadcasts to (batch, queries, heads) = ({batch}, {queries}, {heads})",
            "for one value per sequence use lam[:, None, None]",
        )
    return lam


def _check_masks(q1: Tensor, k1: Tensor, causal: bool, key_padding: Tensor | None) -> None:
    """Checks what hides keys, once the shapes have been checked."""
    batch, queries, keys = q1.shape[0], q1.shape[1], k1.shape[1]
    if not isinstance(causal, bool):
        raise ConfigError(f"causal is of type {_type(causal)}", "True or False", "pass bool(causal)")
    if causal and queries > keys:
        raise ConfigError(
            f"{queries} queries over {keys} keys with causal=True, so that the first {queries - keys} would see no key",
            "at least as many keys as queries",
            "pass the cached keys too, or causal=False",
        )
    if key_padding is None:
        return
    _check_dense("key_padding", key_padding)
    if key_padding.dtype != torch.bool or key_padding.shape != (batch, keys):
        raise ConfigError(
            f"key_padding is {_dtype(key_padding)} {_shape(key_padding)}",
            f"bool ({batch}, {keys}), True where a key is padding",
            "for a 1/0 attention_mask pass attention_mask == 0",
        )
    if key_padding.device != q1.device:
        raise ConfigError(
            f"key_padding is on {key_padding.device} and q1 on {q1.device}", "one device", "move it with .to()"
        )


def _checked_cu_seqlens(cu_seqlens: Any, q1: Tensor, k1: Tensor) -> Tensor:
    """Returns where packed sequences begin, on the device of the queries, once that can be so."""
    _check_dense("cu_seqlens", cu_seqlens)
    batch, queries = q1.shape[:2]
    if batch != 1 or queries != k1.shape[1]:
        raise ConfigError(
            f"cu_seqlens with a batch of {batch}, {queries} queries and {k1.shape[1]} keys",
            "one row whose queries and keys are the same tokens",
            "lay the sequences one behind another in one row, (1, tokens, heads, width)",
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ConfigError(
            f"cu_seqlens is {_dtype(cu_seqlens)} {_shape(cu_seqlens)}",
            "int32 or int64 (sequences + 1,)",
            "pass where each sequence begins, and the number of tokens at the end",
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        begins = cu_seqlens.tolist()
        if begins[0] != 0 or begins[-1] != queries or begins != sorted(begins):
            shown = ", ".join(map(str, begins[:6])) + (", …" if len(begins) > 6 else "")
            raise ConfigError(
                f"cu_seqlens is {shown} with {queries} tokens",
                f"numbers that rise from 0 to {queries}",
                "add up the lengths of the sequences, with 0 in front",
            )
    return cu_seqlens.to(q1.device)


def _checked_window(window: Any, q1: Tensor, k1: Tensor) -> int | None:
    """Returns a window, or None where it hides nothing."""
    window = _python(window)
    if window is None:
        return None
    if isinstance(window, bool) or not isinstance(window, int):
        raise ConfigError(f"window is of type {_type(window)}", "a whole number or None", "pass int(window)")
    if window < 1:
        raise ConfigError(f"window={window}", "a whole number, at least 1", "pass None for no window")
    return None if window >= max(q1.shape[1], k1.shape[1]) else window


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _type(x: Any) -> str:
    return type(x).__name__


def _dtype(x: Tensor) -> str:
    return dtype_name(x.dtype)
