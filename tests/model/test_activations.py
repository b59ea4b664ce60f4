import pytest
import torch
from support.small_models import small_model, tokens

from diffattn.checkpoint_files import read_tensors
from diffattn.errors import ConfigError
from diffattn.model.activations import PolyNorm
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.model.tensors import check_whole


def poly_norm(x, weight, bias):
    """arXiv 2411.03884, power by power."""
    total = torch.zeros_like(x) + bias
    for power, factor in zip((3, 2, 1), weight, strict=True):
        raised = x**power
        total = total + factor * raised / (raised.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return total


def test_poly_norm_is_its_formula_and_in_every_gradient():
    module = PolyNorm().double()
    torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(module.bias)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    leaves = (x, module.weight, module.bias)
    actual, expected = module(x), poly_norm(x, module.weight, module.bias)
    torch.testing.assert_close(actual, expected)
    seed = torch.randn_like(actual)
    for got, wanted in zip(*(torch.autograd.grad(y, leaves, seed) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_poly_norm_of_half_precision_does_not_overflow():
    x = torch.tensor([[300.0, -40.0, 2.0]])
    module = PolyNorm().half()
    expected = poly_norm(x.double(), module.weight.double(), module.bias.double())
    assert torch.equal(module(x.half()), expected.half())


@pytest.mark.parametrize("name", ["poly_norm", "xielu"])
def test_activation_with_parameters_is_trained_saved_and_loaded(name, tmp_path):
    model = small_model("diff_v1", hidden_act=name, attention_bias=True, attention_output_bias=True, mlp_bias=True)
    loss = model(tokens(2, 9), labels=tokens(2, 9)).loss
    loss.backward()
    own = {key: x for key, x in model.named_parameters() if "act_fn" in key}
    assert own
    assert all(x.grad.abs().sum() > 0 for x in own.values())
    with torch.no_grad():
        for x in own.values():
            x.mul_(1.25)
    model.save_pretrained(tmp_path)
    check_whole(tmp_path, model.config, read_tensors(tmp_path))
    loaded = DiffTransformerForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(x, loaded.state_dict()[key]) for key, x in own.items())
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


@pytest.mark.parametrize("name", ["poly_norm", "xielu"])
def test_activation_that_a_checkpoint_lacks_starts_as_in_a_new_model(name, tmp_path):
    small_model("diff_v1").save_pretrained(tmp_path)
    config = DiffTransformerConfig.from_pretrained(tmp_path)
    config.hidden_act = name
    loaded = DiffTransformerForCausalLM.from_pretrained(tmp_path, config=config)
    fresh = small_model("diff_v1", hidden_act=name)
    for key, value in fresh.state_dict().items():
        if "act_fn" in key:
            assert torch.equal(loaded.state_dict()[key], value), key


def test_unknown_activation_is_refused():
    with pytest.raises(ConfigError, match="hidden_act='poly'; wanted an activation function of transformers, or poly"):
        DiffTransformerConfig(hidden_act="poly")


def test_poly_norm_is_refused_over_several_ranks():
    with pytest.raises(ConfigError, match=r"poly_norm.*one rank, because that function needs all channels"):
        DiffTransformerConfig(hidden_act="poly_norm").check_tensor_parallel(2)
