"""Llama-like models made ours and back, by their logits; the second map lives; what we cannot compute is refused."""

import json
from typing import Any

import pytest
import torch
from support.small_models import assert_same_logits
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from diffattn.convert.llama import fold_dex, to_dex, to_diff_v2, to_llama, to_softmax
from diffattn.errors import CheckpointError, ConfigError, UnsupportedError
from diffattn.model.configuration import DiffTransformerConfig, lambda_init_schedule
from diffattn.model.modeling import DiffTransformerForCausalLM

# Odd head counts in groups; a hidden size that is no multiple of them where the architecture allows it.
SIZES = {"vocab_size": 71, "hidden_size": 45, "intermediate_size": 67, "num_hidden_layers": 3, "num_attention_heads": 9,
         "num_key_value_heads": 3, "head_dim": 10, "max_position_embeddings": 24, "initializer_range": 0.15,
         "rms_norm_eps": 3e-6, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
ROPE_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 12, "rope_theta": 500.0}  # fmt: skip
ROPE_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6, "rope_theta": 300.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 5, "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 16, "rope_theta": 300.0}  # fmt: skip
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
NOPE = {"pad_token_id": None, "no_rope_layers": [0, 1, 1]}
WINDOWS = {"sliding_window": 5, "use_sliding_window": True}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama3 positions": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": ROPE_LLAMA3}),
    "yarn positions": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": ROPE_YARN}),
    "linear positions": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "dynamic positions": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "longrope positions": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LONG}),
    "llama of one group": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 9}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "hidden_size": 46}),
    "mistral, a window beyond": (MistralConfig, MistralForCausalLM, {"sliding_window": 40}),
    "mistral with a window": (MistralConfig, MistralForCausalLM, {"sliding_window": 5}),
    "ministral": (MinistralConfig, MinistralForCausalLM, {"sliding_window": 5, "layer_types": LAYERS}),
    "qwen2 with windows": (Qwen2Config, Qwen2ForCausalLM, WINDOWS | {"max_window_layers": 1}),
    "qwen3 with windows": (Qwen3Config, Qwen3ForCausalLM, WINDOWS | {"layer_types": LAYERS}),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"pad_token_id": None, "no_rope_layers": [1, 0, 1]}),
    "smollm3 with windows": (SmolLM3Config, SmolLM3ForCausalLM, WINDOWS | NOPE),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": False}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"hidden_size": 47}),
    "qwen3 biases": (Qwen3Config, Qwen3ForCausalLM, {"attention_bias": True, "tie_word_embeddings": True}),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def pretrained(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model whose scores are of the order of 1, whose biases are not zero and whose gains are not one."""
    configuration, model, fields = MODELS[name]
    torch.manual_seed(0)
    made = model(configuration(**(SIZES | fields | changes)))
    for parameter_name, parameter in made.named_parameters():
        if "norm" in parameter_name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return made.to(dtype).eval()


def checkpoint(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What stands in its folder: a configuration that went through JSON, tensors without tied ones."""
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return json.loads(json.dumps(model.config.to_diff_dict())), weights


def built(config: dict[str, Any], tensors: dict[str, Tensor]) -> PreTrainedModel:
    """A model of a configuration that went through JSON, with every one of the tensors and no other."""
    config = json.loads(json.dumps(config))
    if config["model_type"] == "diff_transformer":
        made: PreTrainedModel = DiffTransformerForCausalLM(DiffTransformerConfig.from_dict(config))
    else:
        made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    missing, unexpected = made.load_state_dict(tensors, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if config["tie_word_embeddings"] else [])
    dtype = tensors["model.embed_tokens.weight"].dtype
    return made.to(dtype).eval()


def ids(length: int = 24, batch: int = 2) -> Tensor:
    return torch.randint(3, 71, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel, length: int = 24) -> Tensor:
    return model(ids(length)).logits


def assert_bit_for_bit(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor)


@EVERY
def test_softmax_keeps_the_tensors_and_the_logits(name: str) -> None:
    source = pretrained(name)
    config, tensors = checkpoint(source)
    ours_config, ours_tensors = to_softmax(config, tensors)
    assert_bit_for_bit(ours_tensors, tensors)
    ours = built(ours_config, ours_tensors)
    assert_same_logits(logits(ours), logits(source))
    # Positions beyond what was trained, where the rotary functions that depend on the length change.
    assert_same_logits(logits(ours, 31), logits(source, 31))
    assert ours_config["converted"] == {"from": config["model_type"], "same_function": True}
    assert (ours_config["bos_token_id"], ours_config["eos_token_id"]) == (1, 2)


@EVERY
def test_v2_keeps_the_logits(name: str) -> None:
    source = pretrained(name)
    config, tensors = to_diff_v2(*checkpoint(source))
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (18, source.config.num_key_value_heads)
    assert config["converted"] == {"from": source.config.model_type, "noise": "copy", "same_function": True}
    assert_same_logits(logits(built(config, tensors)), logits(source))


@EVERY
def test_dex_keeps_the_logits(name: str) -> None:
    source = pretrained(name)
    config, tensors = to_dex(*checkpoint(source), heads=[[0, 8], [], list(range(9))])
    assert tensors["model.layers.0.self_attn.dex.weight"].shape == (2, 10, 10)
    assert not any(".1.self_attn.dex" in tensor for tensor in tensors)
    assert tensors["model.layers.2.self_attn.dex.lam"].tolist() == pytest.approx([lambda_init_schedule(2)] * 9)
    assert_same_logits(logits(built(config, tensors)), logits(source))


@EVERY
def test_back_to_llama_is_bit_for_bit(name: str) -> None:
    source = pretrained(name)
    config, tensors = checkpoint(source)
    back_config, back = to_llama(*to_softmax(config, tensors))
    assert_bit_for_bit(back, tensors)
    again, expected_logits = built(back_config, back), logits(source)
    assert torch.equal(logits(again), expected_logits)
    assert torch.equal(logits(again, 31), logits(source, 31))
    family = name.split()[0].rstrip(",")
    expected = family if family in ("mistral", "ministral", "qwen2", "qwen3", "smollm3") else "llama"
    assert back_config["model_type"] == expected
    assert back_config["architectures"] == [type(again).__name__]
    # An engine that reads the older spelling alone.
    older = {key: value for key, value in back_config.items() if key != "rope_parameters"}
    assert torch.equal(logits(built(older, back)), expected_logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_of_numbers(dtype: torch.dtype) -> None:
    """One map less half of its copy, twice: every factor is a power of two, so that V2 rounds as softmax does."""
    softmax = to_softmax(*checkpoint(pretrained("qwen2", dtype=dtype)))
    v2_config, v2_tensors = to_diff_v2(*softmax)
    dex_config, dex_tensors = to_dex(*softmax)
    for tensors in (softmax[1], v2_tensors):
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert {str(t.dtype) for name, t in dex_tensors.items() if ".dex." in name} == {"torch.float32"}
    expected = logits(built(*softmax))
    assert expected.dtype == dtype
    v2 = built(v2_config, v2_tensors)
    v2.set_attn_implementation("sdpa")
    # float64 products of another size are summed in another order.
    torch.testing.assert_close(logits(v2), expected, rtol=0, atol=1e-13 if dtype == torch.float64 else 0.0)
    assert torch.equal(logits(built(dex_config, dex_tensors)), expected)


def halves(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Second maps behind all first ones, as DiffLlama orders them, and not the adjacent pairs that V2 subtracts."""
    for name, tensor in tensors.items():
        if "q_proj" in name:
            pairs = tensor.reshape(9, 2, 10, -1)
            tensors[name] = torch.cat((pairs[:, 0], pairs[:, 1])).reshape(tensor.shape)


def output_not_doubled(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith("o_proj.weight"):
            tensors[name] = tensor / 2


def output_bias_doubled(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith("o_proj.bias"):
            tensors[name] = tensor * 2


def query_bias_by_halves(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith("q_proj.bias"):
            tensors[name] = tensor.view(9, 2, 10)[:, 0].reshape(-1).repeat(2)


def second_map_of_zeros(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """A zero query attends to all alike, and does not leave the function as it was."""
    for name, tensor in tensors.items():
        if "q_proj" in name:
            tensor.view(9, 2, 10, -1)[:, 1] = 0


@pytest.mark.parametrize(
    "wrong", [halves, output_not_doubled, output_bias_doubled, query_bias_by_halves, second_map_of_zeros]
)
def test_a_wrong_v2_is_noticed(wrong: Any) -> None:
    source = pretrained("llama biases")
    config, tensors = to_diff_v2(*checkpoint(source))
    wrong(config, tensors)
    with pytest.raises(AssertionError):
        assert_same_logits(logits(built(config, tensors)), logits(source))


def step(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the first step, and how far AdamW then moves each value."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    model(ids(), labels=ids()).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    moved = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    return gradients, moved


def test_the_second_map_of_v2_lives_from_the_first_step() -> None:
    model = built(*to_diff_v2(*checkpoint(pretrained("llama"))))
    expected = logits(model)
    for layer in range(3):
        query = model.model.layers[layer].self_attn.q_proj.weight.view(9, 2, 10, -1)
        assert torch.equal(query[:, 0], query[:, 1])
    gradients, moved = step(model)
    for values in (gradients, moved):
        for layer in range(3):
            prefix = f"model.layers.{layer}.self_attn."
            noise = values[f"{prefix}q_proj.weight"].view(9, 2, 10, -1)[:, 1]
            # Every head of every layer.
            assert (noise.abs().amax(dim=(1, 2)) > 1e-6).all()
            assert (values[f"{prefix}lambda_proj.weight"].abs().amax(dim=1) > 1e-6).all()
    query = gradients["model.layers.1.self_attn.q_proj.weight"].view(9, 2, 10, -1)
    # The halves part: d/dq of 2·o1 − 2·o2/2.
    torch.testing.assert_close(query[:, 1], -0.5 * query[:, 0], rtol=1e-4, atol=1e-8)
    assert (logits(model) - expected).abs().max() > 1e-3


def test_the_published_start_at_zero_is_dead() -> None:
    """V1 with Wq2 = Wk2 = λ = 0: a softmax model, whose second map gets a gradient of exactly zero for ever."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 20}
    model = DiffTransformerForCausalLM(
        DiffTransformerConfig(**sizes, attention="diff_v1", lambda_init=0.0, attn_implementation="sdpa")
    )
    second: dict[str, Any] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                second[name] = lambda values: values.view(-1, 2, 10, 45)[:, 1]
            elif "lambda" in name:
                second[name] = lambda values: values
            if name in second:
                second[name](parameter).zero_()
    for values in step(model):
        assert len(second) == 3 * (2 + 4)
        for name, part in second.items():
            assert part(values[name]).abs().max() == 0.0
        assert values["model.layers.0.self_attn.o_proj.weight"].abs().max() > 1e-6


def test_dex_lives_from_the_first_step_and_its_lambda_from_the_second() -> None:
    model = built(*to_dex(*checkpoint(pretrained("llama"))))
    gradients, moved = step(model)
    for layer in range(3):
        for values in (gradients, moved):
            projection = values[f"model.layers.{layer}.self_attn.dex.weight"]
            assert (projection.abs().amax(dim=(1, 2)) > 1e-6).all()
        assert gradients[f"model.layers.{layer}.self_attn.dex.lam"].abs().max() == 0.0
        model.model.layers[layer].self_attn.dex.annealed.fill_(0.5)
    gradients, _ = step(model)
    for layer in range(3):
        assert (gradients[f"model.layers.{layer}.self_attn.dex.lam"].abs() > 0).all()


def test_a_perturbed_second_map_says_that_the_function_moved() -> None:
    source = pretrained("qwen3")
    config, tensors = to_diff_v2(*checkpoint(source), noise="perturbed", noise_std=0.1, seed=3)
    assert config["converted"] == {
        "from": "qwen3", "noise": "perturbed", "same_function": False, "noise_std": 0.1, "seed": 3,
    }  # fmt: skip
    plain = to_diff_v2(*checkpoint(source))[1]
    for name, tensor in plain.items():
        if name.endswith("q_proj.weight"):
            moved = (tensors[name] - tensor).view(9, 2, 10, -1)
            assert moved[:, 0].abs().max() == 0.0
            assert moved[:, 1].std().item() == pytest.approx(0.1 * tensor.std().item(), rel=0.1)
        else:
            assert torch.equal(tensors[name], tensor)
    far = (logits(built(config, tensors)) - logits(source)).abs().max()
    assert 1e-3 < far < 3
    assert_bit_for_bit(to_diff_v2(*checkpoint(source), noise="perturbed", noise_std=0.1, seed=3)[1], tensors)
    other = to_diff_v2(*checkpoint(source), noise="perturbed", noise_std=0.1, seed=4)[1]
    assert not torch.equal(other["model.layers.0.self_attn.q_proj.weight"],
                           tensors["model.layers.0.self_attn.q_proj.weight"])  # fmt: skip


@pytest.mark.parametrize("annealed", [0.0, 0.4, 1.0])
def test_a_trained_dex_folds_into_the_output_projection(annealed: float) -> None:
    config, tensors = to_dex(*checkpoint(pretrained("llama biases")), heads=[[0, 8], [], [3, 1, 4]])
    model = built(config, tensors)
    for layer in (0, 2):
        dex = model.model.layers[layer].self_attn.dex
        torch.nn.init.normal_(dex.weight, std=0.3)
        torch.nn.init.normal_(dex.lam)
        dex.annealed.fill_(annealed)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert (logits(model) - logits(built(config, tensors))).abs().max() > 0.1
    folded = fold_dex(config, trained)
    assert_same_logits(logits(built(*folded)), logits(model))
    assert_same_logits(logits(built(*to_llama(*folded))), logits(model))
    with pytest.raises(UnsupportedError, match="wanted a 'dex' model"):
        fold_dex(*folded)


def test_older_spellings_of_positions() -> None:
    source = pretrained("llama3 positions")
    config, tensors = checkpoint(source)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope | {"type": rope.pop("rope_type")}
    assert_same_logits(logits(built(*to_softmax(config, tensors))), logits(source))


def test_defaults_of_the_architecture_and_old_buffers() -> None:
    """What a short ``config.json`` leaves out is what transformers fills in: Llama's own ε, and untied embeddings."""
    source = pretrained("llama", rms_norm_eps=1e-6, tie_word_embeddings=False)
    config, tensors = checkpoint(source)
    for key in ("rms_norm_eps", "tie_word_embeddings", "rope_parameters", "hidden_act", "attention_bias", "mlp_bias"):
        del config[key]
    ours, kept = to_softmax(config, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)})
    assert (ours["rms_norm_eps"], ours["tie_word_embeddings"]) == (1e-6, False)
    assert_same_logits(logits(built(ours, kept)), logits(source))


def test_tied_embeddings_that_were_stored_twice() -> None:
    config, tensors = checkpoint(pretrained("llama tied"))
    embedding = tensors["model.embed_tokens.weight"]
    twice = to_softmax(config, tensors | {"lm_head.weight": embedding.clone()})
    assert_bit_for_bit(twice[1], tensors)
    head = to_softmax(config, {n: t for n, t in tensors.items() if "embed" not in n} | {"lm_head.weight": embedding})
    assert_bit_for_bit(head[1], tensors)
    other = torch.randn_like(embedding)
    untied_config, untied = to_softmax(config, tensors | {"lm_head.weight": other})
    assert untied_config["tie_word_embeddings"] is False
    assert torch.equal(untied["lm_head.weight"], other)


@pytest.mark.parametrize(
    ("name", "changes", "error", "words"),
    [
        ("llama", {"model_type": "gemma2"}, UnsupportedError, ["gemma2", "norms behind attention", "qwen3"]),
        ("llama", {"model_type": None}, UnsupportedError, ["None"]),
        ("llama", {"quantization_config": {"bits": 4}}, UnsupportedError, ["quantization_config"]),
        ("llama", {"num_local_experts": 8}, UnsupportedError, ["num_local_experts"]),
        ("llama", {"final_logit_softcapping": 30.0}, UnsupportedError, ["final_logit_softcapping"]),
        ("llama", {"logit_scale": 0.06}, UnsupportedError, ["logit_scale"]),
        ("llama", {"partial_rotary_factor": 0.5}, UnsupportedError, ["partial_rotary_factor is 0.5"]),
        ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, UnsupportedError,
         ["proportional", "yarn"]),
        ("llama", {"hidden_act": "wave"}, UnsupportedError, ["wave"]),
        ("llama", {"num_attention_heads": "many"}, ConfigError, ["many"]),
        ("llama", {"layer_types": LAYERS}, UnsupportedError, ["layer_types, which the layers of llama do not read"]),
        ("llama", {"sliding_window": 8}, UnsupportedError, ["sliding_window, which the layers of llama do not read"]),
        ("qwen2", {"layer_types": LAYERS}, ConfigError, ["sliding_attention and no sliding_window"]),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": LAYERS[:2]}, ConfigError, ["layer"]),
        ("mistral", {"sliding_window": 1}, ConfigError, ["sliding_window=1; wanted an integer from 2"]),
        ("smollm3", {"no_rope_layers": [1]}, ConfigError, ["no_rope_layers of config.json has 1 numbers; wanted 3"]),
        ("qwen3", {"num_hidden_layers": 4, "layer_types": None}, CheckpointError, ["lack model.layers.3.", "more"]),
        ("llama", {"intermediate_size": 66}, CheckpointError, ["gate_proj", "67×45", "66×45"]),
        ("llama", {"attention_bias": True}, CheckpointError, ["lack", "bias"]),
        ("llama biases", {"mlp_bias": False}, CheckpointError, ["for which the model has no place", "mlp", "bias"]),
    ],
)  # fmt: skip
def test_what_is_refused_in_one_line(name: str, changes: dict, error: type, words: list[str]) -> None:
    config, tensors = checkpoint(pretrained(name))
    for convert in (to_softmax, to_diff_v2, to_dex):
        with pytest.raises(error) as raised:
            convert(config | changes, tensors)
        assert "\n" not in str(raised.value)
        for word in words:
            assert word in str(raised.value)


