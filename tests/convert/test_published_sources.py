"""Configurations of published Llama-like models: read with the published number of parameters, or refused by name."""

import math
from typing import Any

import pytest

from diffattn.convert.convert import kind_of
from diffattn.convert.sources import softmax_config
from diffattn.errors import UnsupportedError
from diffattn.model.tensors import tensor_shapes

MISTRAL = {
    "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip
QWEN = {
    "model_type": "qwen2", "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768,
    "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
PHI = {
    "model_type": "phi3", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "embd_pdrop": 0.0,
    "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
    "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 32064,
}  # fmt: skip
PHI_LONG = PHI | {
    "max_position_embeddings": 131072, "sliding_window": 262144,
    "rope_scaling": {"type": "longrope", "long_factor": [1.0 + index for index in range(48)],
                     "short_factor": [1.0] * 48},
}  # fmt: skip
PHI_4_MINI = PHI | {
    "intermediate_size": 8192, "hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75, "vocab_size": 200064, "bos_token_id": 199999, "eos_token_id": 199999,
    "pad_token_id": 199999, "tie_word_embeddings": True,
}  # fmt: skip
SMOLLM3 = {
    "model_type": "smollm3", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": None,
    "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536, "max_window_layers": 28,
    "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128012, "pretraining_tp": 2,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
GRANITE = {
    "model_type": "granite", "attention_bias": False, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
    "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0, "num_attention_heads": 32,
    "num_hidden_layers": 40, "num_key_value_heads": 8, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05,
    "rope_theta": 5000000.0, "tie_word_embeddings": True, "vocab_size": 49155,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "parameters", "window", "unrotated"),
    [
        (MISTRAL, 7_241_732_096, 4096, None),
        (MISTRAL | {"sliding_window": None, "vocab_size": 32768, "rope_theta": 1e6}, 7_248_023_552, None, None),
        (QWEN, 7_615_616_512, None, None),
        (PHI, 3_821_079_552, 2047, None),
        (PHI_LONG, 3_821_079_552, 262144, None),
        (SMOLLM3, 3_075_098_624, None, list(range(3, 36, 4))),
    ],
)
def test_a_published_model_is_read(config: dict[str, Any], parameters: int, window: Any, unrotated: Any) -> None:
    assert kind_of(config) == "llama"
    ours = softmax_config(config)
    assert sum(math.prod(shape) for shape in tensor_shapes(ours).values()) == parameters
    assert (ours.sliding_window, ours.unrotated_layers) == (window, unrotated)
    assert str(ours.dtype) == "torch.bfloat16"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PHI_4_MINI, "partial_rotary_factor is 0.75; wanted 1"),
        (GRANITE, "embedding_multiplier is 12.0, a constant that our decoder does not multiply by; wanted 1"),
        (
            {"model_type": "gemma2"},
            "norms behind attention .*, token embeddings that are multiplied by a constant, and",
        ),
        ({"model_type": "gemma3_text"}, "norms behind attention"),
        ({"model_type": "olmo2"}, "norms behind attention .*, and norms of queries and keys over all heads at once"),
        ({"model_type": "glm"}, "rotary positions of a part of each head"),
        ({"model_type": "cohere"}, "LayerNorm in place of RMSNorm, and logits that are multiplied by a constant"),
    ],
)
def test_a_published_model_is_refused_with_its_reason(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words) as caught:
        softmax_config(config)
    assert "\n" not in str(caught.value)
