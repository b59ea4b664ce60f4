"""The conversions between ``diffllama`` of ``transformers`` and our V1, in both directions.

Both compute V1 (arXiv 2410.05258) and differ in the order of heads, of which there are n for queries and G for keys and
values, all of width d:

=========== ============================== =================================
            ``diffllama``                  ours
=========== ============================== =================================
queries     heads i and i + n/2            heads 2i and 2i + 1
keys        heads j and j + G/2            heads 2j and 2j + 1
values      heads j and j + G/2, joined    heads 2j and 2j + 1, joined
norm        no gain, ε of the other norms  a gain or none, ε of its own
λ           the model's dtype              float32
=========== ============================== =================================

Output heads have one order, so W_O stays. Source: ``transformers/models/diffllama`` of release 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import DiffLlamaConfig

from diffattn.config_fields import Config, shown
from diffattn.convert.layout import (
    LAMBDAS,
    Tensors,
    check_shapes,
    float32_exactly,
    halves_to_pairs,
    our_shapes,
    pairs_to_halves,
    same_values,
    twice_each_head,
)
from diffattn.convert.reading import (
    SHARED,
    check_activation,
    check_layers_alike,
    check_tensors,
    in_both_spellings,
    naming_the_file,
    our_config,
    parsed,
    resolve_tie,
    rope_of,
    shared_fields,
)
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM


def to_diff_v1(config: Config, tensors: Mapping[str, Tensor]) -> tuple[Config, Tensors]:
    """Returns a ``diffllama`` checkpoint as our V1 model: the same function, with every weight's bits in another order.

    An odd number of key/value heads pairs heads that belong to different query groups. Then each of them is written
    twice, which is the same function with 2G of them, and a cache of twice the size. (Release 5.23 no longer runs such
    checkpoints; earlier ones repeated the heads for the query heads first and paired them after.)

    Args:
        config: a ``config.json`` of ``diffllama``, in either spelling of its rotary positions. Dropout is an option of
            training, so it is left out.
        tensors: its weights by name, such as ``model.layers.0.self_attn.q_proj.weight`` (n·d, D).

    Returns:
        The configuration of :class:`DiffTransformerForCausalLM` and its tensors; λ as float32.

    Raises:
        UnsupportedError: an odd number of query heads, rotary positions that are unknown here, integer weights, or λ
            that float32 cannot hold.
        ConfigError: a configuration that is no model.
        CheckpointError: tensors are missing, unknown, or of another shape.
    """
    if config.get("model_type") != DiffLlamaConfig.model_type:
        raise UnsupportedError(
            f"model_type is {config.get('model_type')!r}", DiffLlamaConfig.model_type, "choose a diffllama checkpoint"
        )
    source = parsed(DiffLlamaConfig, config)
    check_activation(source)
    heads, groups, width = source.num_attention_heads, source.num_key_value_heads, source.head_dim
    if heads % 2:
        raise UnsupportedError(
            f"num_attention_heads is {heads}", "an even number, since heads are paired", "choose another checkpoint"
        )
    if groups < 1 or heads % groups:
        raise ConfigError(
            f"num_key_value_heads is {groups}", f"a divisor of num_attention_heads, {heads}", "correct config.json"
        )
    with naming_the_file():
        ours = DiffTransformerConfig(
            **shared_fields(source)
            | {
                "attention": "diff_v1",
                "num_key_value_heads": groups if groups % 2 else groups // 2,
                "head_dim": 2 * width,
                "attention_bias": source.attention_bias,
                "attention_output_bias": source.attention_bias,
                "rope_parameters": rope_of(source),
                "lambda_std": 0.1 if source.lambda_std_dev is None else source.lambda_std_dev,
                "subln_affine": False,
                "subln_eps": source.rms_norm_eps,
                "architectures": [DiffTransformerForCausalLM.__name__],
                "converted": {"from": source.model_type, "same_function": True},
            }
        )
    weights = dict(tensors)
    resolve_tie(ours, weights)
    check_shapes(_shapes(ours, weights, groups * width), weights, source.model_type)
    for prefix in _attentions(ours):
        for name in _present(weights, prefix, ("q_proj", "k_proj", "v_proj")):
            rows = weights[name]
            if groups % 2 and "q_proj" not in name:
                rows = twice_each_head(rows, width)
            weights[name] = halves_to_pairs(rows, width)
        for name in LAMBDAS:
            weights[f"{prefix}lam.{name}"] = float32_exactly(f"{prefix}{name}", weights.pop(f"{prefix}{name}"))
    check_tensors(ours, weights)
    return ours.to_diff_dict(), weights


def to_diffllama(config: Config, tensors: Mapping[str, Tensor]) -> tuple[Config, Tensors]:
    """Returns our V1 model as a ``diffllama`` checkpoint: the same function, with every weight's bits in another order.

    ``diffllama`` has no gain in the norm of its heads. A gain whose values are all powers of two is multiplied into
    W_O, which rounds nothing; any other is refused.

    Args:
        config: a ``config.json`` of :class:`DiffTransformerForCausalLM` with attention ``"diff_v1"``.
        tensors: its weights by name.

    Returns:
        The configuration of ``DiffLlamaForCausalLM``, with its rotary positions in both spellings, and its tensors; λ
        as float32, which ``transformers`` casts to the model's dtype when it loads them.

    Raises:
        UnsupportedError: what ``diffllama`` cannot express: another variant, a constant λ_init, norms of queries and
            keys, biases in only some projections, another ε in the norm of the heads than elsewhere, or a gain there
            that cannot be multiplied into W_O exactly.
        ConfigError, CheckpointError: as :func:`to_diff_v1`.
    """
    ours = our_config(config)
    _check_expressible(ours)
    weights = dict(tensors)
    resolve_tie(ours, weights)
    check_tensors(ours, weights)
    width = ours.rope_width
    for prefix in _attentions(ours):
        for name in _present(weights, prefix, ("q_proj", "k_proj", "v_proj")):
            weights[name] = pairs_to_halves(weights[name], width)
        for name in LAMBDAS:
            weights[f"{prefix}{name}"] = float32_exactly(f"{prefix}{name}", weights.pop(f"{prefix}lam.{name}"))
        if ours.subln_affine:
            output = f"{prefix}o_proj.weight"
            weights[output] = _with_gain(output, weights[output], weights.pop(f"{prefix}subln.weight"))
    rope = dict(ours.rope_parameters or {})
    assert ours.num_key_value_heads is not None
    fields = {name: getattr(ours, name) for name in SHARED} | {
        "num_key_value_heads": 2 * ours.num_key_value_heads,
        "head_dim": width,
        "attention_bias": ours.attention_bias,
        "lambda_std_dev": ours.lambda_std,
        "rope_parameters": rope,
        "architectures": ["DiffLlamaForCausalLM"],
    }
    return in_both_spellings(parsed(DiffLlamaConfig, fields).to_diff_dict(), rope), weights


def _check_expressible(ours: DiffTransformerConfig) -> None:
    check_layers_alike(ours, "diffllama")
    biases = (ours.attention_bias, ours.attention_output_bias, ours.mlp_bias)
    for expressible, given, wanted in (
        (ours.attention == "diff_v1", f"attention is {ours.attention!r}", "'diff_v1', the only one that diffllama has"),
        (ours.lambda_init is None, f"lambda_init is {shown(ours.lambda_init)}", "the schedule by depth"),
        (not ours.qk_norm, "qk_norm is True", "no norm of queries and keys"),
        (not ours.switches(), f"the model has {ours.switches()}", "the variant as published"),
        (
            biases in ((False, False, False), (True, True, False)),
            f"attention_bias is {biases[0]}, attention_output_bias {biases[1]}, mlp_bias {biases[2]}",
            "biases in all four projections of attention or in none, and nowhere else",
        ),
        (
            ours.subln_eps == ours.rms_norm_eps,
            f"subln_eps is {ours.subln_eps} and rms_norm_eps {ours.rms_norm_eps}",
            "one ε for all norms",
        ),
    ):
        if not expressible:
            raise UnsupportedError(given, f"{wanted}, as diffllama is built", "keep the model as diff_transformer")


def _shapes(ours: DiffTransformerConfig, tensors: Mapping[str, Tensor], rows: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a ``diffllama`` checkpoint that becomes ``ours``; its keys and values have ``rows`` rows each."""
    shapes = {name.replace(".lam.", "."): shape for name, shape in our_shapes(ours, tensors).items()}
    for prefix in _attentions(ours):
        for name in _present(shapes, prefix, ("k_proj", "v_proj")):
            shapes[name] = (rows, *shapes[name][1:])
    return shapes


def _attentions(ours: DiffTransformerConfig) -> list[str]:
    return [f"model.layers.{layer}.self_attn." for layer in range(ours.num_hidden_layers)]


def _present(weights: Mapping[str, object], prefix: str, projections: tuple[str, ...]) -> list[str]:
    names = (f"{prefix}{projection}.{kind}" for projection in projections for kind in ("weight", "bias"))
    return [name for name in names if name in weights]


def _with_gain(name: str, output: Tensor, gain: Tensor) -> Tensor:
    """Returns W_O (D, n/2 · 2d) with the gain (2d,) of every head's norm multiplied into its columns."""
    columns = gain.to(output.dtype).repeat(output.shape[1] // len(gain))
    folded = output * columns
    powers = torch.frexp(gain.float()).mantissa.abs() == 0.5
    # A product below or above what the dtype holds would be rounded too.
    if not powers.all() or not same_values(folded / columns, output):
        raise UnsupportedError(
            f"the norm of the heads before {name} has a gain that is not made of powers of two",
            "no gain, or one that W_O can take without rounding, since diffllama has none",
            "keep the model as diff_transformer, or train it with subln_affine=False",
        )
    return folded
