import dataclasses

import pytest
import torch
from support.small_models import SHAPE, assert_same_logits, grouped, small_model, tokens
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, LlamaConfig, LlamaForCausalLM

from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.model.pairing import MATCHES, pair_config
from diffattn.plan.cost import count_parameters
from diffattn.plan.shape import ModelShape, presets
from diffattn.variants import VARIANTS

# Llama's configuration wants a hidden size that the heads divide, even where it is given another width of a head.
LLAMA_SHAPE = dataclasses.replace(SHAPE, hidden_size=5 * SHAPE.num_heads)
LLAMA_FIELDS = {
    "vocab_size": SHAPE.vocab_size,
    "hidden_size": LLAMA_SHAPE.hidden_size,
    "intermediate_size": SHAPE.intermediate_size,
    "num_hidden_layers": SHAPE.num_layers,
    "num_attention_heads": SHAPE.num_heads,
    "num_key_value_heads": SHAPE.num_kv_heads,
    "head_dim": SHAPE.head_dim,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "pad_token_id": None,
}


def test_softmax_model_is_llama():
    model = small_model("softmax", shape=LLAMA_SHAPE)
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA_FIELDS)).eval()
    llama.load_state_dict(model.state_dict())
    assert_same_logits(model(tokens(3, 17)).logits, llama(tokens(3, 17)).logits)


def test_v1_model_without_gain_is_diffllama_with_its_heads_in_another_order():
    model = small_model("diff_v1", shape=LLAMA_SHAPE, subln_affine=False, lambda_std=0.4)

    def halves(rows: torch.Tensor) -> torch.Tensor:
        """Heads (2i, 2i + 1) to heads (i, i + half)."""
        heads = rows.view(-1, 2, SHAPE.head_dim, rows.shape[1])
        return heads.transpose(0, 1).reshape(rows.shape)

    weights = {}
    for name, tensor in model.state_dict().items():
        moved = any(f"{part}_proj" in name for part in "qkv")
        weights[name.replace(".lam.", ".")] = halves(tensor) if moved else tensor
    diffllama = DiffLlamaForCausalLM(DiffLlamaConfig(**LLAMA_FIELDS)).eval()
    diffllama.load_state_dict(weights)
    assert_same_logits(model(tokens(3, 17)).logits, diffllama(tokens(3, 17)).logits)
    unmoved = {name.replace(".lam.", "."): tensor for name, tensor in model.state_dict().items()}
    diffllama.load_state_dict(unmoved)
    assert (model(tokens(3, 17)).logits - diffllama(tokens(3, 17)).logits).abs().max() > 0.1


@pytest.mark.parametrize("attention", VARIANTS)
def test_eager_and_sdpa_agree(attention):
    model = small_model(attention)
    logits = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        logits.append(model(tokens(2, 13)).logits)
    assert_same_logits(*logits)


# Flex attention compiles itself, and the libraries' own code meets what this version of torch has retired.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_flex_attention_agrees():
    # Flex attention wants widths that are powers of two.
    model = small_model("diff_v1", shape=dataclasses.replace(SHAPE, head_dim=8, num_layers=1))
    expected = model(tokens(2, 13)).logits
    model.set_attn_implementation("flex_attention")
    assert_same_logits(model(tokens(2, 13)).logits, expected)


@pytest.mark.parametrize("attention", VARIANTS)
def test_hidden_states_and_attention_maps_come_on_request(attention):
    model = small_model(attention, attn_implementation="eager")
    outputs = model(tokens(2, 5), output_attentions=True, output_hidden_states=True)
    assert len(outputs.hidden_states) == SHAPE.num_layers + 1
    heads = model.config.num_attention_heads
    assert [weights.shape for weights in outputs.attentions] == [(2, heads, 5, 5)] * SHAPE.num_layers
    for weights in outputs.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, heads, 5))


@pytest.mark.parametrize("attention", VARIANTS)
def test_loss_is_the_mean_over_the_next_tokens_that_count(attention):
    model, ids = small_model(attention), tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    outputs = model(ids, labels=labels)
    log_p = outputs.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(outputs.loss, -log_p[labels[:, 1:] != -100].mean())


@pytest.mark.parametrize("attention", VARIANTS)
def test_logits_can_be_asked_for_at_the_end_alone(attention):
    model = small_model(attention)
    assert_same_logits(model(tokens(2, 9), logits_to_keep=1).logits, model(tokens(2, 9)).logits[:, -1:])


# The successor of this name is younger than the oldest transformers that we take.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("attention", VARIANTS)
def test_gradient_checkpointing_changes_no_gradient(attention):
    model, runs, gradients = small_model(attention).train(), [], []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        loss = model(tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    # Once without, and with checkpointing forward and again in the backward pass.
    assert len(runs) == 3
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention", VARIANTS)
def test_every_parameter_gets_a_gradient(attention, tied):
    model = small_model(attention, tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize("attention", VARIANTS)
def test_rows_packed_one_after_another_do_not_see_each_other(attention):
    model, ids = small_model(attention), tokens(1, 13)
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(ids[:, :5]).logits, model(ids[:, 5:]).logits], dim=1)
    assert_same_logits(packed, alone)


def test_initial_values_follow_the_stated_distributions():
    shape = dataclasses.replace(SHAPE, hidden_size=256, num_heads=16, num_kv_heads=8, head_dim=64)
    torch.manual_seed(0)
    model = DiffTransformerForCausalLM(DiffTransformerConfig.from_shape(shape, "diff_v1", initializer_range=0.03))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.03, rel=0.05), name
        elif "lambda" in name:
            # 64 values: the estimate of their spread is off by 9%.
            assert parameter.std().item() == pytest.approx(0.1, rel=0.4), name
        else:
            assert (parameter == 1).all(), name


def on_meta(config: DiffTransformerConfig) -> DiffTransformerForCausalLM:
    with torch.device("meta"):
        return DiffTransformerForCausalLM(config)


@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize("attention", VARIANTS)
@pytest.mark.parametrize("preset", presets())
def test_parameters_are_as_many_as_planned(preset, attention, match):
    config = pair_config(grouped(ModelShape.preset(preset), attention), attention, match=match)
    model, planned = on_meta(config), count_parameters(config.shape(), attention)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    parts = {
        "attention": sum(size for name, size in sizes.items() if "self_attn" in name),
        "feed_forward": sum(size for name, size in sizes.items() if "mlp" in name),
        "norms": sum(size for name, size in sizes.items() if name.endswith("norm.weight")),
        "embedding": sizes["model.embed_tokens.weight"],
        "lm_head": sizes.get("lm_head.weight", 0),
    }
    assert parts == dataclasses.asdict(planned)
    assert sum(sizes.values()) == planned.total


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("preset", presets())
def test_v1_has_lambda_and_gain_more_than_softmax_and_nothing_else(preset, affine):
    shape = ModelShape.preset(preset)
    softmax, v1 = (
        {name: parameter.shape for name, parameter in on_meta(pair_config(shape, name_, **config)).named_parameters()}
        for name_, config in (("softmax", {}), ("diff_v1", {"subln_affine": affine}))
    )
    extra = {f"self_attn.lam.lambda_{name}": (shape.head_dim,) for name in ("q1", "k1", "q2", "k2")}
    if affine:
        extra["self_attn.subln.weight"] = (2 * shape.head_dim,)
    layers = range(shape.num_layers)
    assert v1 == softmax | {f"model.layers.{layer}.{name}": size for layer in layers for name, size in extra.items()}
    assert sum(size.numel() for size in v1.values()) < 1.001 * sum(size.numel() for size in softmax.values())
