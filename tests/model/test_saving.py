import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.small_models import SHAPE, small_model, tokens
from transformers import AutoModelForCausalLM

import diffattn  # noqa: F401 - registers the model with the Auto classes
from diffattn.model.modeling import DiffTransformerForCausalLM, DiffTransformerModel
from diffattn.variants import VARIANTS

LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
HALVES = (torch.bfloat16, torch.float16)


def lambdas(model) -> dict[str, torch.Tensor]:
    found = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(LAMBDAS)}
    assert len(found) == 4 * SHAPE.num_layers
    return found


def assert_lambda_and_rope_kept(model, original) -> None:
    """Float32, and the original's bits; everything else is in the model's dtype."""
    kept = {**lambdas(original), **dict(original.named_buffers())}
    for name, tensor in {**lambdas(model), **dict(model.named_buffers())}.items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, kept[name]), name
    others = {tensor.dtype for name, tensor in model.state_dict().items() if not name.endswith(LAMBDAS)}
    assert others == {model.dtype}


CASTS = {
    "bfloat16()": lambda model: model.bfloat16(),
    "half()": lambda model: model.half(),
    "to(bfloat16)": lambda model: model.to(torch.bfloat16),
    "to(dtype=float16)": lambda model: model.to(dtype=torch.float16),
    "half().float()": lambda model: model.half().float(),
    "bfloat16().to(cpu, float16)": lambda model: model.bfloat16().to("cpu", torch.float16),
    "double()": lambda model: model.double(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=list(CASTS))
def test_lambda_and_rope_stay_float32_when_the_model_is_cast(cast):
    model = cast(small_model("diff_v1"))
    assert_lambda_and_rope_kept(model, small_model("diff_v1"))
    assert model(tokens(1, 5)).logits.dtype == model.dtype


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_lambda_and_rope_are_float32_in_a_model_built_in_half_precision(dtype):
    config = small_model("diff_v1", lambda_std=0.3).config
    models = []
    for wanted in (torch.float32, dtype):
        torch.manual_seed(3)
        models.append(AutoModelForCausalLM.from_config(config, dtype=wanted))
    assert models[1].dtype == dtype
    found = {**lambdas(models[1]), **dict(models[1].named_buffers())}
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    # Float32 values, not rounded ones in a float32 tensor.
    assert not all(torch.equal(tensor, tensor.to(dtype).float()) for tensor in lambdas(models[1]).values())
    assert all(torch.equal(tensor, dict(models[0].named_buffers())[name]) for name, tensor in models[1].named_buffers())
    models[1](tokens(2, 5), labels=tokens(2, 5)).loss.backward()
    assert all(p.grad.dtype == p.dtype for p in models[1].parameters())


def test_lambda_in_a_bfloat16_model_is_computed_in_float32():
    model = small_model("diff_v1", lambda_std=0.3)
    expected = [layer.self_attn.lam() for layer in model.model.layers]
    for layer, lam in zip(model.bfloat16().model.layers, expected, strict=True):
        assert torch.equal(layer.self_attn.lam(), lam)
        assert lam != lam.bfloat16()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention", VARIANTS)
def test_saving_and_loading_changes_no_bit(attention, tied, tmp_path):
    model = small_model(attention, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".json") == ["model.safetensors"]
    loaded = DiffTransformerForCausalLM.from_pretrained(tmp_path).eval()
    saved, found = model.state_dict(), loaded.state_dict()
    assert saved.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
    assert all(torch.equal(dict(loaded.named_buffers())[name], tensor) for name, tensor in model.named_buffers())
    assert len(dict(model.named_buffers())) == 2
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_loading_in_half_precision_keeps_lambda_and_rope(dtype, tmp_path):
    model = small_model("diff_v1", lambda_std=0.3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    assert_lambda_and_rope_kept(loaded, model)


def test_a_half_precision_file_holds_float32_lambda_and_comes_back_as_it_was(tmp_path):
    model = small_model("diff_v1", lambda_std=0.3).bfloat16()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert {dtype for name, dtype in dtypes.items() if name.endswith(LAMBDAS)} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if not name.endswith(LAMBDAS)} == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_lambda_and_rope_kept(loaded, model)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_lambda_that_a_file_holds_in_half_precision_is_used_in_float32(dtype, tmp_path):
    small_model("diff_v1").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    for name, tensor in lambdas(loaded).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, small_model("diff_v1").state_dict()[name].bfloat16().float())


@pytest.mark.parametrize("attention", VARIANTS)
def test_a_scaled_rope_is_remade_after_loading(attention, tmp_path):
    model = small_model(attention, rope_parameters={"rope_type": "linear", "factor": 3.0})
    model.save_pretrained(tmp_path)
    loaded = DiffTransformerForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    assert not torch.equal(model(tokens(2, 9)).logits, small_model(attention)(tokens(2, 9)).logits)


def test_the_decoder_alone_loads_from_the_whole_models_file(tmp_path):
    model = small_model("diff_v1")
    model.save_pretrained(tmp_path)
    decoder = DiffTransformerModel.from_pretrained(tmp_path).eval()
    hidden = decoder(tokens(2, 9)).last_hidden_state
    assert torch.equal(hidden, model.model(tokens(2, 9)).last_hidden_state)


def test_rows_of_the_vocabulary_can_be_added():
    model = small_model("diff_v1")
    before = model(tokens(2, 9)).logits
    model.resize_token_embeddings(SHAPE.vocab_size + 5, mean_resizing=False)
    torch.testing.assert_close(model(tokens(2, 9)).logits[..., : SHAPE.vocab_size], before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
