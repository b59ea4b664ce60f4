"""The shape of a checkpoint, read from its ``config.json``: ours, and Llama-like ones of ``transformers``.

Where the weights lie beside it, the headers of their files say how many numbers there are, and the two must agree.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from diffattn.checkpoint_files import INDEX, WEIGHTS, read_tensors, weight_files
from diffattn.config_fields import OURS, Config, check_config
from diffattn.errors import CheckpointError, ConfigError, one_line
from diffattn.files import parse_json
from diffattn.folders import no_model
from diffattn.plan.blocks.block import BlockShape
from diffattn.plan.blocks.fields import Fields, check_layer_types
from diffattn.plan.blocks.motif import POLYNORM
from diffattn.plan.blocks.parts import FULL, SLIDING
from diffattn.plan.checkpoints.kinds import BLOCKS, BlockType, ModelType, kind_of
from diffattn.plan.checkpoints.known import PLAIN, check_known
from diffattn.plan.cost import count_parameters
from diffattn.plan.shape import BuiltShape, ModelShape, check_positive_int
from diffattn.variants import ATTENTIONS, BASELINE, DEFAULT, Heads

Flag = TypeVar("Flag", bool, bool | None)
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_LAYER = re.compile(r"^(?:model|transformer|gpt_neox)\.(?:layers|h)\.(\d+)\.")
# Buffers among the weights: older versions saved those of rotary positions, and DEX has how far it is annealed.
_BUFFERS = re.compile(r"\brotary_emb\.inv_freq$|\.annealed$|\.e_score_correction_bias$")


class PlannedCheckpoint(NamedTuple):
    """The facts that the planner needs of a checkpoint."""

    shape: ModelShape
    """The softmax Transformer that it replaces, with the checkpoint's own feed-forward width; a ``BuiltShape`` where it
    has parameters beside those of a shape, or layers that see a window of tokens alone."""
    attention: str
    """A name in ``VARIANTS``; softmax where it is DEX, which is fitted to such a model."""
    left_out: dict[str, int]
    """Numbers in the files of the weights that no model of its type reads, by what they are."""
    said: tuple[str, ...] = ()
    """Sentences that a reader of its plan has to know."""


def read_checkpoint(path: str | Path) -> PlannedCheckpoint:
    """Returns the softmax Transformer that a checkpoint replaces, its variant, and what of its files no plan holds.

    Heads in the file are those of the one attention call; the shape's are the softmax model's:

    ================= =========================== =========================== ===========
    variant           n                           G                           d
    ================= =========================== =========================== ===========
    softmax, dex      num_attention_heads         num_key_value_heads         head_dim
    gated             num_attention_heads         num_key_value_heads         head_dim
    diff_v1           num_attention_heads         2 · num_key_value_heads     head_dim / 2
    diff_v2           num_attention_heads / 2     num_key_value_heads         head_dim
    diffllama, as V1  num_attention_heads         num_key_value_heads         head_dim
    ================= =========================== =========================== ===========

    Args:
        path: the folder of a checkpoint, or its ``config.json``.

    Returns:
        A ``PlannedCheckpoint``; its shape is named after the folder.

    Raises:
        ConfigError: no readable JSON object there, a missing or impossible field, a ``model_type`` that is not in
            ``KINDS`` or has parts that a plan has not, or weights of another number of parameters.
        CheckpointError: weights that are damaged.

    Source: ``diffattn.model.configuration.DiffTransformerConfig``; the configurations of ``transformers``.

    >>> read_checkpoint("absent")
    Traceback (most recent call last):
    diffattn.errors.ConfigError: there is no config.json in 'absent'; wanted the folder of a model: check the path
    """
    file = Path(path)
    if file.suffix != ".json":
        file = file / "config.json"
    try:
        values = parse_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise (
            no_model(file.parent, ConfigError)
            or ConfigError(f"there is no config.json in {str(path)!r}", "the folder of a model", "check the path")
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{str(file)!r} cannot be read ({one_line(error)})", "a config.json", "correct the file"
        ) from None
    if isinstance(values, dict) and "model_type" not in values and (other := no_model(file.parent, ConfigError)):
        raise other
    if not isinstance(values, dict):
        raise ConfigError(
            f"{str(file)!r} holds a {type(values).__name__}",
            f"a decoder's config.json, which is a JSON object with {', '.join(_SIZES)}",
            "check the path",
        )
    if "model_type" in values:
        kind_of(values, str(file))
    if values.get("model_type") not in BLOCKS and (missing := [key for key in _SIZES if key not in values]):
        raise ConfigError(
            f"{str(file)!r} lacks {', '.join(missing)}",
            f"a decoder's config.json, with {', '.join(_SIZES)}",
            "write the shape as a .toml file",
        )
    shape, attention, _, said = shape_of(values, file.resolve().parent.name, str(file))
    return PlannedCheckpoint(shape, attention, _hold_against_weights(shape, attention, file), said)


def shape_of(values: Config, name: str, file: str) -> PlannedCheckpoint:
    """Returns what the fields of a ``config.json`` say; ``file`` is how an error calls it.

    Raises:
        ConfigError: as ``read_checkpoint``.

    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    >>> shape_of(sizes | {"model_type": "llama", "vocab_size": 9}, "tiny", "tiny").shape.head_dim
    4
    """
    kind = kind_of(values, file)
    said = (f"The code that {name} names (auto_map) is never run: its config.json alone is read.",)
    try:
        if isinstance(kind, BlockType):
            fields = Fields(values)
            shape: ModelShape = replace(kind.read(fields), name=name)
            attention, read = kind.attention, fields.read
        else:
            (shape, attention), read = _read(values, kind, name), {*PLAIN, *kind.own_fields}
    except ConfigError as error:
        raise error.at(repr(file)) from None
    if values["model_type"] != OURS:
        check_known(values, read, values["model_type"], file)
    return PlannedCheckpoint(shape, attention, {}, said if values.get("auto_map") else ())


def _read(values: Config, kind: ModelType, name: str) -> tuple[ModelShape, str]:
    check_config(values)
    ours = values["model_type"] == OURS
    attention = values.get("attention", DEFAULT) if ours else BASELINE
    variant = ATTENTIONS[attention]
    if ours and not _flag(values, "is_causal", True):
        raise ConfigError("is_causal=False", "a decoder, because an encoder writes no tokens", "plan a causal model")
    for key in _SIZES:
        check_positive_int(key, values[key])

    heads = values["num_attention_heads"]
    groups, width = values.get("num_key_value_heads", kind.kv_heads), values.get("head_dim", kind.head_dim)
    # Motif's files count key/value heads and widths as the softmax model has them, ours those of the call.
    grouped = ATTENTIONS[kind.grouped] if kind.grouped and values.get("num_noise_heads") is not None else None
    noise = values.get("num_noise_heads") if variant.shares_noise or grouped else None
    if groups is None:
        groups = noise or heads // (variant.query_factor * variant.join)
    if variant.shares_noise or grouped:
        noise = groups if noise is None else noise
        check_positive_int("num_noise_heads", noise)
        join = grouped.join if grouped else 1
        if heads % noise or noise == heads or groups % join or noise % max(1, groups // join):
            raise ConfigError(
                f"num_noise_heads={noise} of num_attention_heads={heads} with num_key_value_heads={groups}",
                "equally many signal heads for each noise head, and noise heads for each key/value head",
                "correct the file",
            )
    check_positive_int("num_key_value_heads", groups)
    if kind.fills and width is None and values["hidden_size"] % heads == 0:
        width = values["hidden_size"] // heads
    if width is not None:
        check_positive_int("head_dim", width)
    if kind.fills and (width is None or (not grouped and width * heads != values["hidden_size"])):
        raise ConfigError(
            f"head_dim={width} and num_attention_heads={heads} with hidden_size={values['hidden_size']}",
            "heads that are as wide as the hidden size together, or a head_dim beside num_noise_heads",
            "correct the file",
        )
    if width is not None and width % variant.join:
        raise ConfigError(
            f"head_dim={width} for {attention}",
            f"a multiple of {variant.join}, because each head holds that many of softmax's",
            "correct the file",
        )
    if noise is None and heads % variant.query_factor:
        raise ConfigError(
            f"num_attention_heads={heads} for {attention}",
            f"a multiple of {variant.query_factor}, because it has that many for each of softmax's",
            "correct the file",
        )
    if grouped:
        call = Heads(heads, groups // grouped.join, grouped.join * (width or 0))
        replaced = grouped.replaced(call, noise)
    else:
        replaced = variant.replaced(Heads(heads, groups, width or 0), noise)
    shape = ModelShape(
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=replaced.queries,
        num_kv_heads=replaced.groups,
        # Where it is missing, d = D / n for every variant.
        head_dim=None if width is None else replaced.width,  # type: ignore[arg-type]
        intermediate_size=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        tie_word_embeddings=values.get("tie_word_embeddings", kind.tied),
        max_position_embeddings=values.get("max_position_embeddings", 2048),
        rope_theta=_rope_theta(values),
        signals_per_noise=None if noise is None else (heads - noise) // noise,
        name=name,
        source="config.json",
    )
    # The files of DiffLlama and Motif have the softmax model's own heads, which they pair.
    attention = attention if ours else grouped.name if grouped else kind.attention
    planned = ATTENTIONS[attention].fitted_to or attention
    shape.check_variant(planned)
    extras = tuple(one for one in _extras(values, kind, shape, attention, ours=ours) if one[2])
    window = _window(values, kind, shape.num_layers)
    built = BuiltShape(**vars(shape), extras=extras, window=window) if extras or window else shape
    return built, planned


def _rope_theta(values: Config) -> Any:
    """Returns the base, from the older or the newer layout; of Gemma 3's two, that of the layers that see all."""
    given = values.get("rope_theta")
    rope = values.get("rope_parameters")
    if given is None and isinstance(rope, dict):
        whole = rope.get("full_attention")
        given = (whole if isinstance(whole, dict) else rope).get("rope_theta")
    return 10000.0 if given is None else given


