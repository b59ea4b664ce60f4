import dataclasses

import pytest
import torch
from support.comparison import compare
from support.paper_layers import (
    KNOWN_WRONG,
    PaperGated,
    PaperGrouped,
    PaperGroupedLinearV2,
    PaperGroupedV2,
    PaperLinearV2,
    PaperNormedSoftmax,
    PaperOneV2,
    PaperOtherGroupsV2,
    PaperSoftmax,
    PaperV1,
    PaperV1WithoutNorm,
    PaperV2,
)
from support.small_models import SHAPE, small_model, tokens
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from diffattn.model.attention import ATTENTION, SoftmaxAttention
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffRotaryEmbedding
from diffattn.variants import VARIANTS

LAYER = 2
LENGTH = 7
PAPER = {
    "softmax": PaperSoftmax,
    "diff_v1": PaperV1,
    "diff_v2": PaperV2,
    "diff_gda": PaperGrouped,
    "diff_gda_v2": PaperGroupedV2,
    "gated": PaperGated,
}


def layer_of(attention: str, implementation: str = "sdpa", **config) -> SoftmaxAttention:
    """A layer with scores, λ and gains of the order of 1."""
    config = DiffTransformerConfig.from_shape(SHAPE, attention, attn_implementation=implementation, **config)
    layer = ATTENTION[attention](config, LAYER)
    torch.manual_seed(0)
    for name, parameter in layer.named_parameters():
        if "proj" in name:
            torch.nn.init.normal_(parameter, std=1.3 * parameter.shape[1] ** -0.5)
        elif "lambda" in name:
            torch.nn.init.normal_(parameter, std=0.4)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return layer


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, LENGTH, SHAPE.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)


def weights_of(layer: SoftmaxAttention, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the parameters in ``dtype``, λ in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        name: parameter.detach().to(wide if "lam." in name else dtype).requires_grad_()
        for name, parameter in layer.named_parameters()
    }


def with_gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent, allow_unused=True)]


