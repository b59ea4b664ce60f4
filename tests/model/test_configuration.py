import dataclasses
import json

import pytest
import torch
from support.small_models import SHAPE, grouped, small_model, tokens

from diffattn.errors import ConfigError
from diffattn.model.configuration import DiffTransformerConfig, lambda_init_schedule
from diffattn.model.modeling import DiffRotaryEmbedding
from diffattn.plan.cost import cache_bytes_per_token
from diffattn.plan.shape import ModelShape, presets
from diffattn.variants import ATTENTIONS, VARIANTS


@pytest.mark.parametrize(
    ("attention", "heads"),
    [
        ("softmax", (12, 4, 10)),
        ("diff_v1", (12, 2, 20)),
        ("diff_v2", (24, 4, 10)),
        ("diff_gda", (8, 2, 20)),
        ("diff_gda_v2", (16, 4, 10)),
        ("gated", (12, 4, 10)),
    ],
)
def test_heads_are_those_of_the_one_attention_call(attention, heads):
    config = DiffTransformerConfig.from_shape(SHAPE, attention)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == heads


@pytest.mark.parametrize("attention", VARIANTS)
@pytest.mark.parametrize("preset", presets())
def test_shape_and_configuration_convert_both_ways(preset, attention):
    shape = grouped(ModelShape.preset(preset), attention)
    config = DiffTransformerConfig.from_shape(shape, attention)
    assert config.shape() == dataclasses.replace(shape, name="", source="")
    assert DiffTransformerConfig.from_shape(config.shape(), attention).to_dict() == config.to_dict()
    cached = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    assert cached == cache_bytes_per_token(shape, attention, bytes_per_value=1)


@pytest.mark.parametrize("attention", VARIANTS)
def test_configuration_survives_a_file(attention, tmp_path):
    config = DiffTransformerConfig.from_shape(
        dataclasses.replace(SHAPE, rope_theta=54321.0, tie_word_embeddings=False),
        attention,
        lambda_init=0.5,
        lambda_std=0.2,
        subln_affine=False,
        subln_eps=1e-6,
        eos_token_id=[3, 5],
    )
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "diff_transformer"
    assert saved["attention"] == attention
    assert saved["rope_parameters"] == {"rope_type": "default", "rope_theta": 54321.0}
    assert DiffTransformerConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_switches_are_what_differs_from_the_variant_as_published():
    def switches(attention, **fields):
        return DiffTransformerConfig.from_shape(SHAPE, attention, **fields).switches()

    for attention in ATTENTIONS:
        assert switches(attention) == {}
    assert switches("diff_v1", head_norm=True) == switches("softmax", head_norm=False) == {}
    assert switches("diff_v1", head_norm=False) == {"head_norm": False}
    assert switches("softmax", head_norm=True) == {"head_norm": True}
    both = {"lambda_form": "linear", "pairs_share_group": False}
    assert switches("diff_v2", **both) == both


def test_maps_of_other_groups_are_not_spread_over_ranks():
    config = DiffTransformerConfig.from_shape(SHAPE, "diff_v2", pairs_share_group=False)
    with pytest.raises(ConfigError, match="pairs_share_group=False"):
        config.check_tensor_parallel(2)


def test_defaults_are_the_papers_1_4B_v1_model():
    shape = dataclasses.replace(ModelShape.preset("1.4B"), name="", source="")
    assert DiffTransformerConfig().shape() == shape


@pytest.mark.parametrize(
    ("attention", "heads"), [("softmax", 6), ("diff_v1", 6), ("diff_v2", 12), ("diff_gda", 6), ("diff_gda_v2", 12)]
)
def test_heads_not_given_are_those_of_plain_attention(attention, heads):
    shape = DiffTransformerConfig(attention=attention, hidden_size=60, num_attention_heads=heads).shape()
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (6, 6, 10)


def test_lambda_init_follows_the_depth_or_is_one_constant():
    assert [round(lambda_init_schedule(layer), 4) for layer in (0, 1, 2, 27)] == [0.2, 0.3555, 0.4707, 0.7998]
    scheduled = DiffTransformerConfig.from_shape(SHAPE, "diff_v1")
    assert [scheduled.layer_lambda_init(layer) for layer in (0, 2)] == [
        lambda_init_schedule(0),
        lambda_init_schedule(2),
    ]
    constant = DiffTransformerConfig.from_shape(SHAPE, "diff_v1", lambda_init=0.5)
    assert [constant.layer_lambda_init(layer) for layer in (0, 39)] == [0.5, 0.5]
    layers = small_model("diff_v1").model.layers
    assert [layer.self_attn.lam.lambda_init for layer in layers] == [lambda_init_schedule(layer) for layer in range(3)]


