"""Differential attention on a GPU as operators of PyTorch over the Triton kernels, and what they serve.

    fused_triton             output, O2 and both log-sum-exps, which its backward pass reads (see `forward.py`)
    fused_triton_backward    the gradients (see `backward.py`)
    fused_triton_output      the output alone, of calls without gradients; few queries are decoded (see `decoding.py`)
    fused_triton_decoding    the same for few queries as a layer calls it, with its norm

The first two take the maps' queries, and their keys, side by side in one tensor, as a layer's projections have them: so
that its gradients are written where they belong. The third takes them apart, so that no cache is copied to be read;
its q1 is (B, T, H, D) or, of each noise head its signal heads, (B, T, Hn, R, D).

Where R output heads subtract one noise map, R > 1, they are the signal heads of a noise head, its neighbours in front
of it, and the map is computed once for all of them (see `shared_forward.py`).

Nothing here imports Triton before a kernel is launched or asked for. Under `TRITON_INTERPRET=1` the operators serve the
CPU too, by Triton's interpreter.

Shape letters: B batch, T queries, S keys, H output heads, Hn noise heads, R = H / Hn signal heads of each, G key/value
groups, D width of q and k, Dv width of v.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from typing import Any

import torch
from torch import Tensor

from diffattn.config_fields import dtype_name
from diffattn.ops import derivatives, kernel_derivatives
from diffattn.ops.reference import Call
from diffattn.ops.torch_private import constant_while_compiled
from diffattn.ops.triton import configs, launch

DTYPES = (torch.bfloat16, torch.float16)
# Older ones were not tried. Those before 3.7.1 miscompile products with a transposed tile that was computed, on Hopper:
# our kernels transpose loaded tiles only.
OLDEST_TRITON = (3, 6)

# Widths of the kernels' tiles.
_TILES = (16, 32, 64, 128, 256)
# ROCm's PyTorch calls its devices cuda too.
_DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)

# `queries` and `causal` are those of `visibility.py`, q is (B, T, Hn, R + 1, D), λ is float32 (B, T, H).
_JOINED = "Tensor q, Tensor k, Tensor v, Tensor lam, Tensor? queries"
torch.library.define("diffattn::fused_triton", f"({_JOINED}, bool causal, float scale) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "diffattn::fused_triton_backward",
    f"(Tensor d_output, {_JOINED}, Tensor output, Tensor o2, Tensor lse, bool causal, float scale) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "diffattn::fused_triton_output",
    "(Tensor q1, Tensor k1, Tensor q2, Tensor? k2, Tensor v, Tensor lam, Tensor? queries, bool causal, float scale) "
    "-> Tensor",
)
torch.library.define(
    "diffattn::fused_triton_decoding",
    "(Tensor query, Tensor key, Tensor value, Tensor lam, Tensor? queries, float scale, Tensor? gain, "
    "float norm_scale, float? eps, bool causal, int signals_per_noise) -> Tensor",
)


def unsupported(call: Call) -> str | None:
    """Returns None where the kernels serve this call of `diff_attention`, else one sentence that says why not."""
    q1, k1, q2, k2, v, lam, *_ = call
    device = q1.device
    if device.type not in _DEVICES:
        return f"fused_triton: {device.type} inputs are not supported; it serves {', '.join(_DEVICES)}"
    if not q1.dtype == k1.dtype == q2.dtype == k2.dtype == v.dtype:
        return "fused_triton: inputs of several dtypes are not supported; cast them to one"
    if v.dtype == torch.float32:
        return (
            "fused_triton: float32 inputs are not supported, because GPUs multiply it fast only with a rounding to "
            "TF32; it serves bfloat16 and float16"
        )
    if v.dtype not in DTYPES:
        served = " and ".join(map(dtype_name, DTYPES))
        return f"fused_triton: {dtype_name(v.dtype)} inputs are not supported; it serves {served}"
    if derivatives.forward_mode(q1, k1, q2, k2, v, lam):
        return kernel_derivatives.no_forward_mode("fused_triton")
    return unavailable(device, *_tiles(q1.shape[-1], v.shape[-1]), k2 is k1)


def passed_over(call: Call) -> str | None:
    """Returns None where the kernels are the best choice for a call that they serve, else one sentence."""
    q1, k1, q2, k2, v, lam, *_ = call
    masked = call.key_padding is not None or call.queries is not None
    training = any(isinstance(x, Tensor) and x.requires_grad for x in (q1, k1, q2, k2, v, lam))
    shared = q2.shape[2] < q1.shape[2]
    return _passed_over(q1.device, q1.shape[-1], v.shape[-1], k2 is k1, q1.shape[1], training, masked, shared)


def _passed_over(
    device: torch.device,
    width: int,
    value_width: int,
    one_key: bool,
    queries: int,
    training: bool,
    masked: bool,
    shared: bool,
) -> str | None:
    widths = _tiles(width, value_width)
    training = training and torch.is_grad_enabled()
    reason = configs.passed_over(_chip_of(device), *widths, one_key, queries, training, masked, shared)
    return None if reason is None else f"fused_triton: {reason}"


def _tiles(width: int, value_width: int) -> tuple[int, int]:
    """The widths of the tiles that hold two widths, powers of two, which the block tables do not tell from them.

    Where a graph with free sizes is compiled, these are numbers.
    """
    first, second = (next((n for n in _TILES if w <= n), w) for w in (width, value_width))
    return first, second


def _chip_of(device: torch.device) -> str:
    return configs.chip_of(device)


constant_while_compiled(_chip_of)


def unavailable(device: torch.device, width: int, value_width: int, one_key: bool) -> str | None:
    """Returns None where Triton is installed and there are blocks for a device and two widths, else one sentence.

    `torch.compile` takes the answer as a constant.
    """
    if missing := triton_missing():
        return missing
    reason = configs.refusal(configs.chip_of(device), configs.shared_bytes(device), width, value_width, one_key)
    return None if reason is None else f"fused_triton: {reason}"


constant_while_compiled(unavailable)


@functools.cache
def triton_version() -> str | None:
    """Returns the version of the Triton that can be imported, or None."""
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return None


def triton_missing() -> str | None:
    """Returns None where Triton can be imported and is new enough, else one sentence: the reason and the way out."""
    version = triton_version()
    if version is None:
        return "fused_triton: Triton is not installed; install it with pip install triton"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return (
            f"fused_triton: Triton {version} is too old, {oldest} is the oldest that it runs on; "
            "install a newer PyTorch, which brings a newer Triton"
        )
    return None


def fused_triton_diff_attention(call: Call, *, formulas: bool = True) -> Tensor:
    """Differential attention through the Triton kernels, for calls to which `unsupported` answers None.

    Where k1 and k2 are one tensor object, the keys are read once. Where gradients are taken, queries and keys are
    copied side by side first; the operator `fused_triton` takes those that lie so already.

    Args:
        call: the arguments of `diffattn.ops.dispatch.diff_attention`, which also checks them.
        formulas: whether second derivatives, which the kernels do not have, are those of formulas on tensors, which
            hold both maps; otherwise one that is taken raises `UnsupportedError`.
    """
    with kernel_derivatives.with_formulas(formulas):
        return torch.ops.diffattn.fused_triton_output(*kernel_derivatives.arguments_of(call))


def refuses(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lam: Tensor,
    queries: Tensor | None,
    *,
    signals_per_noise: int = 1,
) -> str | None:
    """Returns None where `decode` or `attend` is to compute a layer's call, else one sentence; arguments as there.

    The sentence says why they do not serve the call, or which other way to compute it is faster.
    """
    one_key = key.shape[-1] == query.shape[-1]
    # Both keys lie in one tensor here: another object says that they are two.
    call = Call(query, key, query, key if one_key else value, value, lam)
    if reason := unsupported(call):
        return reason
    training = any(x.requires_grad for x in (query, key, value, lam))
    sizes = (query.shape[-1], value.shape[-1], one_key, query.shape[2])
    return _passed_over(query.device, *sizes, training, queries is not None, signals_per_noise > 1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lam: Tensor,
    *,
    scale: float | None,
    queries: Tensor | None,
    causal: bool = True,
    signals_per_noise: int = 1,
) -> Tensor:
    """Differential attention as a layer calls it, with gradients; arguments as of `decode`, with any number of queries.

    Nothing is copied: queries and keys of both maps lie side by side, and so do their gradients.

    Returns:
        (B, T, H, Dv) in the inputs' dtype.
    """
    width = query.shape[-1]
    scale = 1.0 / math.sqrt(width) if scale is None else scale
    q = query.transpose(1, 2).unflatten(2, (-1, signals_per_noise + 1))
    k, v = key.transpose(1, 2).unflatten(3, (-1, width)), value.transpose(1, 2)
    lam = lam.expand(*q.shape[:2], q.shape[2] * signals_per_noise)
    if torch.is_grad_enabled():
        return torch.ops.diffattn.fused_triton(q, k, v, lam, queries, causal, scale)[0]
    return torch.ops.diffattn.fused_triton_output(*_apart(q, k), v, lam, queries, causal, scale)


def decodes(query: Tensor, value: Tensor, *, signals_per_noise: int = 1) -> bool:
    """Tells whether `decode` serves a call, of those to which `unsupported` answers None.

    It does not where a graph is traced, which would hold for few queries only, nor in forward mode or within
    `torch.func`, because the operator has no derivatives and cannot be batched.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or derivatives.transformed():
        return False
    heads = query.shape[1] // (signals_per_noise + 1) * signals_per_noise
    return launch.few(query.shape[2], heads, value.shape[1])


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lam: Tensor,
    *,
    scale: float | None = None,
    queries: Tensor | None = None,
    gain: Tensor | None = None,
    norm_scale: float = 1.0,
    eps: float | None = None,
    causal: bool = True,
    signals_per_noise: int = 1,
) -> Tensor:
    """Differential attention of up to 8 queries as a layer calls it, with the norm behind it; no gradients.

    Arguments and result are those of `diffattn.ops.cpu.operator.decode`.
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    return torch.ops.diffattn.fused_triton_decoding(
        query, key, value, lam, queries, scale, gain, norm_scale, eps, causal, signals_per_noise
    )


for _device in _DEVICES:
    torch.library.impl("diffattn::fused_triton", _device, launch.forward)
    torch.library.impl("diffattn::fused_triton_backward", _device, launch.backward)
    torch.library.impl("diffattn::fused_triton_output", _device, launch.output)
    torch.library.impl("diffattn::fused_triton_decoding", _device, launch.decoding)


@torch.library.register_fake("diffattn::fused_triton")
def _(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, T, noise_heads, maps = q.shape[:4]
    out = v.new_empty(*lam.shape, v.shape[-1])
    return out, v.new_empty(B, T, noise_heads, v.shape[-1]), lam.new_empty(maps, B, noise_heads, T)


@torch.library.register_fake("diffattn::fused_triton_backward")
def _(
    d_output: Tensor, q: Tensor, k: Tensor, v: Tensor, lam: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), lam.new_empty(lam.shape)


@torch.library.register_fake("diffattn::fused_triton_output")
def _(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor | None, v: Tensor, lam: Tensor, *options: Any) -> Tensor:
    return v.new_empty(*lam.shape, v.shape[-1])


@torch.library.register_fake("diffattn::fused_triton_decoding")
def _(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    B, N, T, _ = query.shape
    signals_per_noise = options[-1]
    return value.new_empty(B, T, N // (signals_per_noise + 1) * signals_per_noise, value.shape[-1])


def _apart(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q1 (B, T, Hn, R, D), k1, q2 and k2, which is None where both maps share their keys."""
    maps = k.unbind(3)
    return q[:, :, :, :-1], maps[0], q[:, :, :, -1], maps[1] if len(maps) == 2 else None


