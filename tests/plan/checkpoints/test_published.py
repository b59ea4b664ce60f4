"""Files as their makers publish them: the parameters are those of their weights, and no code of theirs runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from diffattn.model.configuration import DiffTransformerConfig
from diffattn.plan.answer import plan
from diffattn.plan.checkpoints.kinds import KINDS
from diffattn.plan.checkpoints.shape import read_checkpoint
from diffattn.plan.setting import Setting

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 40, "vocab_size": 60}  # fmt: skip


def planned(folder: Path) -> int:
    """Parameters that a plan of the folder alone says."""
    return plan(str(folder), setting=Setting(context=64)).model.estimate.parameters.total


def sizes(hidden: int, layers: int, heads: int, groups: int, feed_forward: int, vocabulary: int) -> dict[str, int]:
    values = (hidden, layers, heads, groups, feed_forward, vocabulary)
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
            "vocab_size")  # fmt: skip
    return dict(zip(keys, values, strict=True))


# What the authors' own files say, and how many parameters their weights have.
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "Llama-3.2-1B": ("llama", sizes(2048, 16, 32, 8, 8192, 128_256) | {"head_dim": 64, "tie_word_embeddings": True,
                     "mlp_bias": False, "pretraining_tp": 1, "is_decoder": True}, 1_235_814_400),
    "Qwen2.5-0.5B": ("qwen2", sizes(896, 24, 14, 2, 4864, 151_936) | {"tie_word_embeddings": True,
                     "use_sliding_window": False, "sliding_window": 32_768, "use_mrope": False}, 494_032_768),
    "Qwen3-0.6B": ("qwen3", sizes(1024, 28, 16, 8, 3072, 151_936) | {"head_dim": 128, "tie_word_embeddings": True,
                   "sliding_window": None}, 596_049_920),
    "SmolLM2-135M": ("llama", sizes(576, 30, 9, 3, 1536, 49_152) | {"tie_word_embeddings": True}, 134_515_008),
    "gemma-2-2b": ("gemma2", sizes(2304, 26, 8, 4, 9216, 256_000) | {"head_dim": 256}, 2_614_341_888),
    "gemma-3-1b": ("gemma3_text", sizes(1152, 26, 4, 1, 6912, 262_144) | {"head_dim": 256}, 999_885_952),
    "Mistral-7B": ("mistral", sizes(4096, 32, 32, 8, 14_336, 32_000), 7_241_732_096),
    "Phi-3-mini": ("phi3", sizes(3072, 32, 32, 32, 8192, 32_064), 3_821_079_552),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_parameters_that_they_have(tmp_path: Path, name: str) -> None:
    kind, values, expected = PUBLISHED[name]
    given = values | {"model_type": kind, "architectures": [KINDS[kind].architecture], "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert planned(tmp_path) == expected


# Files with all that their makers wrote into them: what a layer is not made of is let pass.
WHOLE: dict[str, tuple[dict[str, Any], int]] = {
    "Phi-3-mini": (
        {"_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"], "attention_dropout": 0.0,
         "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 1, "embd_pdrop": 0.0,
         "eos_token_id": 32_000, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
         "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3", "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
         "pad_token_id": 32_000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10_000.0,
         "sliding_window": 2047, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
         "transformers_version": "4.41.0.dev0", "vocab_size": 32_064},
        3_821_079_552,
    ),
    "DiffLlama-375M": (
        {"architectures": ["DiffLlamaForCausalLM"], "model_type": "diffllama", "hidden_size": 1024, "mlp_bias": False,
         "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 4,
         "head_dim": 64, "vocab_size": 128_256, "tie_word_embeddings": True, "max_position_embeddings": 131_072,
         "attention_bias": False, "lambda_std_dev": 0.1, "pretraining_tp": 1, "patch_size": 4,
         "rope_theta": 500_000.0, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
         "original_max_position_embeddings": 8192, "rope_type": "llama3"}},
        374_641_664,
    ),
    "SmolLM2-135M": (
        {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
         "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
         "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama",
         "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
         "rms_norm_eps": 1e-5, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100_000,
         "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
         "vocab_size": 49_152, "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
        134_515_008,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_published_files_are_planned_as_they_are(tmp_path: Path, name: str) -> None:
    values, expected = WHOLE[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert planned(tmp_path) == expected


def motif(tmp_path: Path, **more: Any) -> Path:
    """A folder in the published layout of Motif 2, with code that must not run."""
    values = TINY | {"model_type": "Motif", "hidden_act": "poly_norm", "architectures": ["MotifForCausalLM"],
                     "auto_map": {"AutoConfig": "configuration_motif.MotifConfig"}} | more  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "configuration_motif.py").write_text("raise SystemExit('this was run')")
    return tmp_path


def test_motif_is_v1_counted_tensor_by_tensor(tmp_path: Path) -> None:
    """Against the list of its tensors; its own code is named and never run."""
    motif(tmp_path)
    D, L, d, F, V = 32, 3, 8, 40, 60
    of_layer = 2 * 4 * d * D + 2 * 2 * d * D + 3 * D * F + 2 * D + 4 * d + 2 * d + 4
    assert planned(tmp_path) == 2 * V * D + L * of_layer + D
    found = read_checkpoint(tmp_path)
    assert (found.attention, found.shape.num_heads, found.shape.num_kv_heads) == ("diff_v1", 4, 2)
    said = f"The code that {tmp_path.name} names (auto_map) is never run: its config.json alone is read."
    assert found.said == (said,)
    assert said in plan(str(tmp_path)).notes
    # And biases: of queries, keys and values, or of all matrices.
    qkv = (4 + 2 * 2) * d
    motif(tmp_path, qkv_bias=True)
    assert planned(tmp_path) == 2 * V * D + L * (of_layer + qkv) + D
    motif(tmp_path, use_bias=True)
    assert planned(tmp_path) == 2 * V * D + L * (of_layer + qkv + 2 * D + 2 * F) + D


def test_motif_with_noise_heads_is_gda_counted_tensor_by_tensor(tmp_path: Path) -> None:
    """8 signal and 2 noise heads over 2 pairs of key/value heads: queries of 10, an output of 8 twice as wide."""
    groups = {"num_attention_heads": 10, "num_key_value_heads": 4, "num_noise_heads": 2, "head_dim": 6, "k_ratio": 1}
    motif(tmp_path, **groups, expanded=True)
    D, L, d, F, V = 32, 3, 6, 40, 60
    of_layer = 10 * d * D + 2 * 4 * d * D + 8 * 2 * d * D + 3 * D * F + 2 * D + 4 * d + 2 * d + 4
    assert planned(tmp_path) == 2 * V * D + L * of_layer + D
    found = read_checkpoint(tmp_path)
    shape = found.shape
    assert (found.attention, shape.num_heads, shape.num_kv_heads, shape.signals_per_noise) == ("diff_gda", 16, 4, 4)
    with torch.device("meta"):
        ours = DiffTransformerConfig.from_shape(shape.plain(), "diff_gda", hidden_act="poly_norm")
        assert AutoModelForCausalLM.from_config(ours).num_parameters() == planned(tmp_path)
    # The softmax model that it replaces stands beside it, and the cache is that of its 4 keys and values.
    result = plan(str(tmp_path), f"softmax:{tmp_path}", Setting(context=64, machine=None))
    assert result.model.estimate.cache_bytes_per_token == 2 * 2 * 4 * d * L
    assert result.against is not None
    assert result.against.shape.num_heads == 16
