"""Which kernel PyTorch takes on a graphics card, by the rules of its source and our rows, where there is no card.

Code that is told of a card takes the CPU's tensors for its own, and asks one of these instead of PyTorch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from diffattn.ops import sdpa, standard

Card = Callable[..., int]


def _fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, cudnn_first: bool) -> SDPBackend:
    """The first kernel in the card's order that is switched on and serves."""
    on = torch.nn.attention._cur_sdpa_kernel_backends()
    half = q.dtype in (torch.bfloat16, torch.float16)
    heads = [x.shape[1] for x in (q, k, v)]
    serves = {
        SDPBackend.FLASH_ATTENTION: half and mask is None and heads[1] == heads[2] and q.shape[3] == v.shape[3] <= 256,
        SDPBackend.EFFICIENT_ATTENTION: q.dtype != torch.float64 and len(set(heads)) == 1,
        SDPBackend.CUDNN_ATTENTION: half and q.shape[3] % 8 == v.shape[3] % 8 == 0 and cudnn_first,
    }
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    return next((backend for backend in order if backend in on and serves[backend]), SDPBackend.MATH)


def hopper(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *_: Any, **options: Any) -> int:
    return int(_fits(q, k, v, mask, cudnn_first=True))


def ampere(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *_: Any, **options: Any) -> int:
    """The card has cuDNN behind the math kernel, where nothing reaches it."""
    return int(_fits(q, k, v, mask, cudnn_first=False))


def use(monkeypatch: pytest.MonkeyPatch, card: Card) -> None:
    """Has tensors count as the card's, and ``card`` answer for PyTorch, for the rest of a test."""
    for module in (sdpa, standard):
        monkeypatch.setattr(module, "on_gpu", lambda device: True)
    monkeypatch.setattr(sdpa, "fused_sdpa_choice", card)
    # What was asked of another card does not count.
    monkeypatch.setattr(sdpa, "_chosen", functools.cache(inspect.unwrap(sdpa._chosen)))
