"""The conversions between models built on the authors' attention modules (``microsoft/unilm``), V1 and V2, and ours.

The authors publish the attention modules and no decoder. So we define the format of the folder: a decoder as
``docs/convert.md`` describes it, with tensors named as in our checkpoints, and in ``self_attn`` the authors' module
with its own names. Their heads are in our order. Within a head, their rotary positions turn the channels 2i and 2i + 1
together, ours i and i + d/2: so the rows of W_Q and W_K change their order within each head, and nothing else changes.

================= ============================== ===========================
                  V1                             V2
================= ============================== ===========================
``num_heads``     output heads, n/2              output heads, n
``num_kv_heads``  key/value heads of width 2d    key/value heads of width d
``head_dim``      d = embed_dim / num_heads / 2  d, given
================= ============================== ===========================

``form`` names the V1 file that computes the function. ``multihead_flashdiff_1.py`` (``"flash"``) and
``multihead_flashdiff_2.py`` (``"flash_2"``) compute one function, which is ours. ``multihead_diffattn.py``
(``"eager"``) repeats keys for the query heads first and pairs them after: with num_kv_heads < num_heads its first map
is softmax(q_2i k_(2i // r)), another function of the same tensors, which is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from diffattn.config_fields import Config, shown
from diffattn.convert.layout import (
    LAMBDAS,
    Tensors,
    check_shapes,
    float32_exactly,
    half_to_interleaved,
    interleaved_to_half,
    our_shapes,
)
from diffattn.convert.reading import OURS, check_layers_alike, check_tensors, our_config, resolve_tie
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.plan.shape import check_positive_int

REFERENCE = "diff_transformer_reference"
FORMS = ("flash", "flash_2", "eager")
# The authors' two modules, and our variants that compute what they do.
_ATTENTIONS = {1: "diff_v1", 2: "diff_v2"}
_REQUIRED = ("version", "vocab_size", "embed_dim", "intermediate_size", "num_hidden_layers", "num_heads")
# Fields of one name and meaning in both configurations, with the same defaults.
_SHARED = (
    "vocab_size", "intermediate_size", "num_hidden_layers", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters",
    "dtype",
)  # fmt: skip
_V1_ONLY = ("form", "decoder_kv_attention_heads", "lambda_std", "subln_eps")
_KNOWN = ("model_type", *_REQUIRED, "num_kv_heads", "head_dim", "rope_theta", *_SHARED)


def from_reference(config: Config, tensors: Mapping[str, Tensor]) -> tuple[Config, Tensors]:
    """Returns a checkpoint of the authors' modules as our V1 or V2 model: the same function, every weight bit for bit.

    Args:
        config: ``model_type`` ``"diff_transformer_reference"`` and the fields of ``docs/convert.md``.
        tensors: the weights under our names, except V1's ``self_attn.lambda_q1`` (and the other three λ vectors) and
            ``self_attn.out_proj.weight``. V1's ``self_attn.subln.weight`` is in all layers or in none; modules from
            before October 2024 have none.

    Returns:
        The configuration of :class:`DiffTransformerForCausalLM` and its tensors; V1's λ vectors as float32.

    Raises:
        UnsupportedError: the eager form with grouped heads, integer weights, or λ that float32 cannot hold.
        ConfigError: a field that is missing, unknown or impossible, or has a name that is unknown here (rotary
            positions, an activation function).
        CheckpointError: tensors are missing, unknown, or of another shape.
    """
    if config.get("model_type") != REFERENCE:
        raise UnsupportedError(
            f"model_type is {config.get('model_type')!r}", REFERENCE, "write that into config.json, or choose another"
        )
    _check_fields(config)
    v1 = config["version"] == 1
    heads, groups, width = _heads(config)
    if v1 and config["form"] == "eager" and groups < heads:
        raise UnsupportedError(
            f"form is 'eager' with {groups} key/value heads for {heads} heads; multihead_diffattn.py then repeats keys "
            "before it pairs them, which our model does not compute",
            "form 'flash', or as many key/value heads as heads",
            "write form 'flash' if the model was trained with multihead_flashdiff_1.py",
        )
    shared = (*_SHARED, "rope_theta", "lambda_std", "subln_eps")
    fields: Config = {name: config[name] for name in shared if config.get(name) is not None}
    if v1:
        fields["subln_affine"] = any(name.endswith("subln.weight") for name in tensors)
    fields |= {
        "model_type": OURS,
        "attention": _ATTENTIONS[config["version"]],
        "hidden_size": config["embed_dim"],
        "num_attention_heads": 2 * heads,
        "num_key_value_heads": groups,
        "head_dim": 2 * width if v1 else width,
        "architectures": [DiffTransformerForCausalLM.__name__],
        "converted": {"from": REFERENCE, "same_function": True},
    }
    ours = our_config(fields)
    weights = dict(tensors)
    resolve_tie(ours, weights)
    names = _their_names(ours)
    shapes = our_shapes(ours, weights)
    check_shapes({names.get(name, name): shape for name, shape in shapes.items()}, weights, "reference")
    weights = {name: weights[names.get(name, name)] for name in shapes}
    for name in _rotated(ours):
        weights[name] = interleaved_to_half(weights[name], width)
    for name in weights.keys() & names.keys():
        if name.endswith(LAMBDAS):
            weights[name] = float32_exactly(names[name], weights[name])
    check_tensors(ours, weights)
    return ours.to_diff_dict(), weights


def to_reference(config: Config, tensors: Mapping[str, Tensor]) -> tuple[Config, Tensors]:
    """Returns our V1 or V2 model with the authors' modules, in the form ``"flash"``; undoes :func:`from_reference`.

    Raises:
        UnsupportedError: what the modules cannot express: another variant, biases, norms of queries and keys, a
            constant λ_init, or V1 heads that do not fill the hidden size.
        ConfigError, CheckpointError: the same as :func:`from_reference`.
    """
    ours = our_config(config)
    _check_expressible(ours)
    weights = dict(tensors)
    resolve_tie(ours, weights)
    check_tensors(ours, weights)
    for name in _rotated(ours):
        weights[name] = half_to_interleaved(weights[name], ours.rope_width)
    names = _their_names(ours)
    weights = {names.get(name, name): tensor for name, tensor in weights.items()}
    known = ours.to_dict()
    v1 = ours.attention == _ATTENTIONS[1]
    made: Config = {"model_type": REFERENCE, "version": 1 if v1 else 2}
    if v1:
        made |= {"form": "flash", "lambda_std": ours.lambda_std, "subln_eps": ours.subln_eps}
    else:
        made["head_dim"] = ours.head_dim
    made |= {
        "embed_dim": ours.hidden_size,
        "num_heads": ours.num_attention_heads // 2,
        "num_kv_heads": ours.num_key_value_heads,
    }
    return made | {name: known[name] for name in _SHARED if known.get(name) is not None}, weights


def version_of(config: Config) -> int:
    """The version of the authors' modules in a reference model, 1 or 2; raises ConfigError for anything else."""
    version = config.get("version")
    if isinstance(version, bool) or version not in (1, 2):
        raise ConfigError(
            f"version is {version!r}", "1 or 2, the version of the authors' modules", "correct config.json"
        )
    return int(version)


