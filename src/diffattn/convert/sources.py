"""The Llama-like architectures of ``transformers``: what each has and Llama has not, and its weights in our layout.

A model is taken only if every field of its configuration is one whose meaning is known here, so that a field which a
later release of the library adds, and a model uses, is refused and not overlooked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import transformers
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from diffattn.config_fields import Config, shown
from diffattn.convert.architectures import reasons
from diffattn.convert.layout import Tensors, interleaved_to_half, split_rows
from diffattn.convert.reading import (
    OURS,
    SHARED,
    check_activation,
    naming_the_file,
    our_config,
    parsed,
    rope_of,
    shared_fields,
)
from diffattn.convert.refused import OWN_CODE
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.layer_kinds import FULL, SLIDING
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.variants import BASELINE


@dataclass(frozen=True)
class Source:
    """The parts of an architecture that differ between the Llama-like ones.

    Attributes:
        attention_bias: the field that says whether W_Q, W_K and W_V have biases, or what all models have.
        output_bias: the same for W_O.
        mlp_bias: the same for the feed-forward network.
        qk_norm: whether each head's queries and keys pass a norm.
        interleaved: whether rotary positions turn channels 2i and 2i + 1, and not i and i + d/2.
        fused: whether W_Q, W_K and W_V are one matrix, and so are the gate and the way up.
        window: the layers that have the sliding window: "none", "all", or those that "layer_types" says.
        unrotated: the field that has a 0 for each layer without rotary positions, if there is one.
        scaled: whether it multiplies embeddings, residuals, scores and logits by constants.
        unused: fields that change nothing in a model that is evaluated, or that others were made of.
    """

    attention_bias: str | bool = "attention_bias"
    output_bias: str | bool = "attention_bias"
    mlp_bias: str | bool = "mlp_bias"
    qk_norm: bool = False
    interleaved: bool = False
    fused: bool = False
    window: str = "none"
    unrotated: str | None = None
    scaled: bool = False
    unused: tuple[str, ...] = ()

    def fields(self) -> set[str]:
        """The fields of the configuration whose meaning is known, beside those of every Llama-like one."""
        found = {name for name in (self.attention_bias, self.output_bias, self.mlp_bias) if isinstance(name, str)}
        found |= {"none": set(), "all": {"sliding_window"}, "layer_types": {"sliding_window", "layer_types"}}[
            self.window
        ]
        found |= {self.unrotated} if self.unrotated else set()
        return found | set(_MULTIPLIERS if self.scaled else ()) | set(self.unused)


_CHOSEN = ("use_sliding_window", "max_window_layers")
LLAMA_LIKE = {
    "llama": Source(),
    "mistral": Source(False, False, False, window="all"),
    "qwen2": Source(True, False, False, window="layer_types", unused=_CHOSEN),
    "qwen3": Source(mlp_bias=False, qk_norm=True, window="layer_types", unused=_CHOSEN),
    "ministral": Source(False, False, False, window="layer_types"),
    "phi3": Source(
        False,
        False,
        False,
        fused=True,
        window="all",
        unused=("resid_pdrop", "embd_pdrop", "original_max_position_embeddings"),
    ),
    "smollm3": Source(
        window="layer_types", unrotated="no_rope_layers", unused=("use_sliding_window", "no_rope_layer_interval")
    ),
    "granite": Source(scaled=True),
    "seed_oss": Source(output_bias="attention_out_bias", unused=("residual_dropout",)),
    "cwm": Source(False, False, window="layer_types"),
    "helium": Source(output_bias=False, interleaved=True),
    "ernie4_5": Source("use_bias", "use_bias", "use_bias", interleaved=True),
    "internlm3": Source(),
    "iquestcoder": Source(),
}
# Fields of every Llama-like configuration: their values become ours, or they are of training alone.
_COMMON = {*SHARED, "head_dim", "rope_parameters", "attention_dropout", "pretraining_tp"} | {
    field.name for field in dataclasses.fields(PreTrainedConfig)
}
_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
# Keys that ask for something that no Llama-like decoder does, with the values that ask for nothing. A file may have
# them whatever its architecture: another program may have computed with them.
_FOREIGN: dict[str, tuple[object, ...]] = {
    "quantization_config": (None, {}),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), (None, 0)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv"), (None,)),
    **dict.fromkeys(("attention_chunk_size", "per_layer_config", "logit_scale"), (None,)),
    **dict.fromkeys(_MULTIPLIERS, (None, 1, 1.0)),
}


def softmax_config(config: Config) -> DiffTransformerConfig:
    """The configuration of our softmax model that computes what a Llama-like configuration, or one of ours, says.

    Raises:
        UnsupportedError: the configuration asks for something that our decoder does not do.
        ConfigError: the configuration is incomplete or cannot be read.
    """
    kind = config.get("model_type")
    if kind == OURS:
        ours = our_config(config)
        if ours.attention != BASELINE:
            raise UnsupportedError(
                f"attention is {ours.attention!r}", "a softmax model to start from", "choose another source"
            )
        if ours.switches():
            raise UnsupportedError(
                f"the model has {ours.switches()}", "a plain softmax model to start from", "choose another source"
            )
        return ours
    if not isinstance(kind, str) or kind not in LLAMA_LIKE:
        raise unknown_architecture(config)
    if kind not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"model_type is {kind!r}, which transformers {transformers.__version__} does not know",
            "a release that knows it",
            "install a newer transformers",
        )
    record = LLAMA_LIKE[kind]
    for key, nothing in _FOREIGN.items():
        known = record.scaled and key in _MULTIPLIERS
        if key in config and config[key] not in nothing and not known:
            raise UnsupportedError(
                f"config.json has {key}, which our decoder does not do",
                f"a plain {kind} model",
                "choose another source",
            )
    source = parsed(CONFIG_MAPPING[kind], config)
    _check_fields(source, record)
    rope = rope_of(source)
    check_activation(source)
    width = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    if record.scaled:
        _check_multipliers(source, width)
    biases = {
        "attention_bias": record.attention_bias,
        "attention_output_bias": record.output_bias,
        "mlp_bias": record.mlp_bias,
    }
    with naming_the_file():
        return DiffTransformerConfig(
            attention="softmax",
            head_dim=width,
            qk_norm=record.qk_norm,
            rope_parameters=rope,
            architectures=[DiffTransformerForCausalLM.__name__],
            converted={"from": kind, "same_function": True},
            **{ours: getattr(source, said) if isinstance(said, str) else said for ours, said in biases.items()},
            **_windows(source, record),
            **shared_fields(source),
        )


def unknown_architecture(config: Config) -> UnsupportedError:
    """Returns the error that says why a ``model_type`` cannot be converted: by its parts, where they are known."""
    kind = config.get("model_type")
    parts = reasons(kind) if isinstance(kind, str) else []
    given = f"model_type is {shown(kind)}"
    if parts:
        *most, last = parts
        return UnsupportedError(
            f"{given}, which has {', '.join(most)}{', and ' if most else ''}{last}",
            f"one of {', '.join(LLAMA_LIKE)}, whose parts our decoder has",
            "choose such a model",
        )
    own = f", with {OWN_CODE}" if config.get("auto_map") else ""
    return UnsupportedError(
        f"{given}{own}",
        f"one of {', '.join((OURS, 'diffllama', *LLAMA_LIKE))}, or a reference model",
        "choose such a model, since no exact conversion of another architecture is known",
    )


def in_our_layout(kind: object, ours: DiffTransformerConfig, tensors: Mapping[str, Tensor]) -> Tensors:
    """Returns the weights of a Llama-like model under our names and in our order of channels, bit for bit.

    Args:
        kind: the ``model_type`` of the source.
        ours: the configuration that :func:`softmax_config` made of the source's.
        tensors: the source's weights by name.
    """
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    record = LLAMA_LIKE.get(kind) if isinstance(kind, str) else None
    if record is None:
        return weights
    width, groups = ours.head_dim, ours.num_key_value_heads
    assert width is not None
    assert groups is not None
    if record.fused:
        query, key = ours.num_attention_heads * width, groups * width
        parts = {
            "self_attn.qkv_proj": {"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": key},
            "mlp.gate_up_proj": dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), ours.intermediate_size),
        }
        for fused, rows in parts.items():
            for name in [name for name in weights if name.endswith(f".{fused}.weight")]:
                split = split_rows(name, weights.pop(name), rows)
                weights |= {name.replace(fused, part): tensor for part, tensor in split.items()}
        # The numbers of an activation function that has some.
        weights = {name.replace(".mlp.activation_fn.", ".mlp.act_fn."): tensor for name, tensor in weights.items()}
    if record.interleaved:
        for name, tensor in weights.items():
            # Rows that are no whole heads are refused when all shapes are compared.
            if (".q_proj." in name or ".k_proj." in name) and tensor.shape[0] % width == 0:
                weights[name] = interleaved_to_half(tensor, width)
    return weights


def _check_fields(source: PreTrainedConfig, record: Source) -> None:
    """Raises for a field of the library's class that is unknown here and that the model has changed."""
    kind = source.model_type
    declared = {field.name: field for field in dataclasses.fields(source)}
    known = _COMMON | record.fields()
    for name, field in declared.items():
        if name not in known and getattr(source, name) != field.default:
            raise UnsupportedError(
                f"config.json has {name}, whose meaning is not known here",
                f"a {kind} model without it",
                "choose another source",
            )
    for name in ("sliding_window", "layer_types"):
        value = getattr(source, name, None)
        # The library's caches read these two of every configuration, its layers only where they are declared.
        if (
            name not in declared
            and value is not None
            and set(value if name == "layer_types" else "-") != {"full_attention"}
        ):
            raise UnsupportedError(
                f"config.json has {name}, which the layers of {kind} do not read", "none", f"remove {name}"
            )


def _check_multipliers(source: PreTrainedConfig, width: int) -> None:
    for name in _MULTIPLIERS:
        plain = width**-0.5 if name == "attention_multiplier" else 1
        if getattr(source, name) != plain:
            raise UnsupportedError(
                f"{name} is {shown(getattr(source, name))}, a constant that our decoder does not multiply by",
                f"{plain}",
                "choose another source",
            )


def _windows(source: PreTrainedConfig, record: Source) -> Config:
    """The fields that say which layers have a sliding window, and which no rotary positions."""
    count, window = source.num_hidden_layers, getattr(source, "sliding_window", None)
    layers = [FULL] * count
    if record.window == "all" and window is not None:
        layers = [SLIDING] * count
    elif record.window == "layer_types":
        layers = list(source.layer_types)
    fields: Config = {}
    if set(layers) != {FULL}:
        fields |= {"sliding_window": window, "layer_types": layers}
    if record.unrotated:
        turned = getattr(source, record.unrotated)
        if len(turned) < count:
            raise ConfigError(
                f"{record.unrotated} of config.json has {len(turned)} numbers", f"{count}, one a layer", "correct it"
            )
        fields["unrotated_layers"] = [layer for layer in range(count) if not turned[layer]] or None
    return fields
