"""The records of the variants, held against the models that are built from them, and against those who ask."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diffattn
from diffattn.config_fields import FIELDS
from diffattn.model.attention import ATTENTION
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.plan.shape import ModelShape
from diffattn.variants import ATTENTIONS, BASELINE, DEFAULT, DEFAULT_VARIANTS, VARIANTS, Heads

# Every number differs from the others, so that no letter can stand for another.
SHAPE = ModelShape(
    hidden_size=44, num_layers=2, num_heads=12, num_kv_heads=6, head_dim=10, intermediate_size=26, vocab_size=34
)
# The numbers of comparisons with a variant's name that are left: most are of a format or a paper that has one variant.
COMPARISONS = 5


def built(attention, **fields):
    return DiffTransformerForCausalLM(DiffTransformerConfig.from_shape(SHAPE, attention, **fields))


def own_tensors(model):
    """Returns name and shape of what a layer has that softmax attention has not, or has in another shape."""
    plain = {name: tuple(x.shape) for name, x in built(BASELINE).model.layers[0].self_attn.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in model.model.layers[0].self_attn.state_dict().items()}
    assert plain.keys() <= found.keys()
    return {name: shape for name, shape in found.items() if plain.get(name) != shape}


def parameters(model):
    return sum(parameter.numel() for parameter in model.model.layers[0].self_attn.parameters())


def test_every_name_that_a_configuration_allows_has_a_record_and_a_layer():
    assert set(ATTENTIONS) == set(ATTENTION)
    assert all(FIELDS["attention"].allows(name) for name in ATTENTIONS)
    assert DiffTransformerConfig().attention == DEFAULT
    assert set(DEFAULT_VARIANTS) <= set(VARIANTS) <= set(ATTENTIONS)
    assert all(record.name == name for name, record in ATTENTIONS.items())
    assert all(record.fitted_to in (None, *VARIANTS) for record in ATTENTIONS.values())


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_heads_are_those_of_the_one_call_and_lead_back_to_the_shape(attention):
    record, config = ATTENTIONS[attention], DiffTransformerConfig.from_shape(SHAPE, attention)
    expected = {
        "softmax": (12, 6, 10),
        "diff_v1": (12, 3, 20),
        "diff_v2": (24, 6, 10),
        "diff_gda": (9, 3, 20),
        "diff_gda_v2": (18, 6, 10),
        "gated": (12, 6, 10),
        "dex": (12, 6, 10),
    }
    assert record.heads(SHAPE) == expected[attention]
    assert record.heads(SHAPE) == (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert record.replaced(record.heads(SHAPE), config.num_noise_heads) == Heads(12, 6, 10)
    layer = built(attention).model.layers[0].self_attn
    assert layer.q_proj.out_features == record.query_width(SHAPE)
    assert layer.o_proj.in_features == record.output_heads(SHAPE) * record.heads(SHAPE).width


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_tensors_and_parameters_are_those_of_the_built_model(attention):
    record, model = ATTENTIONS[attention], built(attention)
    H, V = record.output_heads(SHAPE), record.heads(SHAPE).width
    said = {tensor.name: tensor.shape(D=44, d=10, H=H, V=V) for tensor in record.tensors}
    if record.norm:
        said["subln.weight"] = (V,)
    if record.query_width(SHAPE) != 120:
        said["q_proj.weight"] = (record.query_width(SHAPE), 44)
    assert own_tensors(model) == said
    more = parameters(model) - parameters(built(BASELINE))
    assert record.matrix_parameters(SHAPE) + record.small_parameters(SHAPE) == more
    count = sum(1 for _ in model.parameters()) - sum(1 for _ in built(BASELINE).parameters())
    assert count == SHAPE.num_layers * record.own_parameters


@pytest.mark.parametrize(
    ("attention", "switches"),
    [
        ("softmax", {"head_norm": True}),
        ("diff_v1", {"head_norm": False}),
        ("diff_v1", {"subln_affine": False}),
        ("diff_v2", {"lambda_form": "one"}),
        ("diff_v2", {"head_norm": True}),
    ],
)
def test_parameters_follow_the_switches(attention, switches):
    record = ATTENTIONS[attention]
    matrices = record.matrix_parameters(SHAPE, **switches)
    more = parameters(built(attention, **switches)) - parameters(built(BASELINE))
    assert matrices + record.small_parameters(SHAPE, **switches) == more


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_what_stays_float32_is_what_the_record_says(attention):
    record, layer = ATTENTIONS[attention], built(attention).bfloat16().model.layers[0].self_attn
    kept = {name for name, tensor in layer.state_dict().items() if tensor.dtype == torch.float32}
    assert kept == {tensor.name for tensor in record.tensors if tensor.float32}
    numbers = sum(x.numel() for x in layer.parameters() if x.dtype == torch.float32)
    assert record.float32_parameters(SHAPE) == numbers


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_maps_weights_and_norm_are_those_of_the_layer(attention):
    record, layer = ATTENTIONS[attention], built(attention).model.layers[0].self_attn
    x = torch.randn(2, 3, SHAPE.hidden_size)
    weights = layer.project(x)[3]
    H, V = record.output_heads(SHAPE), record.heads(SHAPE).width
    shapes = {"none": None, "layer": (), "head": (2, 3, H), "channel": (2, 3, H, V)}
    assert (None if weights is None else tuple(weights.shape)) == shapes[record.weights]
    assert (layer.subln is not None) == record.norm
    queries = torch.randn(2, 3, record.heads(SHAPE).queries, V)
    assert layer.combine(queries, weights).shape == (2, 3, H, V)
    assert bool(record.subtracts) == (record.maps > 1 or record.fitted_to is not None)


def test_the_looks_differ_in_colour_and_in_line_and_mark():
    for part in ("colour", "dark_colour", "dash", "mark"):
        looks = [getattr(record.look, part) for record in ATTENTIONS.values()]
        assert len(set(looks)) == len(looks), part


def test_a_record_is_frozen():
    with pytest.raises(AttributeError):
        ATTENTIONS[BASELINE].maps = 2
    assert replace(ATTENTIONS[BASELINE], maps=2).maps == 2


def test_few_places_ask_for_a_variant_by_its_name():
    asks = re.compile(r'(==|!=|\bin\b|\bis\b) *[({\[]?"(' + "|".join(ATTENTIONS) + ')"')
    root = Path(diffattn.__file__).parent
    exempt = {root / "variants.py", root / "model" / "attention.py"}
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in sorted(root.rglob("*.py"))
        if path not in exempt
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if asks.search(line)
    ]
    assert len(found) <= COMPARISONS, "\n".join(found)
