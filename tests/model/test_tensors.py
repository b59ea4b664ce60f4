"""The tensors that a configuration implies are those of the model that is built of it."""

import dataclasses

import pytest
import torch
from support.small_models import SHAPE

from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.model.tensors import tensor_shapes

SWITCHES = [
    ("softmax", {}),
    ("softmax", {"head_norm": True, "qk_norm": True, "attention_bias": True}),
    ("diff_v1", {"mlp_bias": True, "attention_output_bias": True}),
    ("diff_v1", {"subln_affine": False}),
    ("diff_v1", {"head_norm": False, "lambda_init": 0.5}),
    ("diff_v2", {"attention_bias": True}),
    ("diff_v2", {"lambda_form": "one", "pairs_share_group": False}),
    ("diff_v2", {"head_norm": True, "lambda_form": "linear"}),
    ("gated", {"qk_norm": True}),
    ("dex", {}),
    ("dex", {"dex_heads": [[0, 3], [], [5]]}),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("attention", "switches"), SWITCHES, ids=str)
def test_names_and_shapes_are_those_of_the_model(attention, switches, tied):
    shape = dataclasses.replace(SHAPE, tie_word_embeddings=tied)
    config = DiffTransformerConfig.from_shape(shape, attention, **switches)
    with torch.device("meta"):
        built = {name: tuple(tensor.shape) for name, tensor in DiffTransformerForCausalLM(config).state_dict().items()}
    if tied:
        del built["lm_head.weight"]
    assert tensor_shapes(config) == built
