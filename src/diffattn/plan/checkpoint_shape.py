"""The shape of a checkpoint, read from its ``config.json`` alone: ours, and Llama-like ones of ``transformers``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from diffattn.errors import ConfigError
from diffattn.folders import no_model
from diffattn.plan.cost import count_parameters
from diffattn.plan.shape import VARIANTS, ModelShape, check_positive_int

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
# What a decoder of this planner does not have; a count without it would be wrong by far.
_FOREIGN = ("num_local_experts", "num_experts", "n_routed_experts", "kv_lora_rank", "text_config", "is_encoder_decoder")
_TIED = ("diff_transformer", "gemma", "gemma2", "gemma3_text")


class Checkpoint(NamedTuple):
    """What a planner knows of a checkpoint."""

    shape: ModelShape
    """The softmax Transformer that it replaces, with the checkpoint's own feed-forward width."""
    attention: str
    """A name in ``VARIANTS``; softmax where it is DEX, which is fitted to such a model."""
    left_out: dict[str, int]
    """Parameters that the shape does not say, by what they are, of all layers; negative where it has too many."""


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The softmax Transformer that a checkpoint replaces, its variant, and what the two do not say of it.

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

    A Llama-like file has these fields and a gated feed-forward network.

    Args:
        path: the folder of a checkpoint, or its ``config.json``.

    Returns:
        A :class:`Checkpoint`; its shape is named after the folder.

    Raises:
        ConfigError: no readable JSON object there, a missing or impossible field, or a model of another kind (experts,
            compressed keys, an encoder).

    Source: ``diffattn.model.configuration.DiffTransformerConfig``; ``LlamaConfig`` and ``DiffLlamaConfig`` of
    ``transformers``.

    >>> read_checkpoint("absent")
    Traceback (most recent call last):
    diffattn.errors.ConfigError: 'absent' given; a folder with a config.json is wanted; there is none: check the path
    """
    file = Path(path)
    if file.suffix != ".json":
        file = file / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            no_model(file.parent)
            or f"{str(path)!r} given; a folder with a config.json is wanted; there is none: check the path"
        ) from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{str(file)!r} given; a readable config.json is wanted; it says: {reason}") from None
    if isinstance(values, dict) and "model_type" not in values and (line := no_model(file.parent)):
        raise ConfigError(line)
    if foreign := isinstance(values, dict) and [key for key in _FOREIGN if values.get(key)]:
        raise ConfigError(
            f"{str(file)!r} gives {foreign[0]}; a decoder with plain attention and one feed-forward network per "
            "layer is wanted; write its numbers as a .toml file"
        )
    if not isinstance(values, dict) or (missing := [key for key in _SIZES if key not in values]):
        what = ", ".join(missing) if isinstance(values, dict) else "no JSON object"
        raise ConfigError(
            f"{str(file)!r} given; a decoder's config.json is wanted, with {', '.join(_SIZES)}; it lacks {what}: write "
            "the shape as a .toml file"
        )
    try:
        return _read(values, file.resolve().parent.name)
    except ConfigError as error:
        raise ConfigError(f"{str(file)!r}: {error}") from None


def _read(values: dict[str, Any], name: str) -> Checkpoint:
    for key in _SIZES:
        check_positive_int(key, values[key])
    kind = values.get("model_type", "")
    ours = kind == "diff_transformer" or "attention" in values
    attention = values.get("attention", "diff_v1") if ours else "softmax"
    if attention not in (*VARIANTS, "dex"):
        raise ConfigError(f"attention={attention!r} given; one of {', '.join(VARIANTS)}, dex is wanted; correct it")
    v1, v2 = attention == "diff_v1", attention == "diff_v2"

    heads = values["num_attention_heads"]
    groups = values.get("num_key_value_heads")
    width = values.get("head_dim")
    if groups is None:
        groups = heads // 2 if v1 or v2 else heads
    check_positive_int("num_key_value_heads", groups)
    if width is not None:
        check_positive_int("head_dim", width)
    if v1 and width is not None and width % 2:
        raise ConfigError(f"head_dim={width} given; an even width is wanted, because diff_v1 cuts it into two heads")
    if v2 and heads % 2:
        raise ConfigError(f"num_attention_heads={heads} given; an even number is wanted, because diff_v2 pairs them")
    rope = values.get("rope_parameters") or {}
    shape = ModelShape(
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads // (2 if v2 else 1),
        num_kv_heads=groups * (2 if v1 else 1),
        # Where it is missing, d = D / n for every variant.
        head_dim=None if width is None else width // (2 if v1 else 1),  # type: ignore[arg-type]
        intermediate_size=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        tie_word_embeddings=values.get("tie_word_embeddings", kind in _TIED),
        max_position_embeddings=values.get("max_position_embeddings", 2048),
        rope_theta=values.get("rope_theta") or rope.get("rope_theta") or 10000.0,
        name=name,
        source="config.json",
    )
    # DiffLlama's file has the softmax model's own heads, which it pairs.
    attention = {"diffllama": "diff_v1"}.get(kind, attention)
    planned = "softmax" if attention == "dex" else attention
    shape.check_variant(planned)
    return Checkpoint(shape, planned, _left_out(values, shape, attention))


def _left_out(values: dict[str, Any], shape: ModelShape, attention: str) -> dict[str, int]:
    """Biases, norms of queries and keys, switches, DEX: what is not 0."""
    assert shape.num_kv_heads is not None
    assert shape.head_dim is not None
    kind, layers = values.get("model_type", ""), shape.num_layers
    ours = "attention" in values or kind == "diff_transformer"
    bias = kind == "qwen2" or bool(values.get("attention_bias"))
    output_bias = bool(values.get("attention_output_bias") if ours else kind != "qwen2" and bias)
    queries = shape.num_heads * shape.head_dim * (2 if attention == "diff_v2" else 1)
    biases = bias * (queries + 2 * shape.num_kv_heads * shape.head_dim) + output_bias * shape.hidden_size
    biases += bool(values.get("mlp_bias")) * (2 * shape.intermediate_size + shape.hidden_size)
    normed = values.get("qk_norm") if ours else kind == "qwen3"
    switches = 0
    if attention in VARIANTS:
        chosen = {
            "subln_affine": values.get("subln_affine", True) and kind != "diffllama",
            "head_norm": values.get("head_norm"),
            "lambda_form": values.get("lambda_form", "sigmoid"),
        }
        plain = count_parameters(shape, attention).total
        switches = count_parameters(shape, attention, **chosen).total - plain
    found = {"biases": layers * biases, "norms of queries and keys": layers * 2 * shape.head_dim if normed else 0}
    found |= {"the norm of heads and λ": switches}
    if attention == "dex":
        chosen_heads = values.get("dex_heads")
        heads = layers * shape.num_heads if chosen_heads is None else sum(map(len, chosen_heads))
        found["DEX"] = heads * (shape.head_dim**2 + 1)
    return {name: number for name, number in found.items() if number}
