"""Windows and encoders where a graph is traced, and under flex attention, which compiles its masks: minutes in all."""

import pytest
import torch
from support.small_models import SHAPE, assert_same_logits, tokens

from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerModel

pytestmark = pytest.mark.full

KINDS = ["sliding_attention", "full_attention", "full_attention"]
CASES = {
    "windows": {"sliding_window": 4, "layer_types": KINDS},
    "an encoder": {"is_causal": False},
    "an encoder with windows": {"is_causal": False, "sliding_window": 4},
}


@pytest.fixture(params=["diff_v1", "diff_v2", "diff_gda", "diff_gda_v2"])
def attention(request):
    return request.param


@pytest.fixture(params=CASES)
def model(request, attention):
    torch.manual_seed(0)
    # Noise heads can be shared where key/value heads are.
    config = DiffTransformerConfig.from_shape(SHAPE, attention, **CASES[request.param])
    return DiffTransformerModel(config).eval()


def padded():
    ids = tokens(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


def same_where_there_are_tokens(actual, expected, mask):
    assert_same_logits(actual[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def states(model, implementation, ids, mask):
    model.set_attn_implementation(implementation)
    return model(ids, attention_mask=mask).last_hidden_state


@pytest.mark.filterwarnings("ignore")
def test_flex_attention_sees_what_sdpa_sees(model):
    ids, mask = padded()
    expected = states(model, "sdpa", ids, mask)
    same_where_there_are_tokens(states(model, "flex_attention", ids, mask), expected, mask)


@pytest.mark.parametrize("implementation", ["sdpa", "diff_fused"])
@torch.no_grad()
def test_one_graph_is_compiled(model, implementation):
    ids, mask = padded()
    expected = states(model, implementation, ids, mask)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    same_where_there_are_tokens(compiled(ids, attention_mask=mask).last_hidden_state, expected, mask)


@torch.no_grad()
def test_a_graph_is_exported(model):
    ids, mask = padded()
    expected = states(model, "sdpa", ids, mask)
    program = torch.export.export(model, (), {"input_ids": ids, "attention_mask": mask, "use_cache": False})
    found = program.module()(input_ids=ids, attention_mask=mask, use_cache=False)
    same_where_there_are_tokens(found.last_hidden_state, expected, mask)