def test_a_window_that_no_layer_uses_is_none() -> None:
    config, tensors = checkpoint(pretrained("qwen2"))
    to_softmax(config | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, tensors)


def test_weights_that_are_no_numbers_of_ours() -> None:
    config, tensors = checkpoint(pretrained("llama"))
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype in (torch.int8, torch.float8_e4m3fn):
        with pytest.raises(UnsupportedError, match=f"{name} is .*8.*before it is quantised"):
            to_softmax(config, tensors | {name: torch.zeros(67, 45).to(dtype)})
    half = {n: t.half() for n, t in tensors.items()}
    half["model.layers.2.self_attn.o_proj.weight"][0, 0] = 4e4
    with pytest.raises(UnsupportedError, match=r"layers.2.self_attn.o_proj.weight overflows float16"):
        to_diff_v2(config, half)


def test_options_that_are_refused() -> None:
    source = checkpoint(pretrained("llama"))
    with pytest.raises(ConfigError, match="noise is 'zeros'; wanted one of copy, perturbed"):
        to_diff_v2(*source, noise="zeros")
    with pytest.raises(ConfigError, match="noise_std is 0"):
        to_diff_v2(*source, noise="perturbed", noise_std=0.0)
    with pytest.raises(ConfigError, match="dex_heads of layer 1"):
        to_dex(*source, heads=[[0], [9], [0]])


