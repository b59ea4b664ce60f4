"""diffllama made our V1 and back: by the logits of the library's own model, and bit for bit."""

import json
import math
from typing import Any

import pytest
import torch
from support.reference_layers import causal_maps
from support.small_models import SHAPE, assert_same_logits, small_model, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DiffLlamaConfig, DiffLlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from diffattn.convert import diffllama
from diffattn.convert.diffllama import to_diff_v1, to_diffllama
from diffattn.convert.layout import halves_to_pairs, pairs_to_halves
from diffattn.errors import CheckpointError, ConfigError, UnsupportedError
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM

SIZES = {"vocab_size": 71, "hidden_size": 61, "intermediate_size": 67, "num_hidden_layers": 3,
         "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 10, "max_position_embeddings": 89,
         "initializer_range": 0.15, "lambda_std_dev": 0.3, "rms_norm_eps": 3e-6, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6, "rope_theta": 300.0}
MODELS: dict[str, dict[str, Any]] = {
    "groups": {},
    "plain": {"num_key_value_heads": 12},
    "two key heads": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "heads that fill the hidden size": {"hidden_size": 72, "head_dim": None},
    "yarn positions": {"rope_parameters": YARN},
}
EVERY = pytest.mark.parametrize("name", MODELS)
IDS = tokens(2, 37)


def diffllama_model(**fields: Any) -> DiffLlamaForCausalLM:
    torch.manual_seed(0)
    return started(DiffLlamaForCausalLM(DiffLlamaConfig(**(SIZES | fields)))).eval()


def started(model: nn.Module) -> Any:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def checkpoint(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What stands in its folder: a configuration that went through JSON, tensors without tied ones."""
    config = json.loads(json.dumps(model.config.to_diff_dict()))
    tied = ("lm_head.weight",) if model.config.tie_word_embeddings else ()
    return config, {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def built(config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> nn.Module:
    config = json.loads(json.dumps(config))
    kind = DiffLlamaConfig if config["model_type"] == "diffllama" else DiffTransformerConfig
    model = AutoModelForCausalLM.from_config(kind.from_dict(config)).to(dtype)
    found = model.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys
    assert found.missing_keys == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    model.tie_weights()
    return model.eval()


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@torch.no_grad()
@EVERY
def test_logits_stay_and_every_bit_comes_back(name: str) -> None:
    model = diffllama_model(**MODELS[name])
    config, weights = checkpoint(model)
    made, converted = to_diff_v1(config, weights)
    ours = built(made, converted)
    assert isinstance(ours, DiffTransformerForCausalLM)
    assert model(IDS).logits.std() > 0.5
    assert_same_logits(ours(IDS).logits, model(IDS).logits)

    back, again = to_diffllama(made, converted)
    assert same_bits(again, weights)
    assert torch.equal(built(back, again)(IDS).logits, model(IDS).logits)
    legacy = {"architectures", "rope_theta", "rope_scaling"}
    assert {key: value for key, value in back.items() if key not in legacy} == {
        key: value for key, value in config.items() if key not in legacy
    }


@torch.no_grad()
@pytest.mark.parametrize(
    "fields", [{}, {"tie_word_embeddings": False}, {"attention_bias": True, "attention_output_bias": True}]
)
def test_our_models_keep_their_logits_as_diffllama(fields: dict[str, Any]) -> None:
    model = small_model("diff_v1", lambda_std=0.3, subln_affine=False, **fields)
    config, weights = checkpoint(model)
    made, converted = to_diffllama(config, weights)
    theirs = built(made, converted)
    assert isinstance(theirs, DiffLlamaForCausalLM)
    assert_same_logits(theirs(IDS).logits, model(IDS).logits)
    back, again = to_diff_v1(json.loads(json.dumps(made)), converted)
    assert same_bits(again, weights)
    assert back | {"converted": None, "architectures": None} == config | {"converted": None, "architectures": None}


class RepeatedFirst(nn.Module):
    """diffllama's attention as earlier releases computed it: heads are repeated first, then paired by halves."""

    def __init__(self, config: DiffLlamaConfig, depth: int) -> None:
        super().__init__()
        self.heads, self.groups, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.groups * self.width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.groups * self.width, bias=False)
        self.o_proj = nn.Linear(self.heads * self.width, config.hidden_size, bias=False)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            self.register_parameter(name, nn.Parameter(torch.empty(self.width)))
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
        self.eps = config.rms_norm_eps

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **_: Any) -> tuple[Tensor, None]:
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.width))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        repeats = self.heads // self.groups
        k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
        values = torch.cat(v.chunk(2, dim=2), dim=-1).repeat(1, 1, 2, 1)
        first, second = torch.einsum("bhts,bshv->bthv", causal_maps(q, k), values).chunk(2, dim=2)
        lam = (self.lambda_q1 * self.lambda_k1).sum().exp() - (self.lambda_q2 * self.lambda_k2).sum().exp()
        y = first - (lam + self.lambda_init) * second
        y = y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return self.o_proj(((1 - self.lambda_init) * y).flatten(-2)), None


