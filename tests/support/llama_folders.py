"""A small checkpoint folder of every kind that is converted, with the logits that it gives."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.motif_loop import MOTIF, motif_logits, motif_tensors
from support.reference_layers import ReferenceDecoder, reference_decoder
from support.small_models import small_model, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, DiffLlamaConfig, DiffLlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

IDS = tokens(2, 37)
SIZES = {"vocab_size": 71, "hidden_size": 61, "intermediate_size": 67, "num_hidden_layers": 3,
         "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 10, "max_position_embeddings": 89,
         "initializer_range": 0.15}  # fmt: skip
REFERENCE = {"model_type": "diff_transformer_reference", "vocab_size": 71, "intermediate_size": 67,
             "num_hidden_layers": 3, "max_position_embeddings": 89}  # fmt: skip
REFERENCES = {
    "reference V1": REFERENCE | {"version": 1, "form": "flash", "embed_dim": 120, "num_heads": 6, "num_kv_heads": 2},
    "reference V2": REFERENCE | {"version": 2, "embed_dim": 61, "num_heads": 9, "num_kv_heads": 3, "head_dim": 6},
}
MOTIFS = {"motif V1": "Motif-2.6B", "motif GDA": "Motif-2-12.7B"}
# The fields of a small model of ours that Motif can say: heads that fill the hidden size, its λ_init and activation.
SAYS_MOTIF: dict[str, Any] = {
    "hidden_act": "poly_norm",
    "hidden_size": 120,
    "tie_word_embeddings": False,
    "lambda_init": [0.8 - 0.6 * math.exp(-0.3 * (layer - 1)) for layer in range(3)],
}
EXTRA = {"tokenizer.json": '{"a":  1}', "tokenizer_config.json": "{}", "chat_template.jinja": "{{ x }}\n",
         "generation_config.json": '{"bos_token_id": 3}', "README.md": "not taken along"}  # fmt: skip


@torch.no_grad()
def make_folder(
    kind: str, folder: Path, *, target: str | None = None, dtype: torch.dtype = torch.float32, **save: Any
) -> Path:
    """Write the folder of a small model of a kind that a target can say, with files that stand for a tokenizer."""
    torch.manual_seed(0)
    if kind in REFERENCES:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(REFERENCES[kind]))
        weights = {name: tensor.to(dtype) for name, tensor in reference_decoder(REFERENCES[kind]).state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif kind in MOTIFS:
        folder.mkdir(parents=True)
        config = MOTIF[MOTIFS[kind]] | {"torch_dtype": str(dtype).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(motif_tensors(config, dtype=dtype), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        if kind == "diffllama":
            model = DiffLlamaForCausalLM(DiffLlamaConfig(**SIZES, lambda_std_dev=0.3))
        elif kind == "llama":
            model = Qwen2ForCausalLM(Qwen2Config(**SIZES | {"hidden_size": 72, "head_dim": 6}))
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.3)
        else:
            # V1 as its targets can say it: heads that fill the hidden size, and no gain; or all that Motif has.
            fields = {"hidden_size": 120, "subln_affine": False, "lambda_std": 0.3} if kind == "diff_v1" else {}
            model = small_model(kind, **(SAYS_MOTIF if target == "motif" else fields))
            for name, parameter in model.named_parameters():
                if ".dex." in name:
                    parameter.normal_(std=0.3)
        model.to(dtype).save_pretrained(folder, **save)
    for name, text in EXTRA.items():
        (folder / name).write_text(text)
    return folder


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    """Of a folder loaded as its kind is loaded, with not one tensor made up or left over."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "Motif":
        return motif_logits(config, load_file(folder / "model.safetensors"), IDS).float()
    if config["model_type"] == REFERENCE["model_type"]:
        weights = load_file(folder / "model.safetensors")
        decoder = ReferenceDecoder(config, gain=any("subln" in name for name in weights))
        decoder.load_state_dict(weights)
        return decoder.eval()(IDS)
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()(IDS).logits
