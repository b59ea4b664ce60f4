"""DEX, biases and the norm of queries and keys: what pretrained models bring along."""

import pytest
import torch
from support.small_models import SHAPE, assert_same_logits, small_model, tokens

from diffattn.errors import ConfigError
from diffattn.model.configuration import DiffTransformerConfig, lambda_init_schedule
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.variants import ATTENTIONS

SOME = [[0, 5, 11], [], [3]]


def live_dex(heads=None, annealed=0.25):
    """A DEX model whose projections are far from zero."""
    model = small_model("dex", dex_heads=heads)
    generator = torch.Generator().manual_seed(7)
    for layer in model.model.layers:
        if layer.self_attn.heads:
            dex = layer.self_attn.dex
            dex.weight.data = torch.randn(dex.weight.shape, generator=generator)
            dex.lam.data = torch.rand(dex.lam.shape, generator=generator)
            dex.annealed.fill_(annealed)
    return model


@pytest.mark.parametrize("heads", [None, SOME])
def test_dex_starts_as_the_softmax_model(heads):
    softmax, dex = small_model("softmax"), small_model("dex", dex_heads=heads)
    assert not dex.load_state_dict(softmax.state_dict(), strict=False).unexpected_keys
    assert_same_logits(dex(tokens(2, 9)).logits, softmax(tokens(2, 9)).logits)


@pytest.mark.parametrize("heads", [None, SOME])
@torch.no_grad()
def test_dex_subtracts_a_projection_of_each_chosen_heads_output(heads):
    model = live_dex(heads)
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        o = torch.randn(2, 5, SHAPE.num_heads, SHAPE.head_dim)
        expected = o.clone()
        for position, head in enumerate(range(SHAPE.num_heads) if heads is None else heads[index]):
            lam = 0.75 * lambda_init_schedule(index) + 0.25 * attention.dex.lam[position]
            expected[:, :, head] -= lam * o[:, :, head] @ attention.dex.weight[position]
        torch.testing.assert_close(attention.combine(o, None), expected)


@pytest.mark.parametrize("heads", [None, SOME])
def test_dex_leaves_the_stationary_point_in_one_step(heads):
    model = small_model("dex", dex_heads=heads)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    projections = [layer.self_attn.dex for layer in model.model.layers if layer.self_attn.heads]
    assert projections
    assert all(dex.weight.grad.flatten(1).norm(dim=1).min() > 0 for dex in projections)
    optimizer.step()
    assert all(dex.weight.flatten(1).norm(dim=1).min() > 0 for dex in projections)
    # λ is learned as far as it counts already.
    for dex in projections:
        dex.annealed.fill_(0.5)
    optimizer.zero_grad()
    model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    assert all(dex.lam.grad.abs().min() > 0 for dex in projections)


def test_dex_is_saved_loaded_and_kept_in_float32(tmp_path):
    model = live_dex(SOME)
    model.save_pretrained(tmp_path)
    loaded = DiffTransformerForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.dex_heads == SOME
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    half = DiffTransformerForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name: tensor for name, tensor in half.state_dict().items() if ".dex." in name}
    assert len(kept) == 6
    assert all(tensor.dtype == torch.float32 for tensor in kept.values())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in kept.items())
    assert half.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_dex_decodes_from_a_cache_as_it_computes_the_whole():
    model, ids = live_dex(SOME), tokens(2, 13)
    cache = model(ids[:, :9], use_cache=True).past_key_values
    assert_same_logits(model(ids[:, 9:], past_key_values=cache).logits, model(ids).logits[:, 9:])


def test_dex_takes_models_whose_heads_do_not_pair():
    config = DiffTransformerConfig(
        attention="dex", vocab_size=71, hidden_size=54, intermediate_size=67, num_hidden_layers=2,
        num_attention_heads=9, num_key_value_heads=3, dex_heads=[[8], [0, 1]],
    )  # fmt: skip
    assert (config.head_dim, config.rope_width) == (6, 6)
    assert DiffTransformerForCausalLM(config)(tokens(1, 5)).logits.isfinite().all()
    with pytest.raises(ConfigError, match="attention='dex', whose heads are no difference of two maps"):
        DiffTransformerForCausalLM(config).set_attn_implementation("diff_fused")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"attention": "softmax", "dex_heads": [[0]]}, "dex_heads with attention='softmax'; wanted attention='dex'"),
        ({"attention": "dex", "dex_heads": [[0]]}, "dex_heads with 1 lists; wanted one list for each of the 3 layers"),
        ({"attention": "dex", "dex_heads": [[0], [12], []]}, "dex_heads of layer 1 is"),
        ({"attention": "dex", "dex_heads": [[0], [], [2, 2]]}, "dex_heads of layer 2 is"),
    ],
)
def test_dex_heads_that_no_model_has(fields, says):
    attention = fields.pop("attention")
    with pytest.raises(ConfigError, match=says):
        DiffTransformerConfig.from_shape(SHAPE, attention, **fields)


def with_extras(attention: str, **switched) -> DiffTransformerForCausalLM:
    model = small_model(attention, **switched)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_bias_and_norm_is_there_and_counts(attention):
    ids = tokens(2, 9)
    model = with_extras(attention, qk_norm=True, **BIASES)
    names = [
        name for name, _ in model.named_parameters() if name.endswith("bias") or ".q_norm" in name or ".k_norm" in name
    ]
    assert len(names) == SHAPE.num_layers * (4 + 3 + 2)
    model(ids, labels=ids).loss.backward()
    for name in names:
        gradient = dict(model.named_parameters())[name].grad
        # A bias of the keys shifts all scores of a query alike, unless positions turn it.
        assert gradient.abs().max() > 0, name
    assert not any(name.endswith("bias") or "q_norm" in name for name, _ in small_model(attention).named_parameters())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
@torch.no_grad()
def test_biases_and_norms_are_the_same_under_every_implementation(attention, implementation):
    ids = tokens(2, 13)
    fused, other = (
        with_extras(attention, qk_norm=True, attn_implementation=name, **BIASES)
        for name in ("diff_fused", implementation)
    )
    assert_same_logits(fused(ids).logits, other(ids).logits)


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_queries_and_keys_have_unit_mean_square_where_they_are_normed(attention):
    attention_layer = small_model(attention, qk_norm=True).model.layers[1].self_attn
    attention_layer.q_norm.weight.fill_(1.0)
    attention_layer.k_norm.weight.fill_(1.0)
    q, k, v, _ = attention_layer.project(10 * torch.randn(2, 5, SHAPE.hidden_size))
    for heads in (q, k):
        assert heads.shape[-1] == SHAPE.head_dim
        torch.testing.assert_close(heads.square().mean(-1), torch.ones(heads.shape[:-1]), rtol=1e-3, atol=1e-3)
    assert v.square().mean() > 10
