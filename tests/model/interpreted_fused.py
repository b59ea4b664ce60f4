"""Tests of models whose attention the Triton kernels serve, in Triton's interpreter, in a process of its own alone.

    TRITON_INTERPRET=1 DIFFATTN_FUSED=0 python -m pytest tests/model/interpreted_fused.py

`test_fused_triton.py` runs this: both must be set before the kernels are imported.
"""

from __future__ import annotations

import copy
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.kernel_calls import recorded_calls
from support.packed_cases import WHOLE, positions_of
from support.small_models import small_model, tokens
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.interpreter import mend_interpreter
from diffattn.model.fused import DIFF_FUSED
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.plan.shape import ModelShape

assert os.environ["TRITON_INTERPRET"] == "1"
assert os.environ["DIFFATTN_FUSED"] == "0"
mend_interpreter()

# PyTorch loads what inductor needs with its own deprecated torch.jit. A kernel computes both sides of a choice, such as
# the logarithm of a sum of no exponentials, of which NumPy warns.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
both = pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
SHAPE = ModelShape(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=71,
    max_position_embeddings=89,
)

Model = DiffTransformerForCausalLM


def model_of(attention: str, implementation: str = DIFF_FUSED, dtype: torch.dtype = torch.bfloat16) -> Model:
    model = small_model(attention, shape=SHAPE).to(dtype)
    model.set_attn_implementation(implementation)
    return model


def logits(model: Model, ids: Tensor, **options: Any) -> Tensor:
    return model(ids, **options).logits.detach().double()


def nearer(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """As near to the same weights in float64 as the plain layer in bfloat16, with a half more for luck."""
    assert (got - exact).norm() <= 1.5 * (eager - exact).norm()


def compare_logits(attention: str, ids: Tensor, real: Tensor | None = None, **options: Any) -> None:
    fused, eager = model_of(attention), model_of(attention, "eager")
    # In float64 eager turns the lowest number of its mask into −inf, and a row of padding into NaN.
    exact = copy.deepcopy(eager).double()
    exact.set_attn_implementation("sdpa")
    with torch.no_grad():
        results = [logits(model, ids, **options) for model in (fused, eager, exact)]
    nearer(*(x if real is None else x[real] for x in results))


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2", "diff_gda"])
def test_losses_and_gradients(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = recorded_calls(monkeypatch)
    ids = tokens(2, 13)
    results = []
    for model in (model_of(attention), model_of(attention, "eager"), model_of(attention, "eager").double()):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach().double(), torch.cat(grads)))
    assert served == ["triton"] * 2
    (loss, grads), (eager_loss, eager_grads), (exact_loss, exact_grads) = results
    assert grads.shape == exact_grads.shape
    nearer(grads, eager_grads, exact_grads)
    assert (loss - exact_loss).abs() <= max((eager_loss - exact_loss).abs(), 2e-3 * exact_loss)


@both
def test_training_copies_no_queries_and_keys(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come side by side from the projections: no stack joins them, and none splits their gradients."""

    def no_stack(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("queries or keys were stacked")

    model, ids = model_of(attention), tokens(2, 13)
    monkeypatch.setattr(torch, "stack", no_stack)
    model(ids, labels=ids, use_cache=False).loss.backward()


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2", "diff_gda", "diff_gda_v2"])
def test_a_padded_batch(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = recorded_calls(monkeypatch)
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = 0
    compare_logits(attention, ids, mask.bool(), attention_mask=mask)
    assert served[:2] == ["triton"] * 2


@both
def test_a_packed_row(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = recorded_calls(monkeypatch)
    positions = positions_of(WHOLE, 0)
    compare_logits(attention, tokens(*positions.shape), position_ids=positions, use_cache=False)
    assert served == ["triton"] * 2


@pytest.mark.parametrize(
    ("attention", "cache"),
    [*itertools.product(("diff_v1", "diff_v2"), (None, "static")), ("diff_gda", "static")],
)
def test_greedy_text(attention: str, cache: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 11 tokens and then one at a time: every token is the one that a standard call's logits would take."""
    served = recorded_calls(monkeypatch)
    model, eager = model_of(attention), model_of(attention, "eager")
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[0, :3] = 0
    options = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    text = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, **options)
    assert set(served) == {"triton"}
    assert len(served) == 2 * 4
    assert text.shape == (2, 15)
    whole = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], dim=1)
    with torch.no_grad():
        scores = eager(text[:, :-1], attention_mask=whole).logits[:, 10:].float()
    chosen = scores.gather(2, text[:, 11:, None])[..., 0]
    # Two that round to nearly the same may change places.
    assert (chosen >= scores.amax(-1) - 0.05).all()


@both
def test_compiles_to_one_graph(attention: str) -> None:
    model, ids = model_of(attention), tokens(2, 13)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses, gradients = [], []
    for one in (model, compiled):
        model.zero_grad()
        loss = one(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-2, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing() -> None:
    ids, gradients = tokens(2, 13), []
    for checkpointing in (False, True):
        model = model_of("diff_v1").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[1].equal(gradients[0])