def _extras(
    values: Config, kind: ModelType, shape: ModelShape, attention: str, *, ours: bool
) -> list[tuple[str, str, int]]:
    """Returns the parameters that a shape does not say: the part, what they are, how many in all layers."""
    L, D, F, n, G, d = (
        shape.num_layers, shape.hidden_size, shape.intermediate_size, shape.num_heads, shape.num_kv_heads,
        shape.head_dim,
    )  # fmt: skip
    qkv, output, network = kind.bias
    output_bias, network_bias = _switch(values, output), _switch(values, network)
    bias = _switch(values, qkv, output_bias if qkv == "qkv_bias" else kind.biased)
    variant = ATTENTIONS[attention]
    queries = variant.query_width(shape)
    found = [("attention", "biases", L * (bias * (queries + 2 * G * d) + output_bias * D))]
    found.append(("feed_forward", "biases", L * network_bias * (2 * F + D)))
    normed = 0
    if kind.qk_norm != "none" or (ours and _flag(values, "qk_norm")):
        normed = n * d + G * d if kind.qk_norm == "all heads" else 2 * d
    found.append(("norms", "norms of queries and keys", L * normed))
    found.append(("norms", "further norms", L * kind.further_norms * D))
    act_weights = POLYNORM if ours and values.get("hidden_act") == "poly_norm" else kind.act_weights
    found.append(("feed_forward", "weights of the activation function", L * act_weights))
    if variant.chosen_heads:
        chosen = _chosen_heads(values, shape)
        own = [math.prod(each.shape(D=D, d=d, H=chosen, V=d)) for each in variant.tensors if each.trained]
        found.append(("attention", variant.title, sum(own)))
    else:
        # The norm of transformers' diffllama has no gain; Motif's, whose activation has weights, has one.
        switched = count_parameters(
            shape,
            attention,
            subln_affine=_flag(values, "subln_affine", True) if ours else not variant.norm or bool(kind.act_weights),
            head_norm=_flag(values, "head_norm", None) if ours else None,
            lambda_form=values.get("lambda_form", "sigmoid") if ours else "sigmoid",
        )
        difference = switched.total - count_parameters(shape, attention).total
        found.append(("attention", "the norm of heads and λ", difference))
    return found


