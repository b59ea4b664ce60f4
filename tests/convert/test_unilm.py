"""Models around the authors' modules, made ours and back: by their logits in float64, and bit for bit."""

import json
from typing import Any

import pytest
import torch
from support.reference_layers import ReferenceDecoder, reference_decoder
from support.small_models import small_model, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

from diffattn.convert import unilm
from diffattn.convert.layout import half_to_interleaved, interleaved_to_half
from diffattn.convert.unilm import from_reference, to_reference
from diffattn.errors import CheckpointError, ConfigError, UnsupportedError
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.plan.shape import ModelShape

KIND = {"model_type": "diff_transformer_reference"}
# d is 10 and 6: rotations mix every pair of channels, and no two dimensions are equal.
V1 = KIND | {"version": 1, "form": "flash", "vocab_size": 71, "embed_dim": 120, "intermediate_size": 67,
             "num_hidden_layers": 3, "num_heads": 6, "num_kv_heads": 2, "max_position_embeddings": 89}  # fmt: skip
V2 = KIND | {"version": 2, "vocab_size": 71, "embed_dim": 61, "intermediate_size": 67, "num_hidden_layers": 3,
             "num_heads": 9, "num_kv_heads": 3, "head_dim": 6, "max_position_embeddings": 89}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "V1": V1,
    "V1 flash_2": V1 | {"form": "flash_2"},
    "V1 plain": V1 | {"num_kv_heads": None},
    "V1 eager plain": V1 | {"form": "eager", "num_kv_heads": 6},
    "V1 of one group": {key: value for key, value in V1.items() if key != "num_kv_heads"}
    | {"decoder_kv_attention_heads": 1, "rope_theta": 50.0},
    "V1 untied": V1 | {"tie_word_embeddings": False, "rms_norm_eps": 1e-3},
    "V2": V2,
    "V2 plain": V2 | {"num_kv_heads": None, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "V2 untied": V2 | {"tie_word_embeddings": False},
}
EVERY = pytest.mark.parametrize("name", MODELS)
IDS = tokens(2, 37)
# Logits of the order of 10 in float64, whose rotary tables and λ were made in float32 on both sides.
EXACT = 1e-10


def ours(config: dict[str, Any], weights: dict[str, Tensor]) -> torch.nn.Module:
    """The model of a configuration that went through JSON, with exactly these tensors, in float64."""
    model = AutoModelForCausalLM.from_config(DiffTransformerConfig.from_dict(json.loads(json.dumps(config)))).double()
    found = model.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys
    assert found.missing_keys == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    model.tie_weights()
    return model.eval()


def difference(left: Tensor, right: Tensor) -> float:
    assert left.std() > 1
    return (left - right).abs().max().item()


@torch.no_grad()
@EVERY
def test_logits_stay_and_every_bit_comes_back(name: str) -> None:
    config = MODELS[name]
    reference = reference_decoder(config)
    expected = reference(IDS)
    made = ours(*from_reference(config, reference.state_dict()))
    assert difference(expected, made(IDS).logits) < EXACT
    assert made.config.attention == f"diff_v{config['version']}"

    back, weights = to_reference(*from_reference(config, reference.state_dict()))
    assert weights.keys() == reference.state_dict().keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in reference.state_dict().items())
    assert torch.equal(rebuilt(back, weights)(IDS), expected)


def rebuilt(config: dict[str, Any], weights: dict[str, Tensor]) -> ReferenceDecoder:
    config = json.loads(json.dumps(config))
    gain = any("subln" in name for name in weights)
    decoder = ReferenceDecoder(config, gain=gain).double()
    decoder.load_state_dict(weights)
    return decoder.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("attention", "fields"), [("diff_v1", {"hidden_size": 120}), ("diff_v2", {}), ("diff_v2", {"num_kv_heads": 12})]
)
def test_our_models_keep_their_logits_as_reference_models(attention: str, fields: dict[str, Any]) -> None:
    shape = ModelShape(
        **{"hidden_size": 61, "num_layers": 3, "num_heads": 12, "num_kv_heads": 4, "head_dim": 10,
           "intermediate_size": 67, "vocab_size": 71, "max_position_embeddings": 89} | fields
    )  # fmt: skip
    spread = {"lambda_std": 0.3} if attention == "diff_v1" else {}
    model = small_model(attention, shape=shape, **spread).double()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    config, converted = to_reference(model.config.to_diff_dict(), weights)
    assert difference(rebuilt(config, converted)(IDS), model(IDS).logits) < EXACT

    back, again = from_reference(config, converted)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    changed = {"architectures", "converted", "dtype"}
    assert {key: value for key, value in back.items() if key not in changed} == {
        key: value for key, value in model.config.to_diff_dict().items() if key not in changed
    }


@torch.no_grad()
def test_modules_from_before_october_2024_have_no_gain() -> None:
    reference = reference_decoder(V1, gain=False)
    config, weights = from_reference(V1, reference.state_dict())
    assert config["subln_affine"] is False
    assert difference(reference(IDS), ours(config, weights)(IDS).logits) < EXACT
    assert to_reference(config, weights)[1].keys() == reference.state_dict().keys()


@torch.no_grad()
def test_the_eager_form_is_another_function_of_grouped_heads_alone() -> None:
    eager = V1 | {"form": "eager"}
    flash, other = reference_decoder(V1), reference_decoder(eager)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in flash.state_dict().items())
    assert difference(flash(IDS), other(IDS)) > 1
    with pytest.raises(UnsupportedError, match="form is 'eager' with 2 key/value heads for 6 heads"):
        from_reference(eager, other.state_dict())
    plain = {"num_kv_heads": 6}
    assert difference(reference_decoder(V1 | plain)(IDS), reference_decoder(eager | plain)(IDS)) < EXACT


