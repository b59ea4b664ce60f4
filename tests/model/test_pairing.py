import dataclasses

import pytest
import torch
from support.small_models import SHAPE, assert_same_logits, grouped, tokens

from diffattn.errors import ConfigError
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.model.pairing import MATCHES, build_pair, pair_config, parameters_of
from diffattn.plan.cost import count_parameters
from diffattn.plan.shape import ModelShape, presets
from diffattn.variants import VARIANTS


def by_head(model: DiffTransformerForCausalLM, layer: int) -> torch.Tensor:
    """W_Q of a V2 layer as (n, signal or noise, d, D)."""
    weight = model.model.layers[layer].self_attn.q_proj.weight.detach()
    return weight.view(SHAPE.num_heads, 2, SHAPE.head_dim, SHAPE.hidden_size)


def own_values(model: DiffTransformerForCausalLM, attention: str) -> list[torch.Tensor]:
    """Every drawn tensor that the model does not share with its twin."""
    own = [tensor for name, tensor in model.state_dict().items() if "lambda" in name or "g_proj" in name]
    if attention == "diff_v2":
        own += [by_head(model, layer)[:, 1].contiguous() for layer in range(SHAPE.num_layers)]
    return own


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_v1_shares_every_tensor_but_lambda_and_gain(tied, affine):
    shape = dataclasses.replace(SHAPE, tie_word_embeddings=tied)
    model, twin = build_pair(shape, "diff_v1", seed=5, subln_affine=affine)
    ours, theirs = model.state_dict(), twin.state_dict()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    own = {"lam.lambda_q1", "lam.lambda_k1", "lam.lambda_q2", "lam.lambda_k2"} | ({"subln.weight"} if affine else set())
    assert {name.split("self_attn.")[1] for name in ours.keys() - theirs.keys()} == own


@pytest.mark.parametrize("match", MATCHES)
def test_v2_shares_the_signal_half_of_its_queries_and_the_leading_columns(match):
    model, twin = build_pair(SHAPE, "diff_v2", seed=5, match=match)
    ours, theirs = model.state_dict(), twin.state_dict()
    assert {name.split("self_attn.")[1] for name in ours.keys() - theirs.keys()} == {"lambda_proj.weight"}
    width = model.config.intermediate_size
    assert (width < SHAPE.intermediate_size) == (match == "parameters")
    for layer in range(SHAPE.num_layers):
        queries = f"model.layers.{layer}.self_attn.q_proj.weight"
        signal = theirs.pop(queries).view(SHAPE.num_heads, SHAPE.head_dim, SHAPE.hidden_size)
        assert torch.equal(by_head(model, layer)[:, 0], signal)
    for name, tensor in theirs.items():
        leading = {"gate_proj": tensor[:width], "up_proj": tensor[:width], "down_proj": tensor[..., :width]}
        expected = next((columns for key, columns in leading.items() if key in name), tensor)
        assert torch.equal(ours[name], expected), name


@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize("attention", ["diff_gda", "diff_gda_v2"])
def test_where_noise_heads_are_shared_the_signal_heads_are_the_twins(attention, match):
    model, twin = build_pair(SHAPE, attention, seed=5, match=match)
    ours, theirs = model.state_dict(), twin.state_dict()
    width, narrow = model.config.intermediate_size, min(model.config.intermediate_size, SHAPE.intermediate_size)
    if match == "parameters":
        assert (width > SHAPE.intermediate_size) == (attention == "diff_gda")
    for layer in range(SHAPE.num_layers):
        queries = f"model.layers.{layer}.self_attn.q_proj.weight"
        groups = ours[queries].unflatten(0, (4 if attention == "diff_gda_v2" else 2, 4, SHAPE.head_dim))
        heads = theirs.pop(queries).unflatten(0, (-1, SHAPE.head_dim))
        if attention == "diff_gda":
            assert torch.equal(groups[:, :3].flatten(0, 1), heads[0::2])
            assert torch.equal(groups[:, 3], heads[1::6])
        else:
            assert torch.equal(groups[:, :3].flatten(0, 1), heads)
    for name, tensor in theirs.items():
        mine = ours[name]
        if "_proj" in name and "mlp" in name:
            mine, tensor = ((x[..., :narrow] if "down_proj" in name else x[:narrow]) for x in (mine, tensor))
        assert torch.equal(mine, tensor), name
    assert model.num_parameters() == count_parameters(model.config.shape(), attention).total