def older(**fields: Any) -> nn.Module:
    """A model of which only the attention is replaced, so that odd numbers of key heads work as they did."""
    model = diffllama_model(**fields | {"num_key_value_heads": 4})
    model.config.num_key_value_heads = fields["num_key_value_heads"]
    torch.manual_seed(3)
    for depth, layer in enumerate(model.model.layers):
        layer.self_attn = RepeatedFirst(model.config, depth).eval()
        for parameter in layer.self_attn.parameters():
            nn.init.normal_(parameter, std=0.3 if parameter.dim() == 1 else 0.15)
    return model


@torch.no_grad()
@pytest.mark.parametrize("heads", [6, 12])
@pytest.mark.parametrize("groups", [1, 3])
def test_an_odd_number_of_key_heads_is_written_twice(heads: int, groups: int) -> None:
    model = older(num_attention_heads=heads, num_key_value_heads=groups)
    config, weights = checkpoint(model)
    made, converted = to_diff_v1(config, weights)
    assert made["num_key_value_heads"] == groups
    assert made["head_dim"] == 2 * SIZES["head_dim"]
    ours = built(made, converted)
    assert_same_logits(ours(IDS).logits, model(IDS).logits)
    # What the library of today computes, too.
    back, again = to_diffllama(made, converted)
    assert back["num_key_value_heads"] == 2 * groups
    assert_same_logits(built(back, again)(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_an_even_number_of_key_heads_means_today_what_it_meant() -> None:
    model = older(num_key_value_heads=4)
    assert_same_logits(built(*checkpoint(model))(IDS).logits, model(IDS).logits)


WRONG = {
    "heads as they were": ("halves_to_pairs", lambda rows, width: rows),
    "the inverse order": ("halves_to_pairs", pairs_to_halves),
    "maps swapped": ("halves_to_pairs", lambda rows, width: halves_to_pairs(rows.roll(len(rows) // 2, 0), width)),
    "pairs of another width": ("halves_to_pairs", lambda rows, width: halves_to_pairs(rows, 2 * width)),
    "an ε of its own": ("DiffTransformerConfig", lambda **f: DiffTransformerConfig(**f | {"subln_eps": 1e-1})),
    "a constant λ_init": ("DiffTransformerConfig", lambda **f: DiffTransformerConfig(**f | {"lambda_init": 0.8})),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_conversion_shows_in_the_logits(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = diffllama_model(num_key_value_heads=12)
    name, replacement = WRONG[wrong]
    monkeypatch.setattr(diffllama, name, replacement)
    ours = built(*to_diff_v1(*checkpoint(model)))
    assert (ours(IDS).logits - model(IDS).logits).abs().max() > 1e-2


@torch.no_grad()
def test_queries_and_values_alone_are_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    model = diffllama_model()
    config, weights = checkpoint(model)
    made, converted = to_diff_v1(config, weights)
    for kept in ("q_proj", "k_proj", "v_proj"):
        mixed = converted | {name: weights[name] for name in weights if kept in name}
        assert (built(made, mixed)(IDS).logits - model(IDS).logits).abs().max() > 1e-2


@torch.no_grad()
def test_bfloat16_weights_keep_their_bits_and_lambda_is_float32() -> None:
    model = diffllama_model(dtype="bfloat16").bfloat16()
    config, weights = checkpoint(model)
    made, converted = to_diff_v1(config, weights)
    assert made["dtype"] == "bfloat16"
    for name, tensor in converted.items():
        assert tensor.dtype == (torch.float32 if ".lam." in name else torch.bfloat16)
    back, again = to_diffllama(made, converted)
    assert back["dtype"] == "bfloat16"
    assert all(torch.equal(again[name].to(tensor.dtype), tensor) for name, tensor in weights.items())
    # λ apart, which the library computes in bfloat16, the layers round alike.
    error = (built(made, converted, torch.bfloat16)(IDS).logits - model(IDS).logits).float().std()
    assert error < 0.05 * model(IDS).logits.float().std()


@torch.no_grad()
@pytest.mark.parametrize("gain", [1.0, 0.25, -2.0])
def test_a_gain_of_powers_of_two_goes_into_the_output_projection(gain: float) -> None:
    model = small_model("diff_v1")
    for layer in model.model.layers:
        layer.self_attn.subln.weight.fill_(gain)
        layer.self_attn.subln.weight[3] = 4.0
    config, weights = checkpoint(model)
    made, converted = to_diffllama(config, weights)
    assert not any("subln" in name for name in converted)
    assert_same_logits(built(made, converted)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("gain", [0.0, 0.75, 2.0**-140, 2.0**127, float("nan")])
def test_a_gain_that_would_be_rounded_is_refused(gain: float) -> None:
    model = small_model("diff_v1")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.subln.weight.fill_(1.0)
            layer.self_attn.o_proj.weight[0, 7] = 2.75
        model.model.layers[2].self_attn.subln.weight[7] = gain
    with pytest.raises(UnsupportedError, match=r"before model\.layers\.2\.self_attn\.o_proj\.weight has a gain"):
        to_diffllama(*checkpoint(model))


@pytest.mark.parametrize(
    ("attention", "fields", "words"),
    [
        ("softmax", {}, "attention is 'softmax'"),
        ("diff_v2", {}, "attention is 'diff_v2'"),
        ("diff_v1", {"lambda_init": 0.8}, "lambda_init is 0.8"),
        ("diff_v1", {"qk_norm": True}, "qk_norm is True"),
        ("diff_v1", {"hidden_act": "poly_norm"}, "hidden_act is 'poly_norm'"),
        ("diff_v1", {"lambda_init": [0.1, 0.2, 0.3]}, "lambda_init is \\[0.1"),
        ("diff_v1", {"sliding_window": 5}, "sliding_window is 5"),
        ("diff_v1", {"unrotated_layers": [1]}, "unrotated_layers is"),
        ("diff_gda", {}, "attention is 'diff_gda'"),
        ("diff_v1", {"head_norm": False}, "'head_norm': False"),
        ("diff_v1", {"attention_bias": True}, "attention_output_bias False"),
        ("diff_v1", {"attention_output_bias": True}, "attention_bias is False, attention_output_bias True"),
        ("diff_v1", {"mlp_bias": True}, "mlp_bias True"),
        ("diff_v1", {"subln_eps": 1e-6}, "subln_eps is 1e-06 and rms_norm_eps 1e-05"),
        ("diff_v1", {}, "has a gain that is not made of powers of two"),
    ],
)
def test_what_diffllama_cannot_say_is_refused(attention: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words) as caught:
        to_diffllama(*checkpoint(small_model(attention, **fields)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"model_type": "llama"}, UnsupportedError, "model_type is 'llama'"),
        ({"num_attention_heads": 13}, UnsupportedError, "num_attention_heads is 13; wanted an even number"),
        ({"num_attention_heads": 0, "head_dim": None}, ConfigError, "config.json is no diffllama model"),
        ({"num_key_value_heads": 5}, ConfigError, "wanted a divisor of num_attention_heads, 12"),
        ({"num_key_value_heads": 0}, ConfigError, "num_key_value_heads is 0"),
        ({"hidden_size": "61"}, ConfigError, "config.json is no diffllama model"),
        ({"hidden_act": "foo"}, UnsupportedError, "hidden_act is 'foo'"),
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1.0}}, UnsupportedError, "positions are 'foo'"),
        ({"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, UnsupportedError, "partial_rotary_factor is 0.5"),
        ({"head_dim": 9}, ConfigError, "config.json is no diffllama model"),
        ({"num_hidden_layers": 2}, CheckpointError, "hold model.layers.2"),
        ({"num_hidden_layers": 4}, CheckpointError, r"lack model.layers.3.*and 12 more"),
        ({"attention_bias": True}, CheckpointError, r"lack model.layers.0.self_attn.k_proj.bias"),
        ({"vocab_size": 72}, CheckpointError, "71×61; wanted 72×61"),
        ({"num_key_value_heads": 3}, CheckpointError, "k_proj.weight is 40×61; wanted 30×61"),
    ],
)
def test_what_is_no_diffllama_model_is_one_line(fields: dict[str, Any], error: type, words: str) -> None:
    config, weights = checkpoint(diffllama_model())
    with pytest.raises(error, match=words) as caught:
        to_diff_v1(config | fields, weights)
    assert "\n" not in str(caught.value)


def test_integer_weights_are_refused() -> None:
    config, weights = checkpoint(diffllama_model())
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(UnsupportedError, match=r"up_proj\.weight is int8"):
        to_diff_v1(config, weights | {name: weights[name].to(torch.int8)})


def test_the_configuration_of_a_shape_is_that_of_the_replaced_softmax_model() -> None:
    config, weights = checkpoint(diffllama_model())
    shape = DiffTransformerConfig.from_dict(to_diff_v1(config, weights)[0]).shape()
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (SHAPE.num_heads, SHAPE.num_kv_heads, 10)