WRONG = {
    "rows of W_Q and W_K as they were": lambda rows, width: rows,
    "channels split over all heads": lambda rows, width: interleaved_to_half(rows, len(rows)),
    "the inverse order": half_to_interleaved,
    "even and odd channels swapped": lambda rows, width: interleaved_to_half(
        rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1), width
    ),
    "heads paired with others": lambda rows, width: interleaved_to_half(rows.roll(width, 0), width),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ["V1", "V2"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_order_shows_in_the_logits(name: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unilm, "interleaved_to_half", WRONG[wrong])
    reference = reference_decoder(MODELS[name])
    made = ours(*from_reference(MODELS[name], reference.state_dict()))
    assert difference(reference(IDS), made(IDS).logits) > 1e-3


@torch.no_grad()
def test_half_precision_stays_and_lambda_is_float32() -> None:
    reference = reference_decoder(V1 | {"dtype": "bfloat16"}).bfloat16()
    config, weights = from_reference(reference.config, reference.state_dict())
    assert config["dtype"] == "bfloat16"
    lambdas = {name for name in weights if ".lam." in name}
    assert len(lambdas) == 12
    for name, tensor in weights.items():
        assert tensor.dtype == (torch.float32 if name in lambdas else torch.bfloat16)
    again = to_reference(config, weights)[1]
    assert all(torch.equal(again[name], tensor) for name, tensor in reference.state_dict().items())


def test_lambda_that_float32_cannot_hold_is_refused() -> None:
    weights = reference_decoder(V1).state_dict()
    weights["model.layers.1.self_attn.lambda_k2"][0] = 0.1
    with pytest.raises(UnsupportedError, match=r"layers\.1\.self_attn\.lambda_k2 is float64 and would be rounded"):
        from_reference(V1, weights)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"version": 3}, ConfigError, "version is 3"),
        ({"version": True}, ConfigError, "version is True"),
        ({"num_kv_head": 2}, ConfigError, "has num_kv_head, which no reference model"),
        ({"form": None}, ConfigError, "form is None"),
        ({"num_kv_heads": 4}, ConfigError, "wanted a divisor of 6"),
        ({"num_kv_heads": [2]}, ConfigError, "num_kv_heads"),
        ({"decoder_kv_attention_heads": 2}, ConfigError, "which mean the same"),
        ({"embed_dim": 121}, ConfigError, "multiple of 12"),
        ({"embed_dim": "120"}, ConfigError, "embed_dim"),
        ({"head_dim": 20}, ConfigError, "head_dim is 20"),
        ({"embed_dim": 12}, ConfigError, "which turn pairs"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e4}}, ConfigError, "wanted one of them"),
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, ConfigError, "rope_type is 'foo'"),
        ({"hidden_act": "foo"}, ConfigError, "hidden_act='foo'"),
        ({"tie_word_embeddings": False}, CheckpointError, "lack lm_head.weight"),
        ({"num_hidden_layers": 2}, CheckpointError, "hold model.layers.2"),
        ({"vocab_size": 72}, CheckpointError, "embed_tokens.weight is 71×120; wanted 72×120"),
        ({"num_kv_heads": 3}, CheckpointError, "k_proj.weight is 40×120; wanted 60×120"),
        ({"model_type": "unilm"}, UnsupportedError, "model_type is 'unilm'"),
    ],
)
def test_what_is_no_reference_model_is_one_line(fields: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        from_reference(V1 | fields, reference_decoder(V1).state_dict())
    assert "\n" not in str(caught.value)


def test_a_v2_module_needs_the_width_of_its_heads_and_no_form() -> None:
    weights = reference_decoder(V2).state_dict()
    with pytest.raises(ConfigError, match="lacks head_dim"):
        from_reference(V2 | {"head_dim": None}, weights)
    with pytest.raises(ConfigError, match="has form, which no reference model of version 2 has"):
        from_reference(V2 | {"form": "flash"}, weights)


def test_a_gain_in_a_part_of_the_layers_is_refused() -> None:
    weights = reference_decoder(V1).state_dict()
    del weights["model.layers.1.self_attn.subln.weight"]
    with pytest.raises(CheckpointError, match=r"lack model\.layers\.1\.self_attn\.subln\.weight"):
        from_reference(V1, weights)


@pytest.mark.parametrize(
    ("attention", "fields", "words"),
    [
        ("softmax", {}, "attention is 'softmax'"),
        ("diff_v1", {}, "12 heads of 10 are 120 channels, hidden_size is 61"),
        ("diff_v2", {"attention_bias": True}, "has biases"),
        ("diff_v2", {"attention_output_bias": True}, "has biases"),
        ("diff_v2", {"mlp_bias": True}, "has biases"),
        ("diff_v2", {"qk_norm": True}, "qk_norm"),
        ("diff_v2", {"lambda_form": "linear"}, "'lambda_form': 'linear'"),
        ("diff_v2", {"pairs_share_group": False}, "'pairs_share_group': False"),
        ("diff_v2", {"head_norm": True}, "'head_norm': True"),
        ("diff_v1", {"lambda_init": 0.8}, "lambda_init is 0.8"),
    ],
)
def test_what_the_modules_cannot_say_is_refused(attention: str, fields: dict[str, Any], words: str) -> None:
    model = small_model(attention, **fields)
    with pytest.raises(UnsupportedError, match=words):
        to_reference(model.config.to_diff_dict(), model.state_dict())
