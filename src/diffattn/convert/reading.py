"""What a checkpoint says of itself, and whether our decoder computes that: configurations read, tensors checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from diffattn.config_fields import ROPE_TYPES, check_config, shown
from diffattn.convert.layout import EMBEDDING, HEAD, check_shapes, no_model, our_shapes
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.variants import BASELINE

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")

Config = dict[str, Any]
Tensors = dict[str, Tensor]

OURS = DiffTransformerConfig.model_type
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What our decoder does not do, by the key that asks for it, and the values that ask for nothing.
_FOREIGN: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None, {}),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), (None, 0)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv"), (None,)),
    **dict.fromkeys(
        ("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier", "attention_multiplier"),
        (None, 1, 1.0),
    ),
}
# Fields of the same name and meaning on both sides.
SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id", "tie_word_embeddings", "dtype",
)  # fmt: skip


def softmax_config(config: Mapping[str, Any]) -> DiffTransformerConfig:
    """The configuration of our softmax model that computes what a Llama-like one, or one of ours, says.

    Raises:
        UnsupportedError: what our decoder does not do.
        ConfigError: no whole configuration.
    """
    kind = config.get("model_type")
    if kind == OURS:
        ours = our_config(config)
        if ours.attention != BASELINE:
            raise UnsupportedError(f"attention is {ours.attention!r}; wanted a softmax model to start from")
        if ours.switches():
            raise UnsupportedError(f"the model has {ours.switches()}; wanted a plain softmax model to start from")
        return ours
    if kind not in LLAMA_LIKE:
        raise UnsupportedError(
            f"model_type is {kind!r}; wanted one of {', '.join((*LLAMA_LIKE, OURS))}: others compute something else"
        )
    for key, nothing in _FOREIGN.items():
        if key in config and config[key] not in nothing:
            raise UnsupportedError(f"config.json has {key}, which our decoder does not do; wanted a plain {kind} model")
    source = parsed(CONFIG_MAPPING[kind], config)
    _check_window(source)
    rope = rope_of(source)
    check_activation(source)
    bias = True if kind == "qwen2" else getattr(source, "attention_bias", False)
    with naming_the_file():
        return DiffTransformerConfig(
            attention="softmax",
            head_dim=getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads,
            attention_bias=bias,
            attention_output_bias=bias and kind != "qwen2",
            mlp_bias=getattr(source, "mlp_bias", False),
            qk_norm=kind == "qwen3",
            rope_parameters=rope,
            architectures=[DiffTransformerForCausalLM.__name__],
            converted={"from": kind, "same_function": True},
            **shared_fields(source),
        )


@contextlib.contextmanager
def naming_the_file() -> Iterator[None]:
    """Where another's configuration makes one of ours that cannot be, the ConfigError says whose fault it is."""
    try:
        yield
    except ConfigError as error:
        raise no_model(OURS, error) from None


def shared_fields(source: PreTrainedConfig) -> Config:
    """The fields of ``SHARED`` as we have them."""
    fields = {name: getattr(source, name) for name in SHARED}
    # As early Llama checkpoints say that there is none.
    return fields | {"pad_token_id": None if source.pad_token_id == -1 else source.pad_token_id}


def rope_of(source: PreTrainedConfig) -> Config:
    """The rotary positions of a configuration; UnsupportedError for those that our decoder does not have."""
    rope = dict(source.rope_parameters or {})
    if rope.get("rope_type") not in ROPE_TYPES or rope.get("mrope_section"):
        raise UnsupportedError(
            f"rotary positions are {rope.get('rope_type', rope)!r}; wanted one of {', '.join(ROPE_TYPES)}"
        )
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedError(
            f"partial_rotary_factor is {rope['partial_rotary_factor']}; wanted 1: our decoder turns whole heads"
        )
    return rope


def in_both_spellings(config: Config, rope: Mapping[str, Any]) -> Config:
    """A ``config.json`` with its rotary positions under their former names too, for engines of either age."""
    former: Config = {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        former["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return config | former


def _check_window(source: PreTrainedConfig) -> None:
    layers, window = getattr(source, "layer_types", None) or (), getattr(source, "sliding_window", None)
    # Mistral's window is in all layers; one that no sequence outgrows changes nothing.
    outgrown = source.model_type == "mistral" and window is not None and window < source.max_position_embeddings
    if outgrown or any(layer != "full_attention" for layer in layers):
        raise UnsupportedError(
            f"a sliding window of {window} positions is in use, of {source.max_position_embeddings}; wanted layers "
            "that see all positions, because none of ours has a window"
        )


def our_config(config: Mapping[str, Any]) -> DiffTransformerConfig:
    """The configuration of a model of ours; UnsupportedError for another's, ConfigError for a broken one."""
    if config.get("model_type") != OURS:
        raise UnsupportedError(f"model_type is {config.get('model_type')!r}; wanted {OURS}")
    ours: DiffTransformerConfig = parsed(DiffTransformerConfig, config)
    return ours


def check_activation(source: PreTrainedConfig) -> None:
    if not isinstance(source.hidden_act, str) or source.hidden_act not in ACT2FN:
        raise UnsupportedError(f"hidden_act is {shown(source.hidden_act)}; wanted a function that transformers knows")


def parsed(kind: type[PreTrainedConfig], config: Mapping[str, Any]) -> Any:
    """The library's own reading of a ``config.json``: its defaults, and both spellings of rotary positions."""
    try:
        check_config(config)
        # Read from a copy: the library takes the rotary parameters apart.
        read = kind.from_dict({key: dict(value) if isinstance(value, dict) else value for key, value in config.items()})
        if read.dtype is not None and not isinstance(read.dtype, torch.dtype):
            raise TypeError(f"dtype is {read.dtype!r}")
    except ConfigError as error:
        if kind is DiffTransformerConfig:
            raise ConfigError(f"config.json: {error}") from None
        raise no_model(kind.model_type, error) from None
    # A file can hold anything, and each field complains in its own way.
    except Exception as error:
        raise no_model(kind.model_type, error) from error
    return read


def resolve_tie(ours: DiffTransformerConfig, weights: Tensors) -> None:
    """Tied embeddings once, under the embedding's name; two that differ are not tied."""
    if not ours.tie_word_embeddings or HEAD not in weights:
        return
    if EMBEDDING in weights and not torch.equal(weights[HEAD], weights[EMBEDDING]):
        ours.tie_word_embeddings = False
    else:
        weights.setdefault(EMBEDDING, weights[HEAD])
        del weights[HEAD]


def check_tensors(ours: DiffTransformerConfig, weights: Mapping[str, Tensor]) -> None:
    """Raise unless the tensors are those of the configuration by name, shape and kind of number.

    Raises:
        CheckpointError: tensors that are missing, unknown, or of another shape.
        UnsupportedError: integers, or floating-point numbers of 8 bits.
    """
    check_shapes(our_shapes(ours, weights), weights, OURS)
    for name, tensor in weights.items():
        if tensor.dtype not in _FLOATS:
            raise UnsupportedError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}; wanted floating-point weights of at least 16 "
                "bits: convert the model before it is quantised"
            )