def run_layer(layer: SoftmaxAttention, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    rope = DiffRotaryEmbedding(layer.config)(x, torch.arange(LENGTH)[None])
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(hidden, torch.finfo(torch.float32).min).to(x.dtype)
    eager = layer.config._attn_implementation == "eager"
    output, _ = layer(x, position_embeddings=rope, attention_mask=mask[None, None] if eager else None)
    return with_gradients(output, [x, *layer.parameters()])


def run_paper(paper: PaperSoftmax, layer: SoftmaxAttention, dtype: torch.dtype, x: Tensor) -> list[Tensor]:
    x = x.to(dtype).requires_grad_()
    w = weights_of(layer, dtype)
    return with_gradients(paper(x, w), [x, *w.values()])


def paper_of(attention: str, layer: SoftmaxAttention, kind: type | None = None) -> PaperSoftmax:
    kind = kind or PAPER[attention]
    return kind(SHAPE, layer.lam.lambda_init) if VARIANTS[attention].weights == "layer" else kind(SHAPE)


LAYERS = [
    ("softmax", {}, PaperSoftmax),
    ("softmax", {"head_norm": True}, PaperNormedSoftmax),
    ("diff_v1", {}, PaperV1),
    ("diff_v1", {"subln_affine": False}, PaperV1),
    ("diff_v1", {"lambda_init": 0.3}, PaperV1),
    ("diff_v1", {"head_norm": False}, PaperV1WithoutNorm),
    ("diff_v2", {}, PaperV2),
    ("diff_v2", {"lambda_form": "linear"}, PaperLinearV2),
    ("diff_v2", {"lambda_form": "one"}, PaperOneV2),
    ("diff_v2", {"pairs_share_group": False}, PaperOtherGroupsV2),
    ("diff_gda", {}, PaperGrouped),
    ("diff_gda", {"lambda_init": [0.1, 0.2, -0.0099]}, PaperGrouped),
    ("diff_gda_v2", {}, PaperGroupedV2),
    ("diff_gda_v2", {"lambda_form": "linear"}, PaperGroupedLinearV2),
    ("gated", {}, PaperGated),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("attention", "config", "kind"), LAYERS, ids=str)
def test_layer_is_the_papers_forward_and_in_every_gradient(attention, config, kind, implementation, dtype):
    layer = layer_of(attention, implementation, **config).to(dtype)
    paper, x = paper_of(attention, layer, kind), inputs(dtype)
    names = ["output", "d_x", *(f"d_{name}" for name, _ in layer.named_parameters())]
    normed = config.get("head_norm", VARIANTS[attention].norm) and "subln_affine" not in config
    assert ("subln.weight" in dict(layer.named_parameters())) == normed
    actual = run_layer(layer, x)
    expected, eager = run_paper(paper, layer, torch.float64, x), run_paper(paper, layer, dtype, x)
    compare(actual[:1], expected[:1], eager[:1])
    # λ is float32, but its gradient is a sum of terms that were rounded to the layer's dtype.
    floors = [2 * torch.finfo(dtype).eps * want.abs().max().item() for want in expected[1:]]
    compare(actual[1:], expected[1:], eager[1:], factor=3.0, names=names[1:], floors=floors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", VARIANTS)
def test_comparison_rejects_every_known_wrong_layer(attention, dtype):
    layer, x = layer_of(attention).to(dtype), inputs(dtype)
    right = paper_of(attention, layer)
    expected, eager = (run_paper(right, layer, each, x)[:1] for each in (torch.float64, dtype))
    for kind in KNOWN_WRONG[attention]:
        wrong = run_paper(paper_of(attention, layer, kind), layer, dtype, x)[:1]
        with pytest.raises(AssertionError, match="max error"):
            compare(wrong, expected, eager)


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
def test_half_precision_subtracts_and_norms_in_float32_and_rounds_once(attention):
    layer, x = layer_of(attention).bfloat16(), inputs(torch.bfloat16)
    config = layer.config
    o = torch.randn(3, LENGTH, config.num_attention_heads, config.head_dim).bfloat16()
    signal, noise = o[:, :, 0::2].float(), o[:, :, 1::2].float()
    if attention == "diff_v1":
        y = signal - layer.lam() * noise
        gain = layer.subln.weight.float()
        y = torch.nn.functional.rms_norm(y, (config.head_dim,), gain, config.subln_eps) * (1 - layer.lam.lambda_init)
    else:
        y = signal - layer.lambda_proj(x).float().sigmoid()[..., None] * noise
    *_, lam = layer.project(x)
    combined = layer.combine(o, lam)
    assert combined.dtype == torch.float32
    actual, expected = combined.bfloat16(), y.bfloat16()
    # Another order of the same float32 steps may round the last bit of a few values the other way.
    assert (actual != expected).float().mean() < 0.01


def test_v1_is_finite_and_near_the_definition_when_its_maps_nearly_cancel():
    layer, x = layer_of("diff_v1", lambda_init=0.99), inputs()
    with torch.no_grad():
        # Equal queries and keys for both maps and λ = 0.99: what the norm divides by is 1% of either map.
        for name in ("q_proj", "k_proj"):
            pairs = getattr(layer, name).weight.view(-1, 2, SHAPE.head_dim, SHAPE.hidden_size)
            pairs[:, 1] = pairs[:, 0]
        for vector in layer.lam.parameters():
            vector.zero_()
    expected = run_paper(paper_of("diff_v1", layer), layer, torch.float64, x)
    actual = run_layer(layer, x)
    assert all(torch.isfinite(tensor).all() for tensor in actual)
    # Rounding of either map counts 1 / (1 − λ) = 100 times in their difference.
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=0, atol=100 * 2**-23 * 4)


@pytest.mark.parametrize("attention", VARIANTS)
def test_one_attention_call_per_layer_forward_and_backward_unaffected(attention):
    calls = []

    def counting(module, query, key, value, *args, **kwargs):
        calls.append((query.shape, key.shape, value.shape))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("counting", counting)
    results = []
    for implementation in ("sdpa", "counting"):
        model = small_model(attention, attn_implementation=implementation)
        loss = model(tokens(2, 11), labels=tokens(2, 11)).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    config = model.config
    query = (2, config.num_attention_heads, 11, config.head_dim)
    key = (2, config.num_key_value_heads, 11, config.head_dim)
    assert calls == [(query, key, key)] * SHAPE.num_layers
    for plain, counted in zip(*results, strict=True):
        assert torch.equal(plain, counted)


def test_v1_lambda_at_the_start_is_lambda_init_plus_noise_of_the_stated_size():
    config = DiffTransformerConfig.from_shape(dataclasses.replace(SHAPE, num_layers=40), "diff_v1", lambda_init=0.5)
    assert config.layer_lambda_init(0) == config.layer_lambda_init(39) == 0.5
    vectors = [p for name, p in small_model("diff_v1", lambda_std=0.1).named_parameters() if "lam.lambda_" in name]
    assert len(vectors) == 4 * SHAPE.num_layers
    assert all(vector.shape == (SHAPE.head_dim,) and vector.dtype == torch.float32 for vector in vectors)
    # 120 values of N(0, 0.1): the estimate of their spread is off by 6%.
    assert torch.cat(vectors).std().item() == pytest.approx(0.1, rel=0.3)
