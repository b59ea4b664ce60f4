"""Asks PyTorch which kernel its `scaled_dot_product_attention` takes on a GPU, before a call is laid out for it.

What a kernel refuses depends on the card, the release of PyTorch, the dtype, the widths, and what the user switched
off. So PyTorch itself is asked, with tensors of one row that stand for those of the call. Its last resort, the math
kernel, holds all scores, O(B·H·T·S). Where neither FlashAttention nor cuDNN serves a call, the memory-efficient kernel
often does, if each query head has a key and a value head of its own.

cuDNN's backward pass can return NaN as the gradient of the queries if a mask tensor is passed (PyTorch's issue 196678):
it was seen in every length that is 64 more than a multiple of 128, and in no other. `without_nan` keeps such calls from
cuDNN.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffattn.ops.torch_private import constant_while_compiled, current_sdpa_backends, fused_sdpa_choice

# No kernel's answer depends on the length of a sequence, but a key alone and a square causal mask are special.
_LENGTH = 128


def on_gpu(device: torch.device) -> bool:
    """Tells whether PyTorch has several kernels to choose from on a device: NVIDIA's, and AMD's under the same name."""
    return device.type == "cuda"


def chosen(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    width: int,
    value_width: int,
    masked: bool,
    recorded: bool,
) -> SDPBackend:
    """Returns the kernel that PyTorch takes for a call on a CUDA device; MATH where no other one serves it.

    Args:
        device: of the call's tensors.
        dtype: of the queries, keys and values.
        heads: of the queries, the keys and the values. Only their ratios count.
        width: of a query and a key head.
        value_width: of a value head.
        masked: says whether a mask tensor is passed.
        recorded: says whether gradients are recorded.
    """
    state = (*current_sdpa_backends(with_priority=True), torch.are_deterministic_algorithms_enabled())
    return _chosen(device, dtype, heads, width, value_width, masked, recorded, state)


@functools.cache
def _chosen(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    width: int,
    value_width: int,
    masked: bool,
    recorded: bool,
    state: tuple[Any, ...],
) -> SDPBackend:
    """Asks PyTorch once for each ``state`` of its switches."""

    def tensor(count: int, size: int) -> Tensor:
        # One row's memory for all of them.
        row = torch.empty(size, dtype=dtype, device=device)
        return row.expand(1, count, _LENGTH, size).requires_grad_(recorded)

    q, k, v = (tensor(count, size) for count, size in zip(heads, (width, width, value_width), strict=True))
    mask = torch.empty(1, dtype=torch.bool, device=device).expand(1, 1, _LENGTH, _LENGTH) if masked else None
    # With the math kernel switched off PyTorch would raise where no other one serves.
    with sdpa_kernel([*current_sdpa_backends(), SDPBackend.MATH]):
        return SDPBackend(fused_sdpa_choice(q, k, v, mask, 0.0, False, enable_gqa=len(set(heads)) > 1))


def without_nan(device: torch.device, queries: int, mask: Any) -> contextlib.AbstractContextManager:
    """While it is open, calls on ``device`` with this mask stay away from cuDNN where its gradients may be NaN.

    Args:
        device: of the call's tensors.
        queries: of one sequence.
        mask: any mask; what is no tensor (..., keys) is none that PyTorch's attention is given.
    """
    if not on_gpu(device) or not isinstance(mask, Tensor) or not torch.is_grad_enabled():
        return contextlib.nullcontext()
    if queries % 128 != 64 and mask.shape[-1] % 128 != 64:
        return contextlib.nullcontext()
    others = _all_but_cudnn()
    # Whoever switched all others off wants cuDNN.
    return sdpa_kernel(list(others)) if others else contextlib.nullcontext()


def _all_but_cudnn() -> tuple[SDPBackend, ...]:
    return tuple(backend for backend in current_sdpa_backends() if backend != SDPBackend.CUDNN_ATTENTION)


constant_while_compiled(chosen)
constant_while_compiled(_all_but_cudnn)
