"""The conversions between Motif's published checkpoints and ours: Motif-2.6B is V1, Motif-2-12.7B is GDA.

Both have our order of heads, so every tensor keeps its rows. With n query heads and G key/value heads of width d:

=========== ========================== ==================================================
            Motif-2.6B (V1)            Motif-2-12.7B (GDA)
=========== ========================== ==================================================
queries     pairs [signal, noise]      groups [signal … signal, noise], one for each noise head
keys        pairs [k1, k2]             pairs [k1, k2]
values      pairs, joined to 2d        pairs, joined to 2d
λ_init      one layer behind ours, so that layer 0 has −0.0099 and layer 1 has 0.2
activation  PolyNorm, with 3 + 1 numbers in each layer
=========== ========================== ==================================================

The published folders bring code of their own, which is never run: what is here follows the layout alone. Source: vLLM
0.10.2, ``models/motif.py`` (Motif-2.6B); arXiv 2510.06949 and the model's tensors (Motif-2-12.7B).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffattn.config_fields import POLY_NORM, Config, check_config, dtype_name, shown
from diffattn.convert.layout import (
    EMBEDDING,
    HEAD,
    LAMBDAS,
    Tensors,
    check_shapes,
    float32_exactly,
    our_shapes,
    same_values,
)
from diffattn.convert.reading import (
    check_layers_alike,
    check_tensors,
    in_both_spellings,
    naming_the_file,
    our_config,
    resolve_tie,
)
from diffattn.convert.refused import MOTIF
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.model.configuration import DiffTransformerConfig, lambda_init_schedule
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.plan.shape import check_positive_int

FORMS = {"diff_v1": "motif V1", "diff_gda": "motif GDA"}
"""Our variants that compute what Motif's do, with the names of Motif's two layouts."""
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "max_position_embeddings")  # fmt: skip
# ε and sizes for which the published file always has a value, so that none has to be guessed.
_REQUIRED = (*_SIZES, "rms_norm_eps", "attn_rms_norm_eps", "hidden_act")
# Fields of one name and meaning in both configurations.
_SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
           "hidden_act", "max_position_embeddings", "initializer_range", "use_cache", "pad_token_id", "bos_token_id",
           "eos_token_id")  # fmt: skip
_OWN = ("num_key_value_heads", "attn_rms_norm_eps", "num_noise_heads", "k_ratio", "head_dim", "use_bias", "qkv_bias",
        "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "dtype", "torch_dtype")  # fmt: skip
# Fields without bearing on the function: of training, of other programs, or read only with a switch that is off.
_WITHOUT_EFFECT = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path",
                   "attention_dropout", "hidden_dropout", "sliding_window", "max_window_layers", "fused_rope",
                   "attn_implementation", "_attn_implementation_autoset", "id2label", "label2id", "num_labels",
                   "problem_type", "expanded")  # fmt: skip
# The values of a field that is unknown here by which it asks for nothing: off, or a factor of one.
_NOTHING: tuple[object, ...] = (None, False, 0, 1, "", [], {})


def form_of(config: Config) -> str:
    """The layout of a Motif checkpoint, a value of ``FORMS``: GDA is said by ``num_noise_heads``.

    >>> form_of({"num_noise_heads": 8}), form_of({"num_noise_heads": None})
    ('motif GDA', 'motif V1')
    """
    return FORMS["diff_v1" if config.get("num_noise_heads") is None else "diff_gda"]


def motif_lambda_init(layers: int) -> list[float]:
    """λ_init of each layer, 0.8 − 0.6·exp(−0.3·(l − 1)) for l from 0: our schedule, one layer behind.

    >>> [round(number, 4) for number in motif_lambda_init(3)]
    [-0.0099, 0.2, 0.3555]
    """
    return [lambda_init_schedule(layer - 1) for layer in range(layers)]


def from_motif(config: Config, tensors: Mapping[str, Tensor]) -> tuple[Config, Tensors]:
    """Returns a Motif checkpoint as our V1 or GDA model: the same function, every weight bit for bit in its place.

    Args:
        config: the ``config.json`` of Motif-2.6B or Motif-2-12.7B, or of a model with these fields. A field that is
            unknown here and asks for something is refused, since its own code might obey it.
        tensors: the weights by their published names, such as ``model.layers.0.self_attn.lambda_q1``.

    Returns:
        The configuration of :class:`DiffTransformerForCausalLM` and its tensors; λ as float32.

    Raises:
        UnsupportedError: another activation, ratio of keys, sliding windows, or an unknown field that asks for
            something.
        ConfigError: fields that are missing, impossible, or contradict each other.
        CheckpointError: tensors are missing, unknown, or of another shape.
    """
    _check_fields(config)
    width = _head_width(config)
    grouped = config.get("num_noise_heads") is not None
    qkv, others = _biases(config)
    # Where the file says nothing, the output head is there or not.
    tied = config.get("tie_word_embeddings")
    fields: dict[str, Any] = {name: config[name] for name in _SHARED if config.get(name) is not None}
    fields |= {
        "attention": "diff_gda" if grouped else "diff_v1",
        "num_key_value_heads": config["num_key_value_heads"] // 2,
        "head_dim": 2 * width,
        "attention_bias": qkv,
        "attention_output_bias": others,
        "mlp_bias": others,
        "subln_affine": True,
        "subln_eps": config["attn_rms_norm_eps"],
        "lambda_init": motif_lambda_init(config["num_hidden_layers"]),
        "tie_word_embeddings": HEAD not in tensors if tied is None else tied,
        "rope_parameters": _rope(config),
        "architectures": [DiffTransformerForCausalLM.__name__],
        "converted": {"from": config["model_type"], "same_function": True},
    }
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype is not None:
        fields["dtype"] = dtype
    if grouped:
        fields["num_noise_heads"] = config["num_noise_heads"]
    with naming_the_file():
        ours = DiffTransformerConfig(**fields)
    weights = dict(tensors)
    resolve_tie(ours, weights)
    names = _their_names(ours)
    shapes = our_shapes(ours, weights)
    check_shapes({names.get(name, name): shape for name, shape in shapes.items()}, weights, MOTIF[0])
    weights = {name: weights[names.get(name, name)] for name in shapes}
    for name in names:
        weights[name] = float32_exactly(names[name], weights[name])
    check_tensors(ours, weights)
    return ours.to_diff_dict(), weights


def to_motif(config: Config, tensors: Mapping[str, Tensor]) -> tuple[Config, Tensors]:
    """Returns our V1 or GDA model in Motif's published layout, names and fields; undoes :func:`from_motif`.

    λ is written in the dtype of the model where that rounds nothing, as Motif's own is, and otherwise in float32.

    Raises:
        UnsupportedError: what Motif cannot say: another variant, λ_init other than Motif's, another activation than
            PolyNorm, no gain in the norm of the heads, norms of queries and keys, windows, or V1 heads that do not fill
            the hidden size.
        ConfigError, CheckpointError: the same as :func:`from_motif`.
    """
    ours = our_config(config)
    _check_expressible(ours)
    weights = dict(tensors)
    resolve_tie(ours, weights)
    check_tensors(ours, weights)
    names = _their_names(ours)
    dtype = weights[EMBEDDING].dtype
    if all(same_values(weights[name].to(dtype).float(), weights[name]) for name in names):
        weights |= {name: weights[name].to(dtype) for name in names}
    weights = {names.get(name, name): tensor for name, tensor in weights.items()}
    known = ours.to_dict()
    assert ours.num_key_value_heads is not None
    made: Config = {"model_type": MOTIF[0], "architectures": ["MotifForCausalLM"]}
    made |= {name: known[name] for name in _SHARED if known.get(name) is not None}
    made |= {
        "num_key_value_heads": 2 * ours.num_key_value_heads,
        "head_dim": ours.rope_width,
        "attn_rms_norm_eps": ours.subln_eps,
        "use_bias": ours.mlp_bias,
        "tie_word_embeddings": ours.tie_word_embeddings,
        # Engines of the time of these models know this name alone.
        "torch_dtype": dtype_name(dtype),
    }
    if ours.attention_bias != ours.mlp_bias:
        made["qkv_bias"] = ours.attention_bias
    if ours.record.shares_noise:
        made |= {"num_noise_heads": ours.num_noise_heads, "k_ratio": 1}
    return in_both_spellings(made, dict(ours.rope_parameters or {})), weights


def _check_fields(config: Config) -> None:
    if missing := [name for name in _REQUIRED if config.get(name) is None]:
        raise ConfigError(f"config.json lacks {missing[0]}", f"all of {', '.join(_REQUIRED)}", f"add {missing[0]}")
    with naming_the_file():
        check_config(config)
    for name in _SIZES:
        check_positive_int(name, config[name])
    for name in ("use_bias", "qkv_bias", "tie_word_embeddings", "use_sliding_window"):
        if config.get(name) not in (None, True, False):
            raise ConfigError(f"{name} is {shown(config[name])}", "true or false", "correct config.json")
    for name, wanted in (("hidden_act", POLY_NORM), ("k_ratio", 1), ("use_sliding_window", False)):
        if config.get(name, wanted) not in (None, wanted):
            raise UnsupportedError(
                f"{name} is {shown(config[name])}",
                f"{wanted!r}, as every published Motif 2 has it",
                "choose another source",
            )
    known = {*_SHARED, *_OWN, *_WITHOUT_EFFECT}
    for name, value in config.items():
        # True equals 1, and asks for something.
        if name not in known and (value is True or value not in _NOTHING):
            raise UnsupportedError(
                f"config.json has {name} {shown(value)}, which is unknown here",
                "the fields of Motif-2.6B or Motif-2-12.7B",
                f"remove {name}, if the model computes the same without it",
            )


def _head_width(config: Config) -> int:
    """Returns d, once the numbers of heads are known to agree with each other."""
    heads, keys, hidden = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    noise = config.get("num_noise_heads")
    if noise is not None:
        check_positive_int("num_noise_heads", noise)
    signals = heads - (heads // 2 if noise is None else noise)
    pairs = heads // 2 if noise is None else noise
    for fits, given, wanted in (
        (
            noise is not None or heads % 2 == 0,
            f"num_attention_heads is {heads}",
            "an even number, since heads are pairs",
        ),
        (keys % 2 == 0, f"num_key_value_heads is {keys}", "an even number, since keys and values are pairs"),
        (
            signals > 0 and signals % pairs == 0,
            f"num_attention_heads is {heads} with num_noise_heads {noise}",
            "as many signal heads for each noise head, at least one",
        ),
        (
            pairs % max(keys // 2, 1) == 0,
            f"num_key_value_heads is {keys} with {pairs} noise heads",
            "twice a number that divides them, since a noise head has one pair of keys",
        ),
    ):
        if not fits:
            raise ConfigError(given, wanted, "correct config.json")
    width = config.get("head_dim")
    if width is None:
        if hidden % heads:
            raise ConfigError(
                f"hidden_size is {hidden}, num_attention_heads {heads}, and there is no head_dim",
                "a head_dim, or heads that divide the hidden size",
                "add head_dim",
            )
        return int(hidden // heads)
    check_positive_int("head_dim", width)
    if noise is None and width * heads != hidden:
        raise ConfigError(
            f"head_dim is {width} and num_attention_heads {heads}, together {width * heads} channels, with hidden_size "
            f"{hidden}",
            "heads that fill the hidden size, as those of Motif-2.6B do",
            "correct config.json",
        )
    return int(width)


def _biases(config: Config) -> tuple[bool, bool]:
    """Returns whether queries, keys and values have a bias, and whether all other projections have one."""
    others = bool(config.get("use_bias"))
    qkv = others if config.get("qkv_bias") is None else bool(config["qkv_bias"])
    if others and not qkv:
        raise ConfigError(
            "use_bias is True and qkv_bias False",
            "biases in all projections, or of q, k and v alone",
            "correct config.json",
        )
    return qkv, others


def _rope(config: Config) -> Config:
    """Returns the rotary positions, from either spelling."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    former = rope.pop("type", "default")
    rope.setdefault("rope_type", former)
    theta = config.get("rope_theta", rope.get("rope_theta", 10000.0))
    if rope.setdefault("rope_theta", theta) != theta:
        raise ConfigError(
            f"rope_theta is {shown(theta)}, and {shown(rope['rope_theta'])} among the rotary positions",
            "one number",
            "correct config.json",
        )
    return rope


