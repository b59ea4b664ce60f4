"""Reads what a checkpoint's configuration says, and checks that our decoder computes exactly that."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from diffattn.config_fields import ROPE_TYPES, Config, check_config, dtype_name, shown
from diffattn.convert.layout import EMBEDDING, HEAD, Tensors, check_shapes, no_model, our_shapes
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.model.configuration import DiffTransformerConfig

OURS = DiffTransformerConfig.model_type
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Fields of the same name and meaning on both sides.
SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id", "tie_word_embeddings", "dtype",
)  # fmt: skip

# Fields of ours that each conversion back reads or refuses by itself, and those of every configuration.
_COMPARED = {
    *SHARED, "attention", "head_dim", "rope_parameters", "attention_bias", "attention_output_bias", "mlp_bias",
    "qk_norm", "lambda_init", "lambda_std", "subln_affine", "subln_eps", "head_norm", "lambda_form",
    "pairs_share_group", "dex_heads", "num_noise_heads",
    # It follows from the window.
    "layer_types",
    *(field.name for field in dataclasses.fields(PreTrainedConfig)),
}  # fmt: skip


@contextlib.contextmanager
def naming_the_file() -> Iterator[None]:
    """Names the source's ``config.json`` in a ConfigError about the configuration that was made from it."""
    try:
        yield
    except ConfigError as error:
        raise no_model(OURS, error) from None


def shared_fields(source: PreTrainedConfig) -> Config:
    """The fields of ``SHARED``, read from another library's configuration."""
    fields = {name: getattr(source, name) for name in SHARED}
    # Early Llama checkpoints write -1 where there is no padding token.
    return fields | {"pad_token_id": None if source.pad_token_id == -1 else source.pad_token_id}


def rope_of(source: PreTrainedConfig) -> Config:
    """The rotary positions of a configuration; raises UnsupportedError for those that our decoder does not have."""
    rope = dict(source.rope_parameters or {})
    if rope.get("rope_type") not in ROPE_TYPES or rope.get("mrope_section"):
        raise UnsupportedError(
            f"rotary positions are {rope.get('rope_type', rope)!r}",
            f"one of {', '.join(ROPE_TYPES)}",
            "choose another source",
        )
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedError(
            f"partial_rotary_factor is {rope['partial_rotary_factor']}",
            "1, since our decoder turns whole heads",
            "choose another source",
        )
    return rope


def in_both_spellings(config: Config, rope: Config) -> Config:
    """Returns a ``config.json`` with its rotary positions also under their former names, for older engines."""
    former: Config = {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        former["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return config | former


def our_config(config: Config) -> DiffTransformerConfig:
    """The configuration of a model of ours; raises UnsupportedError for another's, ConfigError for a broken one."""
    if config.get("model_type") != OURS:
        raise UnsupportedError(f"model_type is {config.get('model_type')!r}", OURS, "choose a model of diffattn's")
    ours: DiffTransformerConfig = parsed(DiffTransformerConfig, config)
    return ours


def check_layers_alike(ours: DiffTransformerConfig, kind: str, has: Collection[str] = ()) -> None:
    """Raises for a field of ours that another program's models have not; a field of a later release is one.

    Args:
        ours: the model's configuration.
        kind: what the model should become.
        has: fields that it has.

    Raises:
        UnsupportedError: such as a sliding window, layers without rotary positions, or an encoder.
    """
    for field in dataclasses.fields(ours):
        value = getattr(ours, field.name)
        if field.name not in _COMPARED and field.name not in has and value != field.default:
            raise UnsupportedError(
                f"{field.name} is {shown(value)}",
                f"{shown(field.default)}, since {kind} has no such thing",
                "keep the model as diff_transformer",
            )
    if ours.hidden_act not in ACT2FN and "hidden_act" not in has:
        raise UnsupportedError(
            f"hidden_act is {shown(ours.hidden_act)}",
            "a function that transformers knows",
            "keep the model as diff_transformer",
        )


def check_activation(source: PreTrainedConfig) -> None:
    """Raises unless ``transformers`` knows the activation function."""
    if not isinstance(source.hidden_act, str) or source.hidden_act not in ACT2FN:
        raise UnsupportedError(
            f"hidden_act is {shown(source.hidden_act)}", "a function that transformers knows", "correct config.json"
        )


def parsed(kind: type[PreTrainedConfig], config: Config) -> Any:
    """Returns a ``config.json`` as the library reads it: with its defaults, and with both spellings of RoPE."""
    try:
        check_config(config)
        # The library changes the rotary parameters, so it gets a copy.
        read = kind.from_dict({key: dict(value) if isinstance(value, dict) else value for key, value in config.items()})
        if read.dtype is not None and not isinstance(read.dtype, torch.dtype):
            raise ConfigError(f"dtype is {read.dtype!r}", "the name of a number format of torch's", "correct it")
    except ConfigError as error:
        raise (error.at("config.json") if kind is DiffTransformerConfig else no_model(kind.model_type, error)) from None
    # A file can hold anything, and the library raises a different exception for each field.
    except Exception as error:
        raise no_model(kind.model_type, error) from error
    return read


def resolve_tie(ours: DiffTransformerConfig, weights: Tensors) -> None:
    """Keeps tied embeddings once, under the embedding's name; two that differ are not tied."""
    if not ours.tie_word_embeddings or HEAD not in weights:
        return
    if EMBEDDING in weights and not torch.equal(weights[HEAD], weights[EMBEDDING]):
        ours.tie_word_embeddings = False
    else:
        weights.setdefault(EMBEDDING, weights[HEAD])
        del weights[HEAD]


def check_tensors(ours: DiffTransformerConfig, weights: Mapping[str, Tensor]) -> None:
    """Raises unless the tensors are those of the configuration by name, shape and kind of number.

    Raises:
        CheckpointError: tensors that are missing, unknown, or of another shape.
        UnsupportedError: integers, or floating-point numbers of 8 bits.
    """
    check_shapes(our_shapes(ours, weights), weights, OURS)
    for name, tensor in weights.items():
        if tensor.dtype not in _FLOATS:
            raise UnsupportedError(
                f"{name} is {dtype_name(tensor.dtype)}",
                "floating-point weights of at least 16 bits",
                "convert the model before it is quantised",
            )
