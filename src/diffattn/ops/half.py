"""Half precision where the processor does not multiply it: numbers of two bytes in storage, float32 in products.

PyTorch 2.13 multiplies one row of bfloat16 or float16 with a matrix at the speed of memory on any x86-64 processor, in
a third to two thirds of float32's time. But without matrix instructions of the dtype (AVX2 alone, AVX512 without BF16)
many rows are one dot product for each number of the result, twice to four times float32's time, and the attention of
one query takes three to thirteen times. There float32 is faster, and its result, rounded once, at least as exact.

Only what is made for a moment is in float32: a part of a matrix, one layer's keys and values. Weights and caches stay
as they are. Calls that record gradients or are traced are left alone: their memory and their graphs are PyTorch's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# The names of these dtypes among the processor's capabilities.
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# Fewer rows are quicker as they are; in between it depends on the matrix and the threads.
MANY_ROWS = 32
# So many numbers of a matrix are converted at a time, 8 MB of float32, for which the allocator has memory. Memory for a
# whole output head is new to the process each time, which takes up to five times as long.
_NUMBERS = 2**21


def multiplies(dtype: torch.dtype) -> bool:
    """Tells whether this x86-64 processor has products of bfloat16 or float16, which PyTorch uses.

    False on other processors too, which have not been asked.
    """
    has = torch.cpu.get_capabilities()
    # By ATEN_CPU_CAPABILITY PyTorch can be told to use less than there is.
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and any(
        has.get(f"{unit}_{_NAMES[dtype]}", False) for unit in ("amx", "avx512")
    )


@functools.cache
def is_slow(dtype: torch.dtype) -> bool:
    """Tells whether PyTorch multiplies many rows of bfloat16 or float16 more slowly than float32 here.

    Measured on x86-64, and False elsewhere.
    """
    has = torch.cpu.get_capabilities()
    # Processors that only convert (AVX-NE-CONVERT) have kernels of oneDNN's.
    return has.get("architecture") == "x86_64" and not has.get("avx_ne_convert", False) and not multiplies(dtype)


def widens(x: Tensor) -> bool:
    """Tells whether products of this tensor are made in float32: half precision, such a processor, no gradients."""
    if x.dtype not in _NAMES or torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
        return False
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and is_slow(x.dtype)


def quick_products(x: Tensor) -> contextlib.AbstractContextManager:
    """While it is open, linear layers of many rows are quick, where ``x``, the input of the first, is such a one.

    Layers stay ``nn.Linear``, by which quantisers and engines know them, with their hooks.
    """
    # The number of rows last: a graph that is traced must not depend on it.
    return _WideLinear() if widens(x) and _has_many_rows(x) else contextlib.nullcontext()


def _has_many_rows(x: Tensor) -> bool:
    return x.numel() >= MANY_ROWS * x.shape[-1]


class _WideLinear(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and self._takes(*args[:2]):
            return wide_linear(*args, **kwargs or {})
        return func(*args, **kwargs or {})

    @staticmethod
    def _takes(x: Tensor, weight: Tensor) -> bool:
        # A weight that is quantised, or spread over ranks, is of another class, which has products of its own.
        ours = type(weight) in (Tensor, nn.Parameter) and weight.dtype == x.dtype
        return ours and widens(x) and _has_many_rows(x)


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weightᵀ + bias`` in x's dtype, computed in float32 over parts of the weight's rows.

    ``x`` is (..., K), ``weight`` (N, K), ``bias`` (N,), all in one dtype; the result is (..., N).

    >>> x, weight = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(5, 3, dtype=torch.bfloat16)
    >>> wide_linear(x, weight)[0].tolist()
    [3.0, 3.0, 3.0, 3.0, 3.0]
    """
    rows = max(1, _NUMBERS // weight.shape[1])
    wide = x.float()
    weights = weight.split(rows)
    biases = [None] * len(weights) if bias is None else [part.float() for part in bias.split(rows)]
    parts = [F.linear(wide, part.float(), b).to(x.dtype) for part, b in zip(weights, biases, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def attention_inputs(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values and mask as PyTorch's attention is given them: in float32 where that is faster."""
    if not widens(q):
        return q, k, v, mask
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    return q.float(), k.float(), v.float(), mask
