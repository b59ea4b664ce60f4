"""Twenty steps of training give the same losses however attention is computed, and those losses fall."""

import functools

import pytest
import torch
from support.small_models import small_model

from diffattn.variants import ATTENTIONS

STEPS = 20


@functools.cache
def losses(attention: str, implementation: str) -> list[float]:
    model = small_model(attention, attn_implementation=implementation).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    drawn = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        # Squares, so that some tokens come often and there is something to learn.
        ids = (torch.rand(4, 48, generator=drawn) ** 2 * model.config.vocab_size).long()
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_twenty_steps_give_the_same_losses_however_attention_is_computed(attention: str) -> None:
    expected = losses(attention, "eager")
    assert expected[-1] < expected[0] - 0.3
    for implementation in ("sdpa", "diff_fused") if ATTENTIONS[attention].maps > 1 else ("sdpa",):
        assert losses(attention, implementation) == pytest.approx(expected, abs=1e-4)
    # Another variant, or the same one with another start, learns otherwise.
    assert losses("softmax" if attention != "softmax" else "gated", "eager") != pytest.approx(expected, abs=1e-2)
