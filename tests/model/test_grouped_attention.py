import re
from dataclasses import replace

import pytest
import torch
from support.fused_cases import needs_the_kernel
from support.kernel_calls import recorded_calls
from support.small_models import SHAPE, assert_same_logits, small_model, tokens

from diffattn.errors import ConfigError
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.plan.shape import ModelShape

PAIRS = replace(SHAPE, signals_per_noise=1)
GROUPED = {"diff_gda": "diff_v1", "diff_gda_v2": "diff_v2"}
# Six query heads for each of two key/value heads: three signal heads for each of two noise heads on one of them.
SEVERAL = replace(SHAPE, num_kv_heads=2, signals_per_noise=3)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "diff_fused"])
@pytest.mark.parametrize("attention", GROUPED)
def test_one_signal_head_for_each_noise_head_is_the_plain_variant_to_the_bit(attention, implementation):
    model = small_model(attention, shape=PAIRS, attn_implementation=implementation)
    plain = small_model(GROUPED[attention], attn_implementation=implementation, seed=1)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens(2, 9)).logits, plain(tokens(2, 9)).logits)


@pytest.mark.parametrize("attention", GROUPED)
def test_noise_heads_are_shared_as_far_as_the_shape_says(attention):
    config = DiffTransformerConfig.from_shape(SEVERAL, attention)
    signals = 12 if attention == "diff_gda_v2" else 6
    assert (config.output_heads, config.noise_heads, config.signals_per_noise) == (signals, signals // 3, 3)
    assert config.num_attention_heads == signals + signals // 3
    assert config.shape() == SEVERAL
    layer = small_model(attention, shape=SEVERAL).model.layers[0].self_attn
    assert layer.q_proj.out_features == config.num_attention_heads * SHAPE.head_dim
    assert layer.o_proj.in_features == 12 * SHAPE.head_dim


@pytest.mark.parametrize("implementation", ["eager", "diff_fused"])
@pytest.mark.parametrize("attention", GROUPED)
def test_several_noise_heads_of_one_key_value_head_and_every_implementation_agree(attention, implementation):
    model, ids = small_model(attention, shape=SEVERAL, attn_implementation="sdpa"), tokens(2, 11)
    expected = model(ids).logits
    model.set_attn_implementation(implementation)
    assert_same_logits(model(ids).logits, expected)


@needs_the_kernel
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("shape", [SHAPE, SEVERAL], ids=["one noise head a group", "two"])
@pytest.mark.parametrize("attention", GROUPED)
def test_the_kernel_gives_the_logits_and_every_gradient_of_sdpa(attention, shape, padding, monkeypatch):
    served = recorded_calls(monkeypatch)
    model, ids = small_model(attention, shape=shape), tokens(3, 23)
    mask = torch.ones_like(ids)
    if padding:
        mask[1, :5] = mask[2, -4:] = 0
    found = []
    for implementation in ("diff_fused", "sdpa"):
        model.set_attn_implementation(implementation)
        outputs = model(ids, attention_mask=mask, labels=torch.where(mask.bool(), ids, -100), use_cache=False)
        found.append([outputs.logits[mask.bool()], *torch.autograd.grad(outputs.loss, list(model.parameters()))])
    assert served == ["kernel"] * model.config.num_hidden_layers
    assert_same_logits(found[0][0], found[1][0])
    for gradient, wanted in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5 * max(wanted.abs().max().item(), 0.1))


@needs_the_kernel
@pytest.mark.parametrize("attention", GROUPED)
def test_the_kernel_decodes_behind_a_cache_and_within_a_window(attention, monkeypatch):
    served = recorded_calls(monkeypatch)
    model, ids = small_model(attention, shape=SEVERAL, sliding_window=6), tokens(2, 19)
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        whole = model(ids).logits
        model.set_attn_implementation("diff_fused")
        cache = model(ids[:, :11], use_cache=True).past_key_values
        for token in range(11, 19):
            step = model(ids[:, token : token + 1], past_key_values=cache).logits[:, -1]
            assert_same_logits(step, whole[:, token])
    assert set(served) == {"kernel"}


