"""Folders of public models at small sizes, with a tokenizer: one for each row of the table in docs/convert.md."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.motif_loop import MOTIF, motif_tensors
from support.served import SENTENCES
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from diffattn.data.tokenizer import train_tokenizer

VOCABULARY = 320
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "initializer_range": 0.3, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
    "torch_dtype": "float32",
}  # fmt: skip
_LLAMA3 = {"rope_theta": 500000.0, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
           "original_max_position_embeddings": 64, "rope_type": "llama3"}}  # fmt: skip
# The public diffllama models: rotary positions in the former spelling, and keys that no class reads.
_DIFFLLAMA = _LLAMA3 | {"attention_bias": False, "lambda_std_dev": 0.1, "mlp_bias": False, "pretraining_tp": 1}
_MOTIF = {name: _SMALL[name] for name in _SMALL if name not in ("num_attention_heads", "num_key_value_heads",
          "head_dim", "pad_token_id")}  # fmt: skip
# The model_type of each row, and the fields by which it differs from a small plain model of that type.
_FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "diffllama-0.3B": ("diffllama", _DIFFLLAMA | {"tie_word_embeddings": True}),
    "diffllama-1B": ("diffllama", _DIFFLLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "diffllama-375M": ("diffllama", _DIFFLLAMA | {"patch_size": 4}),
    "diffllama-300M": ("diffllama", _DIFFLLAMA | {"patch_size": 1}),
    "motif-2.6B": ("Motif", MOTIF["Motif-2.6B"] | _MOTIF | {"tie_word_embeddings": True}),
    "motif-2-12.7B": ("Motif", MOTIF["Motif-2-12.7B"] | _MOTIF | {"head_dim": 16}),
    "motif-3": ("Motif", {"attention_cls": "gdla", "diff_v2": True, "kv_lora_rank": 8}),
    "phi-4-mini-flash": ("phi4flash", {}),
    "diff-transformer-410m, diff-transformer-1.4b, diff-llama": ("diff_llama", {"attn_family": "diff_attn"}),
    "llama-3.2-1B": ("llama", _LLAMA3 | {"tie_word_embeddings": True}),
    "smollm2-135M": ("llama", {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1,
                                "hidden_size": 48}),
    "qwen2.5-0.5B": ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}),
    "qwen3-0.6B": ("qwen3", {"use_sliding_window": False, "tie_word_embeddings": True}),
    "mistral-7B-v0.1": ("mistral", {"sliding_window": 6}),
    "smollm3-3B": ("smollm3", {"no_rope_layers": [1, 0], "use_sliding_window": False, "tie_word_embeddings": True}),
    "phi-3-mini": ("phi3", {"sliding_window": 6, "num_key_value_heads": 4, "rope_scaling": None}),
    "olmo-2-1B": ("olmo2", {}),
    "gemma-3-1B": ("gemma3_text", {}),
    "mixtral-8x7B": ("mixtral", {"num_local_experts": 2}),
    "qwen3-next-80B-A3B": ("qwen3_next", {}),
}  # fmt: skip


def public_folder(name: str, folder: Path, *, refused: bool = False) -> Path:
    """Writes a folder as its makers publish it.

    Args:
        name: the first cell of a row.
        folder: the folder, which is not there.
        refused: whether the model is not built, since nothing but its config.json is read.
    """
    kind, fields = _FIELDS[name]
    config = {"model_type": kind} | (_SMALL if kind != "Motif" else {}) | fields
    folder.mkdir(parents=True)
    if refused:
        save_file({"model.embed_tokens.weight": torch.zeros(3, 2)}, folder / "model.safetensors")
    elif kind == "Motif":
        save_file(motif_tensors(config), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind].from_dict(copy.deepcopy(config)))
        for key, parameter in model.named_parameters():
            if "norm" in key:
                nn.init.uniform_(parameter, 0.5, 1.5)
        model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    train_tokenizer(SENTENCES, VOCABULARY).save_pretrained(folder)
    return folder
