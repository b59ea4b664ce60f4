"""Models on a GPU: masked calls that record gradients stay away from cuDNN, and unpadded ones pass no mask tensor."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.packed_cases import IMPLEMENTATIONS
from support.small_models import SHAPE, small_model, tokens
from torch import Tensor
from torch.nn.attention import SDPBackend

from diffattn.model import fused
from diffattn.ops import sdpa

LENGTH = 64


class Seen(NamedTuple):
    cudnn: bool
    masked: bool
    heads: tuple[int, ...]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """The calls of PyTorch's attention, on a machine whose tensors count as a card's, without kernels of our own."""
    calls: list[Seen] = []
    real = F.scaled_dot_product_attention

    def look(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        on = torch.nn.attention._cur_sdpa_kernel_backends()
        heads = tuple(x.shape[1] for x in (q, k, v))
        calls.append(Seen(SDPBackend.CUDNN_ATTENTION in on, attn_mask is not None, heads))
        return real(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    monkeypatch.setattr(sdpa, "on_gpu", lambda device: True)
    monkeypatch.setattr(fused, "KERNELS", {})
    return calls


def padded() -> Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :5] = 0
    return mask


WAYS = [way for way in IMPLEMENTATIONS if way[1] != "eager"]


@pytest.mark.parametrize(("attention", "implementation"), WAYS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_training_on_padded_rows_stays_away_from_cudnn(attention, implementation, checkpointing, seen) -> None:
    model, ids = small_model(attention), tokens(2, LENGTH)
    model.set_attn_implementation(implementation)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(ids, attention_mask=padded(), labels=ids, use_cache=False).loss.backward()
    assert len(seen) == SHAPE.num_layers * (2 if checkpointing else 1)
    assert {(call.cudnn, call.masked) for call in seen} == {(False, True)}
    # Without cuDNN, groups would leave a mask to the math kernel alone, which holds every score.
    assert all(len(set(call.heads)) == 1 for call in seen)


@pytest.mark.parametrize(("attention", "implementation"), WAYS)
def test_rows_without_padding_pass_no_mask_and_may_take_cudnn(attention, implementation, seen) -> None:
    model, ids = small_model(attention), tokens(2, LENGTH)
    model.set_attn_implementation(implementation)
    model(ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
    with torch.no_grad():
        model(ids, attention_mask=padded(), use_cache=False)
    layers = SHAPE.num_layers
    assert {(call.cudnn, call.masked) for call in seen[:layers]} == {(True, False)}
    assert {(call.cudnn, call.masked) for call in seen[layers:]} == {(True, True)}