@pytest.mark.parametrize("attention", ["diff_gda", "diff_gda_v2"])
def test_one_signal_head_for_each_noise_head_is_the_pair_of_the_plain_variant(attention):
    plain = {"diff_gda": "diff_v1", "diff_gda_v2": "diff_v2"}[attention]
    one, other = (
        build_pair(dataclasses.replace(SHAPE, signals_per_noise=1), name, seed=5) for name in (attention, plain)
    )
    assert one.model.config.intermediate_size == other.model.config.intermediate_size
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}
    if attention == "diff_gda":
        assert all(torch.equal(x, theirs[name]) for name, x in ours.items() if "lambda" not in name)


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2", "diff_gda", "gated"])
def test_what_is_not_shared_repeats_no_values_of_the_twin(attention):
    # λ with the spread of the projections, so that a repeated draw would be the same number.
    model, twin = build_pair(SHAPE, attention, seed=5, match="shape", lambda_std=0.02, initializer_range=0.02)
    taken = torch.cat([tensor.flatten() for tensor in twin.state_dict().values()])
    own = own_values(model, attention)
    for tensor in own:
        # One value in a few thousand meets an equal one among 1e5 by chance, and a repeated stream all of them.
        assert torch.isin(tensor, taken).float().mean() < 0.05
        assert tensor.std().item() == pytest.approx(0.02, rel=0.5 if tensor.numel() < 100 else 0.1)
    values = torch.cat([tensor.flatten() for tensor in own])
    assert len(values.unique()) > 0.99 * len(values)


def test_v2_noise_queries_correlate_with_no_tensor_of_the_twin():
    model, twin = build_pair(SHAPE, "diff_v2", seed=5)
    for layer in range(SHAPE.num_layers):
        noise = by_head(model, layer)[:, 1].flatten()
        for name, tensor in twin.named_parameters():
            size = min(tensor.numel(), noise.numel())
            if tensor.dim() == 2:
                correlation = torch.corrcoef(torch.stack([noise[:size], tensor.flatten()[:size].detach()]))[0, 1]
                # Five standard errors.
                assert abs(correlation) < 5 / size**0.5, name


@pytest.mark.parametrize("match", MATCHES)
def test_gated_attention_shares_all_but_its_gate(match):
    model, twin = build_pair(SHAPE, "gated", seed=5, match=match)
    ours, theirs = model.state_dict(), twin.state_dict()
    assert {name.split("self_attn.")[1] for name in ours.keys() - theirs.keys()} == {"g_proj.weight"}
    assert (model.config.intermediate_size < SHAPE.intermediate_size) == (match == "parameters")
    for name, tensor in theirs.items():
        if ".mlp." not in name:
            assert torch.equal(ours[name], tensor), name


SWITCHES = [
    ("softmax", {"head_norm": True}),
    ("diff_v1", {"head_norm": False}),
    ("diff_v1", {"lambda_init": 0.5, "subln_affine": False}),
    ("diff_v2", {"head_norm": True}),
    ("diff_v2", {"lambda_form": "linear"}),
    ("diff_v2", {"lambda_form": "one"}),
    ("diff_v2", {"pairs_share_group": False}),
]