@pytest.mark.parametrize("given", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5}}], ids=str)
def test_rope_theta_is_taken_where_transformers_takes_it(given):
    assert DiffTransformerConfig(**given).rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert DiffTransformerConfig.from_shape(SHAPE, "softmax", **given).rope_parameters["rope_theta"] == 5e5


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("scaled", [{"rope_type": "linear", "factor": 4.0}, LLAMA3], ids=lambda kind: kind["rope_type"])
def test_rotary_frequencies_are_those_of_the_replaced_softmax_transformer(scaled):
    shape = dataclasses.replace(SHAPE, rope_theta=500.0)
    expected = 500.0 ** (-torch.arange(0, 10, 2) / 10)
    others = []
    for attention in VARIANTS:
        config = DiffTransformerConfig.from_shape(shape, attention)
        torch.testing.assert_close(DiffRotaryEmbedding(config).inv_freq, expected)
        config = DiffTransformerConfig.from_shape(shape, attention, rope_parameters=dict(scaled))
        others.append(DiffRotaryEmbedding(config).inv_freq)
    assert all(torch.equal(frequencies, others[0]) for frequencies in others)
    assert others[0].shape == expected.shape
    assert not torch.allclose(others[0], expected)


SMALL = {"attention": "diff_v1", "hidden_size": 60, "num_attention_heads": 6}
WRONG = [
    ({"attention": "gated", "head_norm": True}, ["head_norm=True", "'gated'", "leave it out"]),
    ({"attention": "dex", "head_norm": True}, ["head_norm=True", "'dex'", "leave it out"]),
    ({"attention": "diff_v2", "lambda_form": "tanh"}, ["lambda_form='tanh'", "sigmoid, linear, one"]),
    ({"lambda_form": "one"}, ["lambda_form='one'", "wanted diff_v2", "leave it out"]),
    ({"attention": "softmax", "pairs_share_group": False}, ["pairs_share_group=False", "wanted diff_v2"]),
    (
        {"attention": "diff_v2", "num_key_value_heads": 1, "pairs_share_group": False},
        ["num_key_value_heads=1", "wanted 2 or more"],
    ),
    ({"attention": "diff"}, ["attention", "'diff'", "softmax, diff_v1, diff_v2"]),
    ({"attention": None}, ["attention", "None", "softmax, diff_v1, diff_v2"]),
    ({"hidden_size": 0}, ["hidden_size=0", "positive integer"]),
    ({"intermediate_size": 0}, ["intermediate_size=0", "positive integer"]),
    ({"vocab_size": -1}, ["vocab_size=-1", "positive integer"]),
    ({"num_hidden_layers": 0}, ["num_hidden_layers=0", "positive integer"]),
    ({"num_attention_heads": 0}, ["num_attention_heads=0", "positive integer"]),
    ({"num_attention_heads": "6"}, ["num_attention_heads='6'", "without quotes"]),
    ({"num_attention_heads": 6.0}, ["num_attention_heads=6.0", "positive integer"]),
    ({"hidden_size": None}, ["hidden_size=None", "positive integer"]),
    ({"num_key_value_heads": 0}, ["num_key_value_heads=0", "positive integer"]),
    ({"head_dim": 0}, ["head_dim=0", "positive integer"]),
    ({"max_position_embeddings": 0}, ["max_position_embeddings=0", "positive integer"]),
    ({"num_attention_heads": 1}, ["num_attention_heads=1", "even", "choose"]),
    ({"num_attention_heads": 5}, ["num_attention_heads=5", "even", "choose"]),
    ({"attention": "diff_v2", "num_attention_heads": 5}, ["num_attention_heads=5", "even", "choose"]),
    ({"num_key_value_heads": 4}, ["num_attention_heads=6", "num_key_value_heads=4", "divisor of 6"]),
    ({"num_key_value_heads": 2}, ["num_key_value_heads=2", "even ratio", "halve"]),
    ({"attention": "softmax", "num_key_value_heads": 4}, ["num_key_value_heads=4", "divisor of 6"]),
    ({"attention": "diff_v2", "num_key_value_heads": 2}, ["num_key_value_heads=2", "even ratio"]),
    ({"head_dim": 6}, ["head_dim=6", "multiple of 4"]),
    ({"attention": "softmax", "head_dim": 5}, ["head_dim=5", "multiple of 2"]),
    ({"hidden_size": 61}, ["hidden_size=61", "6 heads", "set head_dim"]),
    ({"lambda_init": 1.0}, ["lambda_init=1.0", "below 1", "leave it out"]),
    ({"lambda_init": "0.8"}, ["lambda_init='0.8'", "a finite number"]),
    ({"lambda_init": float("nan")}, ["lambda_init=nan", "a finite number"]),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG, ids=[str(wrong) for wrong, _ in WRONG])
def test_what_cannot_work_is_refused_in_one_line(wrong, words):
    with pytest.raises(ConfigError) as error:
        DiffTransformerConfig(**(SMALL | wrong))
    message = str(error.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("numbers", "attention"),
    [
        ({"num_heads": 5, "num_kv_heads": 5}, "diff_v1"),
        ({"num_heads": 6, "num_kv_heads": 3}, "diff_v1"),
        ({}, "diff_v3"),
    ],
)
def test_a_shape_that_the_variant_cannot_take_is_refused(numbers, attention):
    with pytest.raises(ConfigError, match=r"; wanted .+: "):
        DiffTransformerConfig.from_shape(dataclasses.replace(SHAPE, **numbers), attention)


def test_ids_and_embeddings_together_or_neither_are_refused():
    model = small_model("softmax")
    embedded = model.model.embed_tokens(tokens(1, 3))
    for given in ({}, {"input_ids": tokens(1, 3), "inputs_embeds": embedded}):
        with pytest.raises(ConfigError, match="exactly one of input_ids and inputs_embeds"):
            model(**given)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens(1, 3)).logits)
