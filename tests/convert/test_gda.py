"""Llama-like models with one noise head for each key/value head: the same logits, and a second map that trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.llama_folders import make_folder
from support.small_models import assert_same_logits
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from diffattn.convert.convert import convert
from diffattn.convert.gda import parameters_beside_v2, to_diff_gda_v2
from diffattn.convert.llama import to_diff_v2
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM

SIZES = {"vocab_size": 71, "hidden_size": 45, "intermediate_size": 67, "num_hidden_layers": 3,
         "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 10, "max_position_embeddings": 24,
         "initializer_range": 0.15}  # fmt: skip
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama of one group": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 1}),
    "llama, a key head each": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 9}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True}),
}
EVERY = pytest.mark.parametrize("name", MODELS)
IDS = torch.randint(3, 71, (2, 24), generator=torch.Generator().manual_seed(1))


def pretrained(name: str) -> Any:
    configuration, model, fields = MODELS[name]
    torch.manual_seed(0)
    made = model(configuration(**SIZES | fields))
    for key, parameter in made.named_parameters():
        if "norm" in key:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def checkpoint(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """A pretrained model, and what stands in its folder."""
    source = pretrained(name).to(dtype)
    tied = ("lm_head.weight",) if source.config.tie_word_embeddings else ()
    weights = {key: tensor for key, tensor in source.state_dict().items() if key not in tied}
    return source, source.config.to_diff_dict(), weights


def converted(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    source, config, weights = checkpoint(name, dtype)
    return source, *to_diff_gda_v2(config, weights)


def built(config: dict[str, Any], weights: dict[str, Tensor]) -> DiffTransformerForCausalLM:
    model = DiffTransformerForCausalLM(DiffTransformerConfig.from_dict(config))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config["tie_word_embeddings"] else [])
    return model.to(weights["model.embed_tokens.weight"].dtype).eval()


@torch.no_grad()
@EVERY
@pytest.mark.parametrize("implementation", ["diff_fused", "sdpa"])
def test_the_logits_stay(name: str, implementation: str) -> None:
    source, config, weights = converted(name)
    groups = source.config.num_key_value_heads
    assert (config["num_attention_heads"], config["num_noise_heads"]) == (9 + groups, groups)
    assert config["converted"] == {"from": source.config.model_type, "same_function": True}
    model = built(config, weights)
    model.set_attn_implementation(implementation)
    assert_same_logits(model(IDS).logits, source(IDS).logits)


@torch.no_grad()
def test_every_pretrained_bit_stays_and_the_noise_head_is_a_copy() -> None:
    source, _, weights = converted("llama biases", torch.bfloat16)
    for name, tensor in source.state_dict().items():
        if ".q_proj." not in name:
            assert torch.equal(weights[name], tensor)
            continue
        heads, before = weights[name].unflatten(0, (3, 4, 10)), tensor.unflatten(0, (3, 3, 10))
        assert torch.equal(heads[:, :3], before)
        assert torch.equal(heads[:, 3], before[:, 0])
    assert all(not weights[name].any() for name in weights if "lambda_proj" in name)


def step(model: DiffTransformerForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    optimizer.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    return gradients


def test_lambda_lives_from_the_first_step_and_the_noise_queries_from_the_second() -> None:
    _, config, weights = converted("llama")
    model = built(config, weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    first, second = step(model, optimizer), step(model, optimizer)
    for layer in range(3):
        prefix = f"model.layers.{layer}.self_attn."
        # A row of W_λ for each signal head.
        assert first[f"{prefix}lambda_proj.weight"].shape == (9, 45)
        assert (first[f"{prefix}lambda_proj.weight"].abs().amax(dim=1) > 1e-6).all()
        noise = [values[f"{prefix}q_proj.weight"].unflatten(0, (3, 4, 10))[:, 3] for values in (first, second)]
        assert noise[0].abs().max() == 0.0
        assert (noise[1].abs().amax(dim=(1, 2)) > 1e-8).all()


@EVERY
def test_the_parameters_that_are_added_are_counted_beside_those_of_v2(name: str) -> None:
    _, config, weights = checkpoint(name)
    made, ours = to_diff_gda_v2(config, weights)
    counts = [
        sum(tensor.numel() for tensor in each.values()) for each in (weights, ours, to_diff_v2(config, weights)[1])
    ]
    more, v2_more = parameters_beside_v2(made)
    assert (more, v2_more) == (counts[1] - counts[0], counts[2] - counts[0])
    # With as many key/value heads as heads, both have a noise head for each.
    assert more < v2_more or (name, more) == ("llama, a key head each", v2_more)


def test_the_result_says_what_it_adds_beside_v2(tmp_path: Path) -> None:
    source = make_folder("llama", tmp_path / "source")
    result = convert(source, tmp_path / "made", "diff_gda_v2")
    v2 = convert(source, tmp_path / "v2", "diff_v2")
    more, v2_more = result.parameters - result.source_parameters, v2.parameters - v2.source_parameters
    assert 0 < more < v2_more
    assert f"{more:,} parameters more than the source; diff_v2 would have {v2_more:,} more" in result.notes
    assert result.parameters == sum(t.numel() for t in load_file(tmp_path / "made" / "model.safetensors").values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    answers = [m.generate(IDS[:, :5], max_new_tokens=6, do_sample=False, eos_token_id=None)
               for m in (model, AutoModelForCausalLM.from_pretrained(source))]  # fmt: skip
    assert torch.equal(*answers)
