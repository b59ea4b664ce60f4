"""What the studies read of a model is what its own eager attention computes."""

import pytest
import torch
from support.small_models import SHAPE, assert_same_logits, small_model, tokens
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from diffattn.errors import UnsupportedError
from diffattn.probes import attention_calls as layer_calls
from diffattn.probes.attention_calls import LayerCall, served_by
from diffattn.probes.lens import attention_maps
from diffattn.variants import ATTENTIONS

SWITCHED = [
    ("softmax", {"head_norm": True}),
    ("diff_v1", {"head_norm": False}),
    ("diff_v2", {"head_norm": True}),
    ("diff_v2", {"lambda_form": "linear"}),
    ("diff_v2", {"lambda_form": "one"}),
]
MODELS = [*((name, {}) for name in ATTENTIONS), *SWITCHED]
LENGTH = 17


def read(model, ids, mask=None) -> list[LayerCall]:
    calls: list[LayerCall] = []
    with served_by(model, calls.append), torch.no_grad():
        model(ids, attention_mask=mask)
    return calls


def whole(call: LayerCall, function):
    """All rows, put together from blocks of different lengths."""
    rows = call.queries[0].shape[1]
    return torch.cat([function(range(0, 5)), function(range(5, 6)), function(range(6, rows))], dim=2)


def llama(**config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 71, "hidden_size": 48, "intermediate_size": 29, "num_hidden_layers": 2,
             "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "initializer_range": 0.3}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes | config)).eval()


def eager_maps(model, ids) -> list[dict[str, torch.Tensor]]:
    """Of each layer, (H, T, T): what the one call of the eager model gave its heads, and λ of the layer's own input."""
    inputs = []
    layers = [layer.self_attn for layer in model.model.layers]
    hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in layers]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = [weights[0] for weights in model(ids, output_attentions=True).attentions]
        lams = [layer.combining_weights(x) for layer, x in zip(layers, inputs, strict=True)]
    for hook in hooks:
        hook.remove()
    if not model.config.subtracts_maps:
        return [{"map_pos": each} for each in weights]
    found = []
    for each, lam in zip(weights, lams, strict=True):
        shared = model.config.signals_per_noise
        signal = torch.stack([one for head, one in enumerate(each) if head % (shared + 1) < shared])
        noise = each[shared :: shared + 1].repeat_interleave(shared, dim=0)
        noise = lam.expand(1, ids.shape[1], len(signal))[0].T[:, :, None] * noise
        found.append({"map_pos": signal, "lam_map_neg": noise, "map_diff": signal - noise})
    return found


@pytest.mark.parametrize(("attention", "fields"), MODELS, ids=str)
def test_maps_are_those_of_the_eager_model(attention, fields):
    model, ids = small_model(attention, **fields), tokens(1, LENGTH)
    calls = read(model, ids)
    assert [call.layer for call in calls] == list(range(SHAPE.num_layers))
    for call, expected in zip(calls, eager_maps(model, ids), strict=True):
        actual = {"map_pos": whole(call, lambda rows, call=call: call.maps(rows)[0])}
        if call.lam is not None:
            shared = call.heads // call.noise_heads
            assert shared == model.config.signals_per_noise
            noise = whole(call, lambda rows, call=call: call.maps(rows)[1]).repeat_interleave(shared, dim=1)
            actual["lam_map_neg"] = call.lam_of(range(LENGTH)) * noise
            actual["map_diff"] = whole(call, call.map_diff)
        assert actual.keys() == expected.keys()
        for name, weights in actual.items():
            torch.testing.assert_close(weights[0], expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_maps_of_one_head_as_lists(attention):
    model, ids = small_model(attention).train(), tokens(1, LENGTH)
    maps = attention_maps(model, ids, layer=1, head=2)
    assert model.training
    expected = eager_maps(model, ids)[1]
    assert maps.maps.keys() == expected.keys()
    for name, weights in maps.maps.items():
        torch.testing.assert_close(torch.tensor(weights), expected[name][2], rtol=0, atol=1e-5)
    assert (maps.lam is None) == (maps.map_diff is None)
    if maps.lam is not None:
        assert isinstance(maps.lam, float if ATTENTIONS[attention].weights == "layer" else list)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_padding_is_seen_by_no_query_and_its_rows_are_zeros(attention):
    model, ids = small_model(attention), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    alone = read(model, ids[1:, 4:])
    for call, unpadded in zip(read(model, ids, mask), alone, strict=True):
        both = zip(call.maps(range(LENGTH)), unpadded.maps(range(LENGTH - 4)), strict=True)
        for weights, expected in both:
            assert (weights[1, :, :, :4] == 0).all()
            torch.testing.assert_close(weights[1, :, 4:, 4:], expected[0], rtol=0, atol=1e-5)


def test_llama_with_grouped_heads():
    model, ids = llama(), tokens(2, LENGTH)
    calls = read(model, ids)
    model.set_attn_implementation("eager")
    expected = model(ids, output_attentions=True).attentions
    for call, weights in zip(calls, expected, strict=True):
        torch.testing.assert_close(whole(call, lambda rows, call=call: call.maps(rows)[0]), weights, rtol=0, atol=1e-5)


def test_a_window_hides_what_lies_before_it():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=71, hidden_size=44, intermediate_size=29, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10, sliding_window=5,
    )  # fmt: skip
    model, ids = MistralForCausalLM(config).eval(), tokens(1, LENGTH)
    calls = read(model, ids)
    model.set_attn_implementation("eager")
    expected = model(ids, output_attentions=True).attentions
    assert (expected[0][0, :, -1, : LENGTH - 5] == 0).all()
    for call, weights in zip(calls, expected, strict=True):
        torch.testing.assert_close(call.maps(range(LENGTH))[0], weights, rtol=0, atol=1e-5)