@pytest.mark.parametrize("attention", GROUPED)
def test_a_shared_noise_head_gives_what_copies_of_it_give(attention):
    shared, apart = small_model(attention), small_model(GROUPED[attention], seed=1)
    state = dict(shared.state_dict())
    r, d = 3, SHAPE.head_dim
    for name in [name for name in state if name.endswith("q_proj.weight")]:
        groups = state[name].unflatten(0, (-1, r + 1, d))
        pairs = torch.stack([groups[:, :r], groups[:, r:].expand(-1, r, -1, -1)], dim=2)
        state[name] = pairs.flatten(0, 3)
    apart.load_state_dict(state)
    assert_same_logits(shared(tokens(2, 9)).logits, apart(tokens(2, 9)).logits)


def test_configuration_without_numbers_of_groups_has_pairs_as_v1_and_v2_have():
    for attention, plain in GROUPED.items():
        config, pairs = (DiffTransformerConfig(attention=name) for name in (attention, plain))
        assert config.num_noise_heads == 8
        assert (config.num_key_value_heads, config.head_dim) == (pairs.num_key_value_heads, pairs.head_dim)
    published = DiffTransformerConfig(
        attention="diff_gda", hidden_size=4096, num_attention_heads=40, num_noise_heads=8, head_dim=256
    )
    assert published.num_key_value_heads == 8
    assert published.output_heads == 32
    assert published.shape().num_heads == 64


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_noise_heads": 0}, ["num_noise_heads=0", "a positive integer", "leave it out"]),
        ({"num_noise_heads": 3}, ["num_noise_heads=3", "equally many signal heads", "take 2"]),
        ({"num_noise_heads": 8}, ["num_noise_heads=8", "at least one"]),
        ({"num_noise_heads": 1}, ["num_noise_heads=1", "num_key_value_heads=2", "a multiple of 2"]),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, ["num_noise_heads=2", "change num_attention_heads"]),
        ({"head_dim": None, "hidden_size": 61}, ["hidden_size=61", "12 heads of softmax attention", "head_dim"]),
        ({"lambda_init": [0.1]}, ["lambda_init with 1 numbers", "each of the 3 layers"]),
        ({"lambda_init": [0.1, 0.2, 1.0]}, ["lambda_init=[0.1, 0.2, 1.0]", "below 1", "the schedule"]),
        ({"lambda_init": []}, ["lambda_init=[]", "below 1"]),
        ({"pairs_share_group": False}, ["pairs_share_group=False", "diff_v2"]),
        ({"lambda_form": "one"}, ["lambda_form='one'", "diff_v2 or diff_gda_v2"]),
        ({"attention": "diff_v1"}, ["num_noise_heads=2", "diff_gda or diff_gda_v2"]),
    ],
    ids=str,
)
def test_impossible_fields_are_refused_in_one_line(fields, words):
    known = {
        "attention": "diff_gda",
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_noise_heads": 2,
        "head_dim": 20,
    }
    with pytest.raises(ConfigError) as error:
        DiffTransformerConfig(**known | fields)
    assert "\n" not in str(error.value)
    assert all(re.search(re.escape(word), str(error.value)) for word in words), str(error.value)


def test_shape_in_which_nothing_can_be_shared_is_refused_with_a_way_out():
    alone = ModelShape.preset("3M")
    with pytest.raises(ConfigError, match=r"several query heads for each key/value head.*--group.*signals_per_noise=1"):
        DiffTransformerConfig.from_shape(alone, "diff_gda")
    assert DiffTransformerConfig.from_shape(replace(alone, signals_per_noise=1), "diff_gda").signals_per_noise == 1
    with pytest.raises(ConfigError, match=r"signals_per_noise=2 .* a divisor of 3"):
        replace(SHAPE, signals_per_noise=2)
    with pytest.raises(ConfigError, match="signals_per_noise=0; wanted a positive integer"):
        replace(SHAPE, signals_per_noise=0)


def test_v1_has_a_lambda_for_each_layer_also_below_zero():
    model = small_model("diff_v1", lambda_init=[-0.0099, 0.2, 0.3555])
    attentions = [layer.self_attn for layer in model.model.layers]
    assert [layer.lam.lambda_init for layer in attentions] == [-0.0099, 0.2, 0.3555]
    assert [layer.subln.scale for layer in attentions] == [1.0099, 0.8, 1 - 0.3555]
    assert DiffTransformerConfig.from_dict(model.config.to_dict()).lambda_init == [-0.0099, 0.2, 0.3555]