def _check_fields(config: Config) -> None:
    if missing := [name for name in _REQUIRED if name not in config]:
        raise ConfigError(f"config.json lacks {missing[0]}", f"all of {', '.join(_REQUIRED)}", f"add {missing[0]}")
    version = version_of(config)
    known = (*_KNOWN, *_V1_ONLY) if version == 1 else _KNOWN
    if unknown := sorted(config.keys() - set(known)):
        raise ConfigError(
            f"config.json has {unknown[0]}, which no reference model of version {version} has",
            f"only fields among {', '.join(known)}",
            f"leave {unknown[0]} out",
        )
    if version == 1 and config.get("form") not in FORMS:
        raise ConfigError(
            f"form is {config.get('form')!r}",
            f"one of {', '.join(FORMS)}",
            "name the form of the authors' file that computes the model",
        )
    if config.get("rope_theta") is not None and config.get("rope_parameters") is not None:
        raise ConfigError("config.json has rope_theta and rope_parameters", "one of them", "leave one of them out")
    for name in ("vocab_size", "embed_dim", "intermediate_size", "num_hidden_layers", "num_heads"):
        check_positive_int(name, config[name])


def _heads(config: Config) -> tuple[int, int, int]:
    """Returns the numbers of output heads and of key/value heads, and the width d of a head."""
    heads, embed = config["num_heads"], config["embed_dim"]
    given = [name for name in ("num_kv_heads", "decoder_kv_attention_heads") if config.get(name) is not None]
    if len(given) > 1:
        raise ConfigError(
            f"config.json has {' and '.join(given)}, which mean the same", "one of them", "leave one of them out"
        )
    groups = config[given[0]] if given else heads
    check_positive_int("num_kv_heads", groups)
    if heads % groups:
        raise ConfigError(
            f"num_heads is {heads}, num_kv_heads {groups}", f"a divisor of {heads}", "correct config.json"
        )
    width = config.get("head_dim")
    if config["version"] == 2:
        if width is None:
            raise ConfigError("config.json lacks head_dim", "the width of a head, for the V2 module", "add head_dim")
        check_positive_int("head_dim", width)
        return heads, groups, width
    if embed % (2 * heads):
        raise ConfigError(
            f"embed_dim is {embed}, num_heads {heads}",
            f"a multiple of {2 * heads}, since the V1 module cuts embed_dim into 2 · num_heads heads",
            "correct config.json",
        )
    if width not in (None, embed // heads // 2):
        raise ConfigError(
            f"head_dim is {width!r}",
            f"embed_dim / num_heads / 2 = {embed // heads // 2}, as the V1 module computes it",
            "leave head_dim out",
        )
    return heads, groups, embed // heads // 2


def _check_expressible(ours: DiffTransformerConfig) -> None:
    check_layers_alike(ours, "a reference model")
    v1 = ours.attention == _ATTENTIONS[1]
    filled = ours.num_attention_heads * ours.rope_width
    for expressible, given, wanted in (
        (ours.attention in _ATTENTIONS.values(), f"attention is {ours.attention!r}", "diff_v1 or diff_v2"),
        (not (ours.attention_bias or ours.attention_output_bias or ours.mlp_bias), "the model has biases", "no biases"),
        (not ours.qk_norm, "qk_norm is True", "no norm of queries and keys"),
        (not ours.switches(), f"the model has {ours.switches()}", "the variant as published"),
        (not v1 or ours.lambda_init is None, f"lambda_init is {shown(ours.lambda_init)}", "the schedule by depth"),
        (
            not v1 or filled == ours.hidden_size,
            f"{ours.num_attention_heads} heads of {ours.rope_width} are {filled} channels, hidden_size is "
            f"{ours.hidden_size}",
            "heads that fill the hidden size",
        ),
    ):
        if not expressible:
            raise UnsupportedError(
                given, f"{wanted}, as the authors' modules are built", "keep the model as diff_transformer"
            )


def _their_names(ours: DiffTransformerConfig) -> dict[str, str]:
    """The authors' name of each tensor that has another name in our checkpoints."""
    if ours.attention == _ATTENTIONS[2]:
        return {}
    names = {}
    for layer in range(ours.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        names[f"{prefix}o_proj.weight"] = f"{prefix}out_proj.weight"
        names |= {f"{prefix}lam.{name}": f"{prefix}{name}" for name in LAMBDAS}
    return names


def _rotated(ours: DiffTransformerConfig) -> list[str]:
    layers = range(ours.num_hidden_layers)
    return [f"model.layers.{layer}.self_attn.{name}.weight" for layer in layers for name in ("q_proj", "k_proj")]
