"""attn_implementation="diff_fused": the same model as under "sdpa", by the kernel where it can be and without it."""

import copy
import dataclasses
import inspect
import itertools

import pytest
import torch
from support.comparison import compare
from support.fused_cases import needs_kernel, needs_the_kernel
from support.kernel_calls import recorded_calls
from support.small_models import SHAPE, assert_same_logits, small_model, tokens
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from diffattn.errors import ConfigError
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.fused import DIFF_FUSED, diff_fused_attention, diff_fused_mask, serving_backend
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.ops.cpu import build
from diffattn.ops.triton import configs
from diffattn.ops.triton import operator as fused_triton
from diffattn.probes.lens import attention_maps

DIFFERENTIAL = ("diff_v1", "diff_v2")
SHAPES = {
    "grouped": SHAPE,
    "a group per head": dataclasses.replace(SHAPE, num_heads=4, num_kv_heads=4, head_dim=22, num_layers=2),
    "one group": dataclasses.replace(SHAPE, num_heads=6, num_kv_heads=2, head_dim=6, num_layers=2),
}
LENGTH = 23


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return recorded_calls(monkeypatch)


def padded(ids: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """The second row without 5 tokens and the third without 11, on one side."""
    mask = torch.ones_like(ids)
    for row, missing in ((1, 5), (2, 11)):
        mask[row, slice(None, missing) if side == "left" else slice(-missing, None)] = 0
    return ids * mask, mask


def step(model, ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Logits where they count, and every parameter's gradient."""
    labels = ids if mask is None else torch.where(mask.bool(), ids, -100)
    outputs = model(ids, attention_mask=mask, labels=labels, use_cache=False)
    logits = outputs.logits if mask is None else outputs.logits[mask.bool()]
    return [logits, *torch.autograd.grad(outputs.loss, list(model.parameters()))]


def both_steps(model, ids: Tensor, mask: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
    steps = []
    for implementation in (DIFF_FUSED, "sdpa"):
        model.set_attn_implementation(implementation)
        steps.append(step(model, ids, mask))
    return steps[0], steps[1]


def assert_same_step(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert_same_logits(actual[0], expected[0])
    for gradient, wanted in zip(actual[1:], expected[1:], strict=True):
        largest = wanted.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5 * max(largest, 0.1))


@needs_the_kernel
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attention", DIFFERENTIAL)
def test_logits_and_every_gradient_are_those_of_sdpa(attention, shape, side, served):
    model, ids, mask = small_model(attention, shape=SHAPES[shape]), tokens(3, LENGTH), None
    if side:
        ids, mask = padded(ids, side)
    assert_same_step(*both_steps(model, ids, mask))
    assert served == ["kernel"] * model.config.num_hidden_layers


SWITCHED = [
    ("diff_v1", {"head_norm": False}),
    ("diff_v2", {"head_norm": True}),
    ("diff_v2", {"head_norm": True, "subln_affine": False}),
    ("diff_v2", {"lambda_form": "linear"}),
    ("diff_v2", {"lambda_form": "one"}),
    # Signal heads that share a noise head.
    ("diff_gda", {}),
    ("diff_gda_v2", {"sliding_window": 7}),
]


@needs_the_kernel
@pytest.mark.parametrize(("attention", "fields"), SWITCHED, ids=str)
def test_switches_of_a_variant_are_served_alike(attention, fields, served):
    model, ids = small_model(attention, **fields), tokens(3, LENGTH)
    config = model.config
    assert ("gda" in attention) == (config.num_attention_heads > 2 * (config.num_noise_heads or 99))
    assert_same_step(*both_steps(model, ids))
    assert served == ["kernel"] * model.config.num_hidden_layers
    with torch.no_grad():
        # One query behind a cache.
        whole = model(ids).logits[:, -1]
        model.set_attn_implementation(DIFF_FUSED)
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        assert_same_logits(model(ids[:, -1:], past_key_values=cache).logits[:, -1], whole)


def test_maps_of_other_groups_are_no_difference_of_maps():
    model = small_model("diff_v2", pairs_share_group=False)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match="no difference of two maps"):
        model.set_attn_implementation(DIFF_FUSED)


@needs_the_kernel
@needs_kernel(torch.bfloat16)
@pytest.mark.parametrize("attention", DIFFERENTIAL)
def test_bfloat16_is_at_most_as_far_from_float64_as_eager_code_allows(attention, served):
    model, ids = small_model(attention).bfloat16(), tokens(3, LENGTH)
    wide = copy.deepcopy(model).double()
    steps = []
    for each, implementation in ((model, DIFF_FUSED), (wide, "eager"), (model, "eager")):
        each.set_attn_implementation(implementation)
        steps.append(step(each, ids))
    actual, expected, eager = steps
    # λ is float32 in the float64 model too, and its gradient with it.
    expected = [wanted.double() for wanted in expected]
    compare(actual[:1], expected[:1], eager[:1])
    names = [f"d_{name}" for name, _ in model.named_parameters()]
    floors = [4 * torch.finfo(torch.bfloat16).eps * wanted.abs().max().item() for wanted in expected[1:]]
    compare(actual[1:], expected[1:], eager[1:], factor=3.0, names=names, floors=floors)
    assert served == ["kernel"] * SHAPE.num_layers


def test_v1_lambda_is_float32_in_a_bfloat16_model_and_learns(monkeypatch):
    given = []

    def recording(*args, lam, **kwargs):
        given.append(lam)
        return diff_fused_attention(*args, lam=lam, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, DIFF_FUSED, recording)
    model = small_model("diff_v1").bfloat16()
    model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    assert [lam.dtype for lam in given] == [torch.float32] * SHAPE.num_layers
    for layer, lam in zip(model.model.layers, given, strict=True):
        assert torch.equal(lam, layer.self_attn.lam())
        for vector in layer.self_attn.lam.parameters():
            assert vector.grad.dtype == torch.float32
            assert vector.grad.abs().max() > 0


def test_v1_norm_of_a_bfloat16_call_is_float32():
    layer = small_model("diff_v1").bfloat16().model.layers[1].self_attn
    o = torch.randn(2, 5, SHAPE.num_heads // 2, 2 * SHAPE.head_dim).bfloat16()
    wide = o.double()
    rms = (wide.square().mean(-1, keepdim=True) + layer.subln.eps).sqrt()
    expected = wide / rms * layer.subln.weight.double() * (1 - layer.lam.lambda_init)
    torch.testing.assert_close(layer.subln(o, layer.subln.scale), expected.float(), rtol=1e-6, atol=1e-6)


def test_v1_norm_takes_its_scale_beside_its_input():
    """By its one input vLLM would know it for a plain norm and put its own there, which has no scale."""
    norm = small_model("diff_v1").model.layers[1].self_attn.subln
    assert list(inspect.signature(norm.forward).parameters) == ["y_BTHV", "scale"]
    with pytest.raises(TypeError):
        norm(torch.randn(1, 2, 3, 2 * SHAPE.head_dim))


@pytest.mark.parametrize("attention", DIFFERENTIAL)
def test_one_call_per_layer_with_unpadded_queries_and_the_caches_keys(attention, monkeypatch):
    calls = []

    def counting(module, query, key, value, *args, **kwargs):
        calls.append((query.shape, key.shape, value.shape))
        return diff_fused_attention(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, DIFF_FUSED, counting)
    model = small_model(attention)
    model(tokens(2, 11))
    query = (2, model.config.num_attention_heads, 11, SHAPE.head_dim)
    key = (2, model.config.num_key_value_heads, 11, model.config.head_dim)
    assert calls == [(query, key, key)] * SHAPE.num_layers


@needs_the_kernel
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("attention", DIFFERENTIAL)
def test_gradient_checkpointing_changes_no_gradient(attention, served):
    model = small_model(attention).train()
    plain = step(model, tokens(2, 9))
    model.gradient_checkpointing_enable()
    for checkpointed, wanted in zip(step(model, tokens(2, 9)), plain, strict=True):
        assert torch.equal(checkpointed, wanted)
    assert served == ["kernel"] * 3 * SHAPE.num_layers


# (queries, first query's position, keys): a whole text, a chunk behind a cache, one token, a static cache's unused end.
LENGTHS = [(7, 0, 7), (3, 4, 7), (1, 6, 7), (7, 0, 11), (3, 4, 11), (1, 6, 11)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_compact_mask_hides_what_the_library_hides(lengths):
    queries, offset, keys = lengths
    written = torch.ones(3, offset + queries, dtype=torch.bool)
    hidden = written.clone()
    hidden[1, :2], hidden[2, -3:], hidden[2, 1] = False, False, False
    options = [(None, 3), (written, 3), (hidden, 3)]
    for (attention_mask, batch), as_tensor in itertools.product(options, (False, True)):
        given = {"attention_mask": attention_mask, "mask_function": causal_mask_function}
        expected = sdpa_mask(batch, queries, keys, offset, allow_is_causal_skip=False, **given)
        given["q_offset"] = torch.tensor(offset) if as_tensor else offset
        compact = diff_fused_mask(batch, queries, keys, allow_is_causal_skip=False, **given)
        assert compact.dtype == torch.int32
        assert compact.shape == (2, batch, 1, 1, keys)
        first, end = compact
        t = torch.arange(queries)[:, None]
        assert torch.equal((first <= t) & (t < end), expected)
        plain = keys == offset + queries and attention_mask is not hidden and not as_tensor
        assert (diff_fused_mask(batch, queries, keys, **given) is None) == plain


def test_a_pattern_that_is_not_causal_is_the_librarys_mask_and_never_none():
    def window(batch, head, query, key):
        return (key <= query) & (key > query - 3)

    given = {"mask_function": window, "q_offset": 2}
    mask = diff_fused_mask(2, 5, 7, allow_is_bidirectional_skip=True, **given)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, sdpa_mask(2, 5, 7, allow_is_causal_skip=False, **given))


def own_mask(model, ids):
    visible = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril().triu(-4)
    return model(ids, attention_mask=visible.expand(ids.shape[0], 1, -1, -1)).logits


def left_padded(model, ids):
    ids, mask = padded(ids, "left")
    return torch.where(mask.bool()[..., None], model(ids, attention_mask=mask).logits, 0.0)


def in_chunks(model, ids):
    past = model(ids[:, :4], use_cache=True).past_key_values
    return model(ids[:, 4:], past_key_values=past).logits


STANDARD_CALLS = {
    "a mask of one's own": (own_mask, {}),
    "float64": (lambda model, ids: model(ids).logits, {"dtype": torch.float64}),
    "no kernel": (lambda model, ids: model(ids).logits, {"kernel": False}),
    "no kernel, left padding": (left_padded, {"kernel": False}),
    "no kernel, chunks": (in_chunks, {"kernel": False}),
}


@pytest.mark.parametrize("case", STANDARD_CALLS)
@pytest.mark.parametrize("attention", DIFFERENTIAL)
def test_a_call_that_the_kernel_does_not_serve_is_the_standard_call(attention, case, served, monkeypatch):
    run, options = STANDARD_CALLS[case]
    if options.get("kernel") is False:
        monkeypatch.setattr(build, "unavailable", lambda dtype: "fused_cpu: switched off")
    model = small_model(attention).to(options.get("dtype", torch.float32))
    actual = run(model, tokens(3, 14))
    assert set(served) == {"standard"}
    assert len(served) % SHAPE.num_layers == 0
    model.set_attn_implementation("sdpa")
    assert_same_logits(actual, run(model, tokens(3, 14)))


OPTIONS = {
    "is_causal": False,
    "position_bias": torch.randn(1, 24, 7, 7),
    "output_attentions": True,
    "dropout": 0.5,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_the_kernel_does_not_have_reaches_the_standard_call(option, served):
    layer = small_model("diff_v2").model.layers[0].self_attn
    q, k, v = torch.randn(2, 24, 7, 10), torch.randn(2, 4, 7, 10), torch.randn(2, 4, 7, 10)
    given = {option: OPTIONS[option]}
    torch.manual_seed(0)
    actual, _ = diff_fused_attention(layer, q, k, v, None, scaling=0.3, lam=torch.tensor(0.7), **given)
    torch.manual_seed(0)
    o, _ = sdpa_attention_forward(layer, q, k, v, None, scaling=0.3, **given)
    torch.testing.assert_close(actual, o[:, :, 0::2] - 0.7 * o[:, :, 1::2])
    assert served == ["standard"]


@pytest.mark.parametrize("kernel", [pytest.param(True, marks=needs_the_kernel), False])
@pytest.mark.parametrize("attention", DIFFERENTIAL)
def test_queries_before_the_first_token_give_zeros(attention, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(build, "unavailable", lambda dtype: "fused_cpu: switched off")
    model, seen = small_model(attention), []
    layer = model.model.layers[1].self_attn
    layer.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ids, mask = padded(tokens(3, LENGTH), "left")
    loss = model(ids, attention_mask=mask, labels=torch.where(mask.bool(), ids, -100)).loss
    assert ((seen[0] == 0).all(-1) == (mask == 0)).all()
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("attention", ["softmax", *DIFFERENTIAL])
def test_a_differential_model_is_fused_where_nothing_was_asked_for(attention, tmp_path):
    default = "sdpa" if attention == "softmax" else DIFF_FUSED
    model = small_model(attention)
    assert model.config._attn_implementation == model.model.config._attn_implementation == default
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    for auto in (DiffTransformerForCausalLM, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path)
        assert loaded.config._attn_implementation == default
        loaded.set_attn_implementation("sdpa")
        assert loaded.config._attn_implementation == "sdpa"
        for name in ("sdpa", "eager", "flex_attention", "paged|eager"):
            assert auto.from_pretrained(tmp_path, attn_implementation=name).config._attn_implementation == name
    config = DiffTransformerConfig.from_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == default


def test_softmax_refuses_to_be_fused():
    with pytest.raises(
        ConfigError, match=r"'diff_fused' with attention='softmax', .* no difference of two maps; wanted"
    ):
        small_model("softmax", attn_implementation=DIFF_FUSED)
    with pytest.raises(ConfigError, match="no difference of two maps"):
        small_model("softmax").set_attn_implementation(DIFF_FUSED)


@pytest.mark.parametrize("attention", DIFFERENTIAL)
def test_maps_need_eager_attention_as_they_do_under_sdpa(attention):
    model = small_model(attention)
    with pytest.raises(ValueError, match=r"output_attentions.* is not supported .*diff_fused"):
        model.config.output_attentions = True
    assert not model(tokens(1, 5), output_attentions=True).attentions
    maps = attention_maps(model, tokens(1, 5), layer=1, head=2)
    assert model.config._attn_implementation == DIFF_FUSED
    model.set_attn_implementation("eager")
    assert maps == attention_maps(model, tokens(1, 5), layer=1, head=2)


def test_what_serves_a_model_is_named_by_device_dtype_and_width(monkeypatch):
    monkeypatch.setattr(configs, "_facts", lambda index: ("sm_90", configs.SHARED["sm_90"], 132))
    monkeypatch.setattr(fused_triton, "triton_version", lambda: "3.6.0")
    # Tensors without data that say that they lie on a GPU.
    with FakeTensorMode():
        assert serving_backend("diff_v1", "cuda", torch.bfloat16, 128) == "fused_triton"
        assert serving_backend("diff_v2", "cuda", torch.float16, 64) == "fused_triton"
        assert serving_backend("diff_v1", "cuda", torch.bfloat16, 130) == "standard"
        assert serving_backend("diff_v1", "cuda", torch.float32, 64) == "standard"
        assert serving_backend("softmax", "cuda", torch.bfloat16, 64) == "standard"
        # Nobody timed V2 of 256 against PyTorch's kernels.
        assert serving_backend("diff_v2", "cuda", torch.bfloat16, 256) == "standard"
    monkeypatch.setattr(build, "unavailable", lambda dtype: None if dtype == torch.float32 else "none")
    assert serving_backend("diff_v1", "cpu", torch.float32, 64) == "fused_cpu"
    assert serving_backend("diff_v1", "cpu", torch.bfloat16, 64) == "standard"