@pytest.mark.parametrize(("attention", "switches"), SWITCHES, ids=str)
def test_a_variant_with_a_switch_has_the_twin_of_its_variant_and_as_many_parameters(attention, switches):
    model, twin = build_pair(SHAPE, attention, seed=5, **switches)
    plain = build_pair(SHAPE, "softmax", seed=5).model.state_dict()
    assert twin.state_dict().keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in twin.state_dict().items())
    queries = "model.layers.0.self_attn.q_proj.weight"
    shared = (
        by_head(model, 0)[:, 0].reshape_as(plain[queries]) if attention == "diff_v2" else model.state_dict()[queries]
    )
    assert torch.equal(shared, plain[queries])
    assert parameters_of(model.config).total == model.num_parameters()
    assert model.num_parameters() == pytest.approx(twin.num_parameters(), rel=0.005)


@pytest.mark.parametrize("match", MATCHES)
def test_softmax_is_its_own_twin(match):
    model, twin = build_pair(SHAPE, "softmax", seed=5, match=match)
    ours, theirs = model.state_dict(), twin.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert model.lm_head.weight is not twin.lm_head.weight
    assert_same_logits(model(tokens(1, 5)).logits, twin(tokens(1, 5)).logits)


def test_every_variant_and_match_has_the_same_twin():
    twins = [
        build_pair(SHAPE, attention, seed=5, match=match).twin.state_dict()
        for attention in VARIANTS
        for match in MATCHES
    ]
    for twin in twins[1:]:
        assert all(torch.equal(tensor, twins[0][name]) for name, tensor in twin.items())


@pytest.mark.parametrize("attention", VARIANTS)
def test_a_seed_gives_its_values_again_and_another_seed_gives_others(attention):
    first, again, other = (build_pair(SHAPE, attention, seed=seed) for seed in (5, 5, 6))
    for kind in range(2):
        for name, tensor in first[kind].state_dict().items():
            assert torch.equal(tensor, again[kind].state_dict()[name])
            if not (tensor == 1).all():
                assert not torch.equal(tensor, other[kind].state_dict()[name]), name


def test_global_random_state_is_left_as_it_was(monkeypatch):
    # Devices count too: a seed that reached them would be seen by whatever is drawn there next.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded the CUDA devices"))
    state = torch.get_rng_state()
    build_pair(SHAPE, "diff_v2", seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def total(config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiffTransformerForCausalLM(config).parameters())


@pytest.mark.parametrize("attention", [name for name in VARIANTS if name != "softmax"])
@pytest.mark.parametrize("preset", presets())
def test_totals_match_within_half_a_percent_or_the_shape_stays(preset, attention):
    shape = grouped(ModelShape.preset(preset), attention)
    twin = total(pair_config(shape, "softmax"))
    assert twin == count_parameters(shape, "softmax").total
    assert abs(total(pair_config(shape, attention)) - twin) <= 0.005 * twin
    kept = pair_config(shape, attention, match="shape")
    assert kept.shape() == dataclasses.replace(shape, name="", source="")


def test_further_fields_reach_both_models():
    model, twin = build_pair(SHAPE, "diff_v2", seed=5, initializer_range=0.1, eos_token_id=7)
    for each in (model, twin):
        assert each.config.eos_token_id == 7
        assert each.model.layers[0].self_attn.k_proj.weight.std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize("field", ["intermediate_size", "vocab_size", "num_attention_heads", "tie_word_embeddings"])
def test_numbers_of_the_shape_are_not_overridden_beside_it(field, match):
    with pytest.raises(ConfigError, match=f"^{field} beside the shape, "):
        build_pair(SHAPE, "diff_v2", match=match, **{field: 2})


@pytest.mark.parametrize(
    ("attention", "options", "numbers"),
    [
        ("diff_v1", {}, {"num_heads": 5, "num_kv_heads": 5}),
        ("diff_v1", {}, {"num_kv_heads": 3}),
        ("diff_v3", {}, {}),
        ("diff_v2", {"match": "flops"}, {}),
        ("diff_v2", {}, {"intermediate_size": 8}),
    ],
    ids=str,
)
def test_a_pair_that_cannot_be_is_refused_in_one_line(attention, options, numbers):
    with pytest.raises(ConfigError, match="want") as error:
        build_pair(dataclasses.replace(SHAPE, **numbers), attention, **options)
    assert "\n" not in str(error.value)
