"""Gated attention against an implementation that is not ours: that of Qwen3-Next in transformers."""

import pytest
import torch
from support.small_models import SHAPE, small_model, tokens
from torch import Tensor
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding

from diffattn.model.attention import GatedAttention
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffRotaryEmbedding, DiffTransformerForCausalLM

LENGTH = 7


def layers() -> tuple[GatedAttention, Qwen3NextAttention]:
    """Both with the same weights, in float64; gates far from ½ and gains that are not 1."""
    config = DiffTransformerConfig.from_shape(SHAPE, "gated", attn_implementation="sdpa", qk_norm=True)
    ours = GatedAttention(config, 0).double()
    torch.manual_seed(0)
    for name, weight in ours.named_parameters():
        if "proj" in name:
            torch.nn.init.normal_(weight, std=2 * weight.shape[1] ** -0.5)
        else:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    theirs = Qwen3NextAttention(
        Qwen3NextConfig(
            hidden_size=SHAPE.hidden_size, num_attention_heads=SHAPE.num_heads, num_key_value_heads=SHAPE.num_kv_heads,
            head_dim=SHAPE.head_dim, rms_norm_eps=config.rms_norm_eps, attn_implementation="sdpa",
            rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_theta, "partial_rotary_factor": 1.0},
        ),
        layer_idx=0,
    ).double()  # fmt: skip
    heads = (SHAPE.num_heads, SHAPE.head_dim, SHAPE.hidden_size)
    with torch.no_grad():
        # One projection of both, head by head: its query, then its gate.
        both = torch.stack((ours.q_proj.weight.view(heads), ours.g_proj.weight.view(heads)), dim=1)
        theirs.q_proj.weight.copy_(both.reshape(-1, SHAPE.hidden_size))
        for name in ("k_proj", "v_proj", "o_proj"):
            getattr(theirs, name).weight.copy_(getattr(ours, name).weight)
        for name in ("q_norm", "k_norm"):
            # Their gain is 1 + w.
            getattr(theirs, name).weight.copy_(getattr(ours, name).weight - 1)
    return ours, theirs


def hidden(length: int = LENGTH) -> Tensor:
    return torch.randn(3, length, SHAPE.hidden_size, generator=torch.Generator().manual_seed(1)).double()


def test_the_layer_is_qwen3_nexts_forward_and_in_every_gradient():
    ours, theirs = layers()
    places = torch.arange(LENGTH)[None]
    results = []
    for layer, rotary in (
        (ours, DiffRotaryEmbedding(ours.config)),
        (theirs, Qwen3NextRotaryEmbedding(theirs.config)),
    ):
        x = hidden().requires_grad_()
        y, _ = layer(x, position_embeddings=rotary(x, places), attention_mask=None)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).double()
        leaves = {"x": x, **dict(layer.named_parameters())}
        gradients = torch.autograd.grad(y, list(leaves.values()), cotangent)
        results.append({"output": y.detach(), **dict(zip(leaves, gradients, strict=True))})
    mine, their = results
    heads = (SHAPE.num_heads, 2, SHAPE.head_dim, SHAPE.hidden_size)
    query, gate = their.pop("q_proj.weight").view(heads).unbind(1)
    their |= {"q_proj.weight": query.flatten(0, 1), "g_proj.weight": gate.flatten(0, 1)}
    assert mine.keys() == their.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, their[name], rtol=1e-6, atol=1e-6 * their[name].abs().max().item(), msg=name)


def test_a_gate_starts_as_a_query_does_about_one_half():
    model = DiffTransformerForCausalLM(DiffTransformerConfig.from_shape(SHAPE, "gated"))
    opened = []
    for layer in model.model.layers:
        attention = layer.self_attn
        assert attention.g_proj.bias is None
        # 7,320 values each: an estimate of their spread is off by 1%.
        assert attention.g_proj.weight.std().item() == pytest.approx(attention.q_proj.weight.std().item(), rel=0.1)
        opened.append(attention.combining_weights(torch.nn.functional.rms_norm(hidden().float(), (SHAPE.hidden_size,))))
    gates = torch.stack(opened)
    assert gates.mean().item() == pytest.approx(0.5, abs=0.02)
    # The sigmoid of what has a spread of 1.
    assert gates.std().item() == pytest.approx(0.21, abs=0.03)


def test_rounding_to_bfloat16_leaves_the_gradient_of_a_gate_where_it_was():
    model, ids = small_model("gated"), tokens(4, 40)
    gates = [weight for name, weight in model.named_parameters() if "g_proj" in name]
    found = []
    for rounded in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            loss = model(ids, labels=ids).loss
        found.append(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, gates)]))
    plain, half = found
    assert not torch.equal(plain, half)
    # A bfloat16 is off by 1/512 at most.
    assert torch.cosine_similarity(plain, half, dim=0).item() > 0.999
