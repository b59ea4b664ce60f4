import dataclasses

import pytest
import torch
from support.small_models import SHAPE, assert_same_logits, small_model, tokens
from transformers import StaticCache

from diffattn.variants import DEFAULT_VARIANTS

# The compiler's own modules meet what this version of torch has retired.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
ONE_LAYER = dataclasses.replace(SHAPE, num_layers=1)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model, call) -> list[torch.Tensor]:
    outputs = call(input_ids=tokens(2, 11), labels=tokens(2, 11))
    return [outputs.logits, *torch.autograd.grad(outputs.loss, list(model.parameters()))]


def assert_same_step(model, compiled) -> None:
    for expected, actual in zip(step(model, model), step(model, compiled), strict=True):
        assert_same_logits(actual, expected)


@pytest.mark.parametrize("attention", DEFAULT_VARIANTS)
def test_training_step_compiles_into_one_graph(attention):
    model = small_model(attention, shape=dataclasses.replace(SHAPE, num_layers=2)).train()
    # fullgraph=True raises at a graph break.
    assert_same_step(model, torch.compile(model, fullgraph=True, backend="aot_eager"))


@pytest.mark.parametrize("attention", DEFAULT_VARIANTS)
@torch.no_grad()
def test_decoding_step_with_a_static_cache_compiles_into_one_graph_for_every_position(attention):
    model, ids = small_model(attention), tokens(2, 9)
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=counting)
    cache = StaticCache(config=model.config, max_cache_len=11)
    pieces = [model(ids[:, :4], past_key_values=cache).logits]
    for position in range(4, 9):
        pieces.append(compiled(ids[:, position : position + 1], past_key_values=cache).logits)
    assert_same_logits(torch.cat(pieces, dim=1), model(ids).logits)
    assert len(graphs) == 1


@pytest.mark.full
@pytest.mark.timeout(240)
# The compiler calls a function of its own that it has deprecated.
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check`:FutureWarning")
def test_the_default_compiler_keeps_the_training_step():
    model = small_model("diff_v1", shape=ONE_LAYER).train()
    assert_same_step(model, torch.compile(model, fullgraph=True))
