"""Shapes from checkpoints: what is built from a shape and saved gives it back."""

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    DiffLlamaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from diffattn.errors import ConfigError
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.plan.checkpoint_shape import read_checkpoint
from diffattn.plan.cost import count_parameters
from diffattn.plan.named_model import parse_model
from diffattn.plan.shape import ModelShape

SHAPE = ModelShape(
    hidden_size=48, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=10, intermediate_size=88, vocab_size=300,
    tie_word_embeddings=False, max_position_embeddings=77, rope_theta=500.0,
)  # fmt: skip


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2", "gated"])
def test_our_own_configurations_come_back(tmp_path: Path, attention: str) -> None:
    for shape in (SHAPE, ModelShape.preset("300K")):
        folder = tmp_path / "model"
        DiffTransformerConfig.from_shape(shape, attention).save_pretrained(folder)
        found = read_checkpoint(folder)
        assert found == (dataclasses.replace(shape, name="model", source="config.json"), attention, {})


TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 40, "vocab_size": 60}  # fmt: skip
BIASES = {"attention_bias": True, "mlp_bias": True}
OURS = [
    {"attention": "softmax", **BIASES, "attention_output_bias": True},
    {"attention": "softmax", "qk_norm": True, "head_norm": True},
    {"attention": "diff_v1", **BIASES, "qk_norm": True},
    {"attention": "diff_v1", "subln_affine": False},
    {"attention": "diff_v1", "head_norm": False, "attention_output_bias": True},
    {"attention": "diff_v2", **BIASES, "qk_norm": True},
    {"attention": "diff_v2", "lambda_form": "one", "head_norm": True},
    {"attention": "gated", "attention_bias": True},
    {"attention": "dex", "attention_bias": True},
    {"attention": "dex", "dex_heads": [[0, 3], [], [1]]},
]
OTHERS = [
    LlamaConfig(**TINY, **BIASES),
    LlamaConfig(**TINY),
    MistralConfig(**TINY, head_dim=8),
    Qwen2Config(**TINY),
    Qwen3Config(**TINY, head_dim=16),
    Qwen3Config(**TINY, head_dim=8, attention_bias=True),
    DiffLlamaConfig(**TINY),
    DiffLlamaConfig(**TINY, attention_bias=True),
]


@pytest.mark.parametrize("config", [*(DiffTransformerConfig(**TINY, **more) for more in OURS), *OTHERS])
def test_what_is_planned_and_what_is_left_out_are_all_parameters(tmp_path: Path, config: PreTrainedConfig) -> None:
    config.save_pretrained(tmp_path)
    found = read_checkpoint(tmp_path)
    built = AutoModelForCausalLM.from_config(config).num_parameters()
    assert count_parameters(found.shape, found.attention).total + sum(found.left_out.values()) == built
    assert parse_model(str(tmp_path)).built == found.shape


def test_other_decoders_are_softmax_and_diffllama_is_v1(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 100, "vocab_size": 300}  # fmt: skip
    for config, attention in ((LlamaConfig(**sizes), "softmax"), (DiffLlamaConfig(**sizes), "diff_v1")):
        config.save_pretrained(tmp_path)
        shape, variant, _ = read_checkpoint(tmp_path / "config.json")
        assert variant == attention
        assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (4, 2, 16)
        assert shape.tie_word_embeddings is config.tie_word_embeddings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "a readable config.json is wanted"),
        ("[]", "it lacks no JSON object"),
        ('{"hidden_size": 3}', "it lacks num_hidden_layers"),
        (json.dumps({"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 9,
                     "vocab_size": 9}), "num_heads=3"),
        (json.dumps({"hidden_size": "x", "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 9,
                     "vocab_size": 9}), "hidden_size='x'"),
    ],
)  # fmt: skip
def test_a_bad_configuration_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