@pytest.mark.parametrize("convert", [to_diff_v2, to_dex])
def test_a_differential_model_is_no_llama(convert: Any) -> None:
    made = convert(*checkpoint(pretrained("llama")))
    attention = made[0]["attention"]
    with pytest.raises(UnsupportedError, match=f"attention is '{attention}'; wanted a softmax model, because"):
        to_llama(*made)
    with pytest.raises(UnsupportedError, match="wanted a softmax model to start from"):
        to_diff_v2(*made)
    with pytest.raises(UnsupportedError, match="model_type is 'llama'; wanted diff_transformer"):
        to_llama(*checkpoint(pretrained("llama")))


def test_what_llama_has_no_switch_for_is_refused() -> None:
    config, tensors = to_softmax(*checkpoint(pretrained("llama")))
    for convert in (to_llama, to_dex):
        with pytest.raises(UnsupportedError, match="'head_norm': True"):
            convert(config | {"head_norm": True}, tensors)
    with pytest.raises(UnsupportedError, match="Llama has no gate"):
        to_llama(config | {"attention": "gated"}, tensors)


def test_what_no_llama_has_is_refused() -> None:
    config, tensors = to_softmax(*checkpoint(pretrained("llama")))
    with pytest.raises(UnsupportedError, match="is_causal is False; wanted True, since Llama has no such thing"):
        to_llama(config | {"is_causal": False}, tensors)
    with pytest.raises(UnsupportedError, match="hidden_act is 'poly_norm'; wanted a function that transformers knows"):
        to_llama(config | {"hidden_act": "poly_norm"}, tensors)


def test_parts_that_no_architecture_has_together() -> None:
    config, tensors = to_softmax(*checkpoint(pretrained("qwen3")))
    tensors |= {f"model.layers.{i}.self_attn.o_proj.bias": torch.zeros(47) for i in range(3)}
    with pytest.raises(UnsupportedError, match="qk_norm is True, attention_bias False, attention_output_bias True"):
        to_llama(config | {"attention_output_bias": True}, tensors)