def _chosen_heads(values: Config, shape: ModelShape) -> int:
    """Counts the heads of all layers that have tensors of their own."""
    chosen = values.get("dex_heads")
    return shape.num_layers * shape.num_heads if chosen is None else sum(map(len, chosen))


def _switch(values: Config, name: str | bool, default: bool = False) -> bool:
    """Returns what all files of a kind have, or what the field of that name says."""
    if isinstance(name, bool):
        return name
    return default if values.get(name) is None else _flag(values, name, default)


def _flag(values: Config, key: str, default: Flag = False) -> Flag:
    """Returns a switch of the file; the default where it is not there."""
    value = values.get(key, default)
    if value is not default and not isinstance(value, bool):
        raise ConfigError(f"{key}={value!r}", "a truth value", "use true or false")
    return value


def _window(values: Config, kind: ModelType, layers: int) -> tuple[int, int] | None:
    """Returns the number of layers that see a window of tokens alone, and its width; None: there are none."""
    width = values.get("sliding_window", kind.window_width)
    if kind.window == "none" or width is None:
        return None
    if kind.window in ("late", "unrotated") and not _flag(values, "use_sliding_window"):
        return None
    check_positive_int("sliding_window", width)
    if "layer_types" in values and values["layer_types"] is not None:
        check_layer_types(values["layer_types"], layers, (FULL, SLIDING))
    named, unrotated = values.get("layer_types"), values.get("no_rope_layers")
    if isinstance(named, list):
        count = named.count(SLIDING)
    elif kind.window == "all":
        count = layers
    elif kind.window == "behind the first of four":
        count = layers - -(-layers // 4)
    elif kind.window == "late":
        first = values.get("max_window_layers", 28)
        check_positive_int("max_window_layers", 1 if first == 0 else first)
        count = max(0, layers - first)
    elif kind.window == "unrotated" and isinstance(unrotated, list):
        count = unrotated.count(0)
    else:
        key = "no_rope_layer_interval" if kind.window == "unrotated" else "sliding_window_pattern"
        every = 4 if kind.window == "unrotated" else kind.window
        every = every if kind.window == 2 else values.get(key, every)
        check_positive_int(key, every)
        # Gemma's layers look back over a window but for every n-th; SmolLM3's unrotated ones are every n-th.
        count = layers // every if kind.window == "unrotated" else layers - layers // every
    return (count, width) if count else None


def _hold_against_weights(shape: ModelShape, attention: str, file: Path) -> dict[str, int]:
    """Compares the count with the headers of the weights, where all of them are there; what in them is not counted."""
    folder = file.parent
    if file.name != "config.json" or not any(os.path.isfile(folder / name) for name in (WEIGHTS, INDEX)):
        return {}
    try:
        weight_files(folder)
    except CheckpointError:
        # Part of a large model is enough to plan it.
        return {}
    sizes = {name: math.prod(entry["shape"]) for name, entry in read_tensors(folder).items()}
    further = [name for name in sizes if _is_further(name, shape.num_layers)]
    left_out = {
        "layers that predict further tokens": sum(map(sizes.pop, further)) if isinstance(shape, BlockShape) else 0,
        "buffers": sum(map(sizes.pop, filter(_BUFFERS.search, list(sizes)))),
        "a copy of the tied embedding": sizes.pop("lm_head.weight", 0) if shape.tie_word_embeddings else 0,
    }
    counted = (shape.parameters() if isinstance(shape, BlockShape) else count_parameters(shape, attention)).total
    held = sum(sizes.values())
    if held != counted:
        raise ConfigError(
            f"{str(file)!r} says {counted:,} parameters and the weights beside it are {held:,}",
            "two that agree",
            "find the config.json of these weights, or write the shape as a .toml file if the model has further parts",
        )
    return {what: number for what, number in left_out.items() if number}


def _is_further(name: str, layers: int) -> bool:
    """Tells whether a tensor belongs to a layer behind the last one, which predicts further tokens."""
    found = _LAYER.match(name)
    return name.startswith("mtp.") or (found is not None and int(found[1]) >= layers)
