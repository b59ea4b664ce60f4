"""The ``genai_config.json`` with which ``onnxruntime-genai`` runs an exported model."""

from __future__ import annotations

from typing import Any

from diffattn.export.run import MODEL_FILE, PAST, PRESENT
from diffattn.model.modeling import DiffTransformerForCausalLM


def genai_config(model: DiffTransformerForCausalLM, *, shared: bool) -> dict[str, Any]:
    """Returns what ``onnxruntime-genai`` has to know of a graph with a cache: sizes, names, special tokens.

    Its table of architectures has no name of ours. ``llama`` stands for a decoder whose inputs and outputs are these;
    what the layers compute, the graph says.

    Args:
        model: the model that was exported.
        shared: whether the graph writes into the cache that it is given, for which the engine then makes one buffer of
            as many places as a text may have.

    Source: the documentation of onnxruntime-genai; release 0.18 was tried.
    """
    config, generation = model.config, model.generation_config
    special = {
        name: getattr(generation, name, None) if getattr(generation, name, None) is not None else getattr(config, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return {
        "model": {
            "type": "llama",
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            # One that a model does not have is left out.
            **{name: token for name, token in special.items() if token is not None},
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": MODEL_FILE,
                "hidden_size": config.hidden_size,
                "num_hidden_layers": config.num_hidden_layers,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "head_size": config.head_dim,
                "inputs": {
                    **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
                    **{f"past_{kind}_names": f"{PAST}.%d.{kind}" for kind in ("key", "value")},
                },
                "outputs": {
                    "logits": "logits",
                    **{f"present_{kind}_names": f"{PRESENT}.%d.{kind}" for kind in ("key", "value")},
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_position_embeddings,
            "past_present_share_buffer": shared,
        },
    }
