"""The kinds of checkpoint that are planned, by ``model_type``: what each has beside a shape, and what no plan holds.

A kind stands here where its parameters are counted exactly, which a test holds to a built model of each, and where a
layer is the one that ``cost.py`` and ``activations.py`` count: two norms, rotary attention, a feed-forward network of
three matrices. Everything else is refused by its name: a count that is wrong by a third looks like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from diffattn.config_fields import OURS
from diffattn.errors import ConfigError


class ModelType(NamedTuple):
    """The way to read the ``config.json`` of one ``model_type``; the defaults are those of a file that lacks the key.

    ``bias`` of the projections of attention: ``"switch"`` where the file's ``attention_bias`` gives all four of them
    one, ``"qkv"`` where three always have one. ``window``: which layers look back no further than ``sliding_window``:
    all of them, those from ``max_window_layers`` on, those without rotary positions, or all but every n-th (a number).
    """

    architecture: str
    kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    bias: Literal["none", "switch", "qkv"] = "none"
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "all heads"] = "none"
    further_norms: int = 0
    window: Literal["none", "all", "late", "unrotated"] | int = "none"
    window_width: int | None = None


KINDS: dict[str, ModelType] = {
    OURS: ModelType("DiffTransformerForCausalLM", tied=True),
    "llama": ModelType("LlamaForCausalLM", bias="switch", mlp_bias=True),
    "mistral": ModelType("MistralForCausalLM", kv_heads=8, window="all", window_width=4096),
    "qwen2": ModelType("Qwen2ForCausalLM", kv_heads=32, bias="qkv", window="late", window_width=4096),
    "qwen3": ModelType(
        "Qwen3ForCausalLM", kv_heads=32, head_dim=128, bias="switch", qk_norm="head", window="late", window_width=4096
    ),
    "smollm3": ModelType("SmolLM3ForCausalLM", kv_heads=4, tied=True, bias="switch", mlp_bias=True, window="unrotated"),
    "olmo2": ModelType("Olmo2ForCausalLM", bias="switch", qk_norm="all heads"),
    "phi3": ModelType("Phi3ForCausalLM", window="all"),
    "granite": ModelType("GraniteForCausalLM", bias="switch", mlp_bias=True),
    "gemma": ModelType("GemmaForCausalLM", kv_heads=16, head_dim=256, tied=True, bias="switch"),
    "gemma2": ModelType(
        "Gemma2ForCausalLM", kv_heads=4, head_dim=256, tied=True, bias="switch", further_norms=2, window=2,
        window_width=4096,
    ),
    "gemma3_text": ModelType(
        "Gemma3ForCausalLM", kv_heads=4, head_dim=256, tied=True, bias="switch", qk_norm="head", further_norms=2,
        window=6, window_width=4096,
    ),
    "diffllama": ModelType("DiffLlamaForCausalLM", bias="switch"),
}  # fmt: skip

# Words in the name of a key that speak of parts which no layer here has.
_FOREIGN = {
    "expert", "experts", "moe", "router", "mamba", "ssm", "conv", "recurrent", "lora", "latent", "vision", "audio",
    "text", "diff", "differential", "lambda", "nextn", "mtp", "decoder", "cross", "quantization", "compression",
}  # fmt: skip
_KNOWN = {"lambda_std_dev", "is_decoder", "decoder_start_token_id", "cross_attention_hidden_size"}


def kind_of(values: Mapping[str, object], file: str) -> ModelType:
    """Returns the kind of a ``config.json``, once it is known to be one of ``KINDS`` with nothing foreign in it.

    Raises:
        ConfigError: another ``model_type``, code of its own, another class, quantised weights, or a key that speaks of
            parts which a plan does not have; with its name.
    """
    name = values.get("model_type")
    code = values.get("auto_map")
    if not isinstance(name, str) or name not in KINDS:
        said = f"model_type {name!r}" if name is not None else "no model_type"
        own = ", with code of its own (auto_map)" if code else ""
        raise ConfigError(
            f"{file!r} has {said}{own}",
            f"one of {', '.join(KINDS)}",
            "write its numbers as a .toml file, if it is a decoder with one gated feed-forward network per layer",
        )
    if name == OURS:
        return KINDS[name]
    if code:
        raise ConfigError(
            f"{file!r} has model_type {name!r} with code of its own (auto_map), which is never run",
            f"the {name} of transformers",
            "remove auto_map, if it is that",
        )
    classes = values.get("architectures")
    if classes and (not isinstance(classes, list) or KINDS[name].architecture not in classes):
        said = ", ".join(map(str, classes)) if isinstance(classes, list) else repr(classes)
        raise ConfigError(
            f"{file!r} has model_type {name!r} and architectures {said}",
            f"{KINDS[name].architecture}, which can be planned of that type",
            "write its numbers as a .toml file",
        )
    for key, value in values.items():
        if value and key not in _KNOWN and _FOREIGN.intersection(key.casefold().split("_")):
            given = f"{file!r} has model_type {name!r} and {key}"
            if "quantization" in key or "compression" in key:
                raise ConfigError(
                    given,
                    "weights as they were before they were quantised",
                    "plan the model that it was made from, with --weights-dtype int8 or int4",
                )
            raise ConfigError(given, f"a plain {name}, without such parts", "write its numbers as a .toml file")
    return KINDS[name]
