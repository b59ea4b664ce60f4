"""The shape of a checkpoint, read from its ``config.json`` alone: ours, and Llama-like ones of ``transformers``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffattn.errors import ConfigError
from diffattn.plan.shape import VARIANTS, ModelShape, check_positive_int

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
# What a decoder of this planner does not have; a count without it would be wrong by far.
_FOREIGN = ("num_local_experts", "num_experts", "n_routed_experts", "kv_lora_rank", "text_config", "is_encoder_decoder")
_TIED = ("diff_transformer", "gemma", "gemma2", "gemma3_text")


def read_checkpoint(path: str | Path) -> tuple[ModelShape, str]:
    """The softmax Transformer that a checkpoint replaces, and its variant.

    Heads in the file are those of the one attention call; the shape's are the softmax model's:

    ================= =========================== =========================== ===========
    variant           n                           G                           d
    ================= =========================== =========================== ===========
    softmax, gated    num_attention_heads         num_key_value_heads         head_dim
    diff_v1           num_attention_heads         2 · num_key_value_heads     head_dim / 2
    diff_v2           num_attention_heads / 2     num_key_value_heads         head_dim
    diffllama, as V1  num_attention_heads         num_key_value_heads         head_dim
    ================= =========================== =========================== ===========

    A Llama-like file has these fields and a gated feed-forward network; biases, if it has any, are not counted.

    Args:
        path: the folder of a checkpoint, or its ``config.json``.

    Returns:
        The shape, named after the folder, and a name in ``VARIANTS``.

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
            f"{str(path)!r} given; a folder with a config.json is wanted; there is none: check the path"
        ) from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{str(file)!r} given; a readable config.json is wanted; it says: {reason}") from None
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


def _read(values: dict[str, Any], name: str) -> tuple[ModelShape, str]:
    for key in _SIZES:
        check_positive_int(key, values[key])
    kind = values.get("model_type", "")
    ours = kind == "diff_transformer" or "attention" in values
    attention = values.get("attention", "diff_v1") if ours else "softmax"
    if attention not in VARIANTS:
        raise ConfigError(f"attention={attention!r} given; one of {', '.join(VARIANTS)} is wanted; correct it")
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
    attention = "diff_v1" if kind == "diffllama" else attention
    shape.check_variant(attention)
    return shape, attention
