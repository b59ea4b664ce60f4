"""Records what ``convert`` makes of a small random model of every causal architecture of ``transformers``.

Each is saved, converted and loaded again. Its logits, with and without a cache, in float32 and float64, must be those
of the source, and so must the tokens of ``generate``; or the conversion is refused in one line. Nothing in between is
allowed: where a conversion differs, the command ends with status 1. Architectures that are converted are made again
with one thing changed at a time.

    python -m benchmarks.architectures --out benchmarks/results/architectures.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.rows import Writer, provenance
from diffattn.config_fields import dtype_name
from diffattn.convert.convert import convert
from diffattn.convert.sources import LLAMA_LIKE
from diffattn.errors import DiffattnError

GATE = "tests/convert/test_every_architecture.py"
ARCHITECTURES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# Those of which something is made: the Llama-like ones, and the library's own differential Transformer.
CONVERTED = (*LLAMA_LIKE, "diffllama")
EQUAL, REFUSED, DIFFERENT, NO_MODEL = "equal", "refused", "different", "transformers makes no such model"
# What may part sums of the same numbers in another order, in standard deviations of the source's logits; the rows have
# up to 1.1e-5 and 3.1e-6. The library computes norms and angles in float32 whatever the model's dtype.
ROUNDING = {torch.float32: 3e-5, torch.float64: 5e-6}
LENGTH = 29
# Where the first passes over a cache end: a prompt longer than the windows, two tokens, and the rest at once.
ENDS = (11, 12, 13, LENGTH)
SIZES = {"vocab_size": 71, "hidden_size": 48, "intermediate_size": 67, "num_hidden_layers": 3, "num_attention_heads": 6,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 40, "initializer_range": 0.15,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
# What only one architecture has, and a model that is converted needs; then the sizes that are left out where an
# architecture cannot have them.
_OWN = {"granite": {"attention_multiplier": 8**-0.5}}
_FEWER = ((), ("num_key_value_heads",), ("num_key_value_heads", "head_dim"), tuple(SIZES))
# Sizes of the parts that Llama has not, for architectures that would be large otherwise.
_PARTS = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "n_routed_experts": 4,
          "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "n_shared_experts": 1,
          "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
          "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "d_model": 48, "ffn_dim": 67, "d_ff": 67,
          "encoder_layers": 1, "encoder_ffn_dim": 67, "decoder_layers": 3, "decoder_ffn_dim": 67,
          "decoder_attention_heads": 6, "mamba_n_heads": 12, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_conv": 4,
          "linear_num_value_heads": 6, "linear_num_key_heads": 3, "linear_key_head_dim": 8,
          "linear_value_head_dim": 8}  # fmt: skip
_MOST_PARAMETERS = 6_000_000
_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 12, "rope_theta": 500.0}  # fmt: skip
_LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.0, 3.0],
         "original_max_position_embeddings": 16, "rope_theta": 300.0}  # fmt: skip
VARIED: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "relu2": {"hidden_act": "relu2"},
    "an activation with parameters": {"hidden_act": "xielu"},
    "biases of attention": {"attention_bias": True},
    "no biases of attention": {"attention_bias": False},
    "a bias of W_O": {"attention_out_bias": True},
    "biases of queries": {"qkv_bias": True, "bias": True},
    "biases of the feed-forward network": {"mlp_bias": True},
    "biases everywhere": {"use_bias": True, "attention_bias": True, "mlp_bias": True},
    "a large epsilon": {"rms_norm_eps": 0.3},
    "one key/value head": {"num_key_value_heads": 1},
    "a key/value head each": {"num_key_value_heads": 6},
    "wider heads": {"head_dim": 12},
    "a base": {"rope_parameters": {"rope_type": "default", "rope_theta": 30.0}},
    "half of each head turned": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "half of each head turned, the old spelling": {"partial_rotary_factor": 0.5},
    "linear positions": {"rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    "dynamic positions": {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 16},
    "yarn positions": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 300.0,
                                           "original_max_position_embeddings": 6}},
    "llama3 positions": {"rope_parameters": _LLAMA3},
    "longrope positions": {"rope_parameters": _LONG, "original_max_position_embeddings": 16},
    "proportional positions": {"rope_parameters": {"rope_type": "proportional", "rope_theta": 300.0}},
    "scales of queries": {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.5,
                                              "original_max_position_embeddings": 6}},
    "a window": {"sliding_window": 5},
    "a window in use": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    "a window in some layers": {"sliding_window": 5, "use_sliding_window": True, "layer_types": _LAYERS},
    "types of layers and no window": {"sliding_window": None, "layer_types": _LAYERS},
    "a window beyond": {"sliding_window": 100, "use_sliding_window": True},
    "chunks": {"attention_chunk_size": 5, "layer_types": ["chunked_attention"] * 3},
    "layers without positions": {"no_rope_layers": [1, 0, 1]},
    "each second layer without positions": {"no_rope_layer_interval": 2},
    "windows without positions": {"no_rope_layer_interval": 2, "sliding_window": 5, "use_sliding_window": True},
    "scores times a constant": {"attention_multiplier": 0.7},
    "embeddings times a constant": {"embedding_multiplier": 2.0},
    "residuals times a constant": {"residual_multiplier": 0.5},
    "logits divided": {"logits_scaling": 4.0},
    "capped scores": {"attn_logit_softcapping": 2.0},
    "capped logits": {"final_logit_softcapping": 2.0},
    "clipped projections": {"clip_qkv": 0.1},
    "experts": {"num_experts": 4, "num_local_experts": 4},
    "dropout": {"attention_dropout": 0.3, "residual_dropout": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
    "several parts": {"pretraining_tp": 2},
}  # fmt: skip


def small_model(kind: str, changes: Mapping[str, Any]) -> PreTrainedModel | None:
    """Returns a random model of an architecture, or None where it cannot be made small by the names of its sizes."""
    tries = product(({}, _PARTS), _FEWER) if not changes else [({}, ())]
    for parts, left_out in tries:
        sizes = {name: size for name, size in SIZES.items() if name not in left_out}
        sizes |= {**_OWN.get(kind, {}), **parts, **changes}
        torch.manual_seed(0)
        # Each architecture has errors of its own for sizes that it cannot have.
        try:
            config = CONFIG_MAPPING[kind](**sizes)
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
            if count > _MOST_PARAMETERS:
                continue
            # On the meta device the library changes some configurations.
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes))
        except Exception:
            continue
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name and name.endswith("weight"):
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.3)
        return model.eval()
    return None


@torch.no_grad()
def all_logits(model: PreTrainedModel) -> Iterator[Tensor]:
    """Yields the logits of a text as a whole and over a cache, in float32 and in float64."""
    ids = torch.randint(3, SIZES["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        yield model(ids, use_cache=False).logits
        cache, begin = None, 0
        for end in ENDS:
            out = model(ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache, begin = out.past_key_values, end
            yield out.logits


def continuation(model: PreTrainedModel) -> Tensor:
    """The tokens that ``generate`` chooses behind a text."""
    model.float()
    ids = torch.randint(3, SIZES["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(2))
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False)


def outcome(kind: str, changes: Mapping[str, Any] | None = None, to: str | None = None) -> dict[str, Any]:
    """Converts a small model of an architecture; says whether it is equal, refused, or silently different.

    Args:
        kind: its ``model_type``.
        changes: fields of its configuration beside the sizes.
        to: the target of the conversion. Default: the obvious one.

    Returns:
        ``outcome``, the ``reason`` of a refusal or the largest ``difference`` of logits for each dtype in standard
        deviations, and ``built``: whether the model had weights. One that cannot be made small is refused by its
        configuration alone.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source, made = Path(folder) / "source", Path(folder) / "made"
        model = small_model(kind, changes or {})
        if model is None:
            if changes or kind in CONVERTED:
                return {"outcome": NO_MODEL, "built": False}
            source.mkdir()
            (source / "config.json").write_text(json.dumps({"model_type": kind}))
            save_file({"model.embed_tokens.weight": torch.ones(2, 2)}, source / "model.safetensors")
        else:
            try:
                model.save_pretrained(source)
            # The library checks some fields only when it saves them.
            except (ValueError, NotImplementedError):
                return {"outcome": NO_MODEL, "built": False}
        row: dict[str, Any] = {"built": model is not None}
        try:
            done = convert(source, made, to)
        except DiffattnError as error:
            one = "\n" not in str(error)
            return row | {"outcome": REFUSED if one else "refused in several lines", "reason": str(error)}
        ours, found = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
        assert not any(found.values()), found
        # From its folder, too: a configuration may not say what the model in memory is.
        theirs = AutoModelForCausalLM.from_pretrained(source)
        pairs = zip(all_logits(ours.eval()), all_logits(theirs.eval()), strict=True)
        largest = dict.fromkeys(ROUNDING, 0.0)
        for one, other in pairs:
            largest[one.dtype] = max(largest[one.dtype], float((one - other).abs().max() / other.std()))
        equal = done.same_function and all(largest[dtype] <= bound for dtype, bound in ROUNDING.items())
        equal &= torch.equal(continuation(ours), continuation(theirs))
        differences = {dtype_name(dtype): float(f"{value:.2g}") for dtype, value in largest.items()}
        return row | {"outcome": EQUAL if equal else DIFFERENT, "difference": differences}


def row_of(kind: str) -> dict[str, Any]:
    """The outcome of an architecture and, where it is converted, that of each thing changed in it."""
    row = {"model_type": kind, **outcome(kind)}
    if kind in LLAMA_LIKE:
        row["varied"] = {}
        for name, changes in VARIED.items():
            found = outcome(kind, changes)
            row["varied"][name] = found.get("reason", found["outcome"]) if found["outcome"] != DIFFERENT else DIFFERENT
    return row


def main() -> int:
    """Writes a row for each architecture; returns 1 if any conversion is silently different."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of JSON lines that the rows are written to")
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, metavar="MODEL_TYPE")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    write, wrong = Writer(given.out), False
    for kind in given.only:
        row = row_of(kind)
        found = {row["outcome"], *row.get("varied", {}).values()}
        wrong |= DIFFERENT in found or "refused in several lines" in found
        write({**row, "gate": GATE, **provenance("benchmarks.architectures")})
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
