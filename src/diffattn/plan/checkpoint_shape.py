"""A shape and its variant from a checkpoint's ``config.json``: ours, or any that names its sizes as Llama's does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffattn.errors import ConfigError
from diffattn.plan.shape import ModelShape

_NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def read_checkpoint(path: str | Path) -> tuple[ModelShape, str]:
    """The softmax Transformer that a checkpoint has or replaces, and the attention that it has.

    Ours has ``attention``, and its heads are those of the one attention call; without that field the model is taken for
    a softmax one. ``diffllama`` is V1 with heads as the softmax Transformer has them.

    Args:
        path: a folder with a ``config.json``, or the file.

    Raises:
        ConfigError: no such file, no JSON, or a field that is missing or impossible.

    >>> read_checkpoint("absent")
    Traceback (most recent call last):
    diffattn.errors.ConfigError: 'absent' given; a folder with config.json is wanted; there is none: check the path
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{str(path)!r} given; a folder with config.json is wanted; there is none: check the path"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(file)!r} given; a readable config.json is wanted; it says: {error}") from None
    if not isinstance(config, dict) or (missing := [name for name in _NAMES if name not in config]):
        what = ", ".join(missing) if isinstance(config, dict) else "no JSON object"
        raise ConfigError(
            f"{str(file)!r} given; a decoder's config.json is wanted, with {', '.join(_NAMES)}; it lacks {what}: write "
            "the shape as a .toml file"
        )
    attention = config.get("attention", "diff_v1" if config.get("model_type") == "diffllama" else "softmax")
    try:
        shape = _shape(config, attention, Path(path).name)
        shape.check_variant(attention)
    except (ConfigError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"{str(file)!r}: {error}") from None
    return shape, attention


def _shape(config: dict[str, Any], attention: str, name: str) -> ModelShape:
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or (heads if "attention" not in config or attention == "softmax"
                                                   else heads // 2)  # fmt: skip
    width = config.get("head_dim")
    if "attention" in config:
        # Heads of the one call: V1 has n queries over G/2 keys of width 2d, V2 2n over G of width d.
        call = width or config["hidden_size"] // heads * (1 if attention == "softmax" else 2)
        width = call // 2 if attention == "diff_v1" else call
        groups *= 2 if attention == "diff_v1" else 1
        heads //= 2 if attention == "diff_v2" else 1
    rope = config.get("rope_parameters") or {}
    return ModelShape(
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=width,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        name=name,
        source="config.json",
    )