def _beside(q1: Tensor, q2: Tensor) -> Tensor:
    """(B, T, Hn, R + 1, D) of q1 (B, T, H, D) or (B, T, Hn, R, D), and q2 (B, T, Hn, D)."""
    q1 = q1 if q1.dim() == 5 else q1.unflatten(2, (q2.shape[2], -1))
    return torch.cat([q1, q2.unsqueeze(3)], dim=3)


def _formula_of_output(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, queries: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what `fused_triton` returns, with zeros for what its backward pass alone reads."""
    q1, k1, q2, k2 = _apart(q, k)
    out = kernel_derivatives.output(q1.flatten(2, 3), k1, q2, k2, v, lam, queries, causal, scale)
    B, T, noise_heads, maps = q.shape[:4]
    return out, out.new_zeros(B, T, noise_heads, out.shape[3]), lam.new_zeros(maps, B, noise_heads, T)


def _formula_of_gradients(
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
    """Returns what `fused_triton_backward` returns."""
    q1, k1, q2, k2 = _apart(q, k)
    grads = kernel_derivatives.gradients(d_output, q1.flatten(2, 3), k1, q2, k2, v, lam, queries, causal, scale)
    d_q1, d_k1, d_q2, d_k2, d_v, d_lam = grads
    d_k = d_k1.unsqueeze(3) if d_k2 is None else torch.stack([d_k1, d_k2], dim=3)
    return _beside(d_q1, d_q2), d_k, d_v, d_lam


def _joined(
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
    """Returns what `fused_triton_output` returns, with derivatives."""
    k = k1.unsqueeze(3) if k2 is None else torch.stack([k1, k2], dim=3)
    return torch.ops.diffattn.fused_triton(_beside(q1, q2), k, v, lam, queries, causal, scale)[0]


kernel_derivatives.register(
    kernel_derivatives.Operators(
        "fused_triton", _formula_of_output, _formula_of_gradients, (0, 0, 0, 0, 1), (0, 0, 1), saved=3
    )
)
kernel_derivatives.register_output("fused_triton_output", _joined, (0, 0, 0, 0, 0, 0, 1), 0)
