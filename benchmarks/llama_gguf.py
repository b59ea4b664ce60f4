"""A softmax model of ours as a GGUF file for llama.cpp, which has no differential attention, and the file quantised.

The model goes through `diffattn convert --to llama`. llama.cpp turns neighbouring channels of a head together, where
Llama's folders turn channels that are half a head apart; so the rows of the query and key matrices change places. The
file has no tokenizer: ids go in and logits come out.
"""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def neighbours(weight: Floats, heads: int) -> Floats:
    """The rows of a query or key matrix, whose heads turn channel i with i + d/2, as heads that turn 2i with 2i + 1."""
    width = weight.shape[0] // heads
    return weight.reshape(heads, 2, width // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    """The name of a tensor of a Llama folder in a GGUF file."""
    stem, _, kind = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[rest]}.{kind}"


def gguf_tensors(config: dict[str, Any], tensors: dict[str, Floats]) -> dict[str, Floats]:
    """The tensors of a Llama folder by their names in a GGUF file, in the layout that llama.cpp expects."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    named = {}
    for name, tensor in tensors.items():
        projection = name.split(".")[-2]
        named[gguf_name(name)] = neighbours(tensor, heads[projection]) if projection in heads else tensor
    return named


def write_gguf(source: Path, file: Path) -> None:
    """Write the softmax model of a folder of ours as a GGUF file in float32."""
    import gguf
    from safetensors.numpy import load_file

    from diffattn.convert.convert import convert

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "llama"
        convert(source, folder, "llama")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = {}
        for part in sorted(folder.glob("*.safetensors")):
            tensors |= {name: tensor.astype(np.float32) for name, tensor in load_file(part).items()}
    writer = gguf.GGUFWriter(os.fspath(file), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, tensor in gguf_tensors(config, tensors).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_gguf(source: Path, file: Path, kind: str) -> None:
    """Write a float32 GGUF file in another form of llama.cpp, such as ``Q4_0``, by its own quantiser."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(file), ctypes.byref(options))
    if status:
        raise RuntimeError(f"llama.cpp's quantiser returned {status} for {kind}")