def test_maps_that_meet_values_of_their_own_are_not_read():
    model = small_model("diff_v2", pairs_share_group=False)
    with pytest.raises(UnsupportedError, match=r"cannot be read \(each map of a head has values of its own"):
        read(model, tokens(1, LENGTH))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("attention", "fields"), MODELS, ids=str)
def test_what_serves_in_its_place_makes_the_models_logits(attention, fields):
    """The maps' product with the values, a norm or a gate behind it, is what the model does itself."""
    model, ids = small_model(attention, **fields), tokens(2, LENGTH)
    with torch.no_grad():
        expected = model(ids).logits
        with served_by(model, lambda call: None):
            assert torch.equal(model(ids).logits, expected)

        def serve(call):
            weights = call.map_diff(range(LENGTH))
            value = call.value.repeat_interleave(call.heads // call.value.shape[2], dim=2)
            return torch.einsum("bhts,bshv->bthv", weights, value)

        with served_by(model, serve):
            assert_same_logits(model(ids).logits, expected)
        with served_by(model, lambda call: 0.9 * serve(call)):
            # A norm of each head undoes a factor.
            changed = (model(ids).logits - expected).abs().max()
            assert (changed > 1e-3) != model.config.normalizes_heads


def test_the_models_own_attention_is_put_back():
    model, plain = small_model("diff_v2"), ALL_ATTENTION_FUNCTIONS["diff_fused"]
    model.set_attn_implementation("sdpa")

    def fail(call):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), served_by(model, fail):
        model(tokens(1, 3))
    assert model.config._attn_implementation == "sdpa"
    assert ALL_ATTENTION_FUNCTIONS["diff_fused"] is plain


def test_rows_come_in_blocks_that_fit_a_budget(monkeypatch):
    (call, *_) = read(small_model("diff_v1"), tokens(2, LENGTH))
    assert list(call.row_blocks()) == [range(LENGTH)]
    monkeypatch.setattr(layer_calls, "BLOCK", 5 * 2 * call.heads * LENGTH)
    assert list(call.row_blocks()) == [range(0, 5), range(5, 10), range(10, 15), range(15, LENGTH)]


def test_scores_that_are_changed_are_refused_with_the_reason():
    model = llama()
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with (
        pytest.raises(UnsupportedError, match=r"it changes its scores by softcap\); wanted a causal model"),
        served_by(model, lambda call: None),
    ):
        ALL_ATTENTION_FUNCTIONS["sdpa"](
            model.model.layers[0].self_attn, *[torch.zeros(1, 1, 2, 4)] * 3, None, softcap=3.0
        )
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention


def test_a_model_whose_attention_is_never_called_is_refused_with_the_reason():
    reason = r"LlamaForCausalLM cannot be read \(it does not use the attention interface"
    with pytest.raises(UnsupportedError, match=reason), served_by(llama(), lambda call: None):
        pass


def test_gpt2_can_be_read_too():
    torch.manual_seed(0)
    model, ids = (
        GPT2LMHeadModel(GPT2Config(vocab_size=71, n_embd=44, n_layer=2, n_head=4, n_positions=37)).eval(),
        tokens(1, 9),
    )
    calls = read(model, ids)
    model.set_attn_implementation("eager")
    expected = model(ids, output_attentions=True).attentions
    for call, weights in zip(calls, expected, strict=True):
        torch.testing.assert_close(call.maps(range(9))[0], weights, rtol=0, atol=1e-5)