def _check_expressible(ours: DiffTransformerConfig) -> None:
    check_layers_alike(ours, "Motif", has=("hidden_act",))
    layers = ours.num_hidden_layers
    init = [ours.layer_lambda_init(layer) for layer in range(layers)]
    biases = (ours.attention_bias, ours.attention_output_bias, ours.mlp_bias)
    filled = ours.num_attention_heads * ours.rope_width
    for expressible, given, wanted in (
        (ours.attention in FORMS, f"attention is {ours.attention!r}", " or ".join(FORMS)),
        (
            init == motif_lambda_init(layers),
            f"λ_init of the first layer is {init[0]:.4g}",
            "−0.0099 there, and Motif's own λ_init in all others",
        ),
        (ours.hidden_act == POLY_NORM, f"hidden_act is {ours.hidden_act!r}", POLY_NORM),
        (not ours.switches(), f"the model has {ours.switches()}", "the variant as published"),
        (ours.subln_affine, "subln_affine is False", "a gain in the norm of the heads"),
        (not ours.qk_norm, "qk_norm is True", "no norm of queries and keys"),
        (
            biases in ((False, False, False), (True, False, False), (True, True, True)),
            f"attention_bias is {biases[0]}, attention_output_bias {biases[1]}, mlp_bias {biases[2]}",
            "biases in all projections, in those of q, k and v, or in none",
        ),
        (
            ours.record.shares_noise or filled == ours.hidden_size,
            f"{ours.num_attention_heads} heads of {ours.rope_width} are {filled} channels, hidden_size is "
            f"{ours.hidden_size}",
            "heads that fill the hidden size",
        ),
    ):
        if not expressible:
            raise UnsupportedError(given, f"{wanted}, as Motif is built", "keep the model as diff_transformer")


def _their_names(ours: DiffTransformerConfig) -> dict[str, str]:
    """Motif's name of each tensor that has another name in our checkpoints: λ."""
    prefixes = [f"model.layers.{layer}.self_attn." for layer in range(ours.num_hidden_layers)]
    return {f"{prefix}lam.{name}": f"{prefix}{name}" for prefix in prefixes for name in LAMBDAS}
