"""A model as it is named on the command line: a variant and a size."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path

from diffattn.errors import ConfigError
from diffattn.plan.checkpoint_shape import read_checkpoint
from diffattn.plan.cost import match_parameters
from diffattn.plan.rule import parse_count, shape_about
from diffattn.plan.shape import VARIANTS, ModelShape, presets


@dataclass(frozen=True)
class Model:
    """A model to plan: what it is called, its variant, the softmax shape, and the shape that is built.

    ``built`` is ``shape`` but for V2 and gated attention, whose feed-forward network is narrowed to as many parameters
    as softmax has; a checkpoint's own model is built already. ``left_out`` are parameters of a checkpoint that are not
    planned, by what they are.

    >>> parse_model("diff_v2:3M").built.intermediate_size
    448
    """

    name: str
    attention: str
    shape: ModelShape
    built: ModelShape
    left_out: dict[str, int] = field(default_factory=dict)


def parse_model(text: str) -> Model:
    """A model as it is written on the command line: ``variant:size``.

    Size is a preset, the path of a ``.toml`` file, a checkpoint's folder or ``config.json``, or a count such as 11B:
    the shape nearest to it by the rule of ``shape_about``; about-6.8B is that too, where 6.8B is a preset. A checkpoint
    alone brings its own variant.

    Args:
        text: such as ``"diff_v1:6.8B"``, ``"softmax:11B"``, ``"diff_v2:shape.toml"`` or ``"runs/my-model"``.

    Raises:
        ConfigError: an unknown variant, a size that is none of these, or a shape that cannot carry the variant.

    Source: V2's width is that of ``match_parameters``.

    >>> model = parse_model("softmax:11B")
    >>> model.attention, model.shape == shape_about(11e9)
    ('softmax', True)
    """
    variant, colon, size = text.partition(":")
    if not colon or (variant not in VARIANTS and Path(text).exists()):
        if not Path(text).exists():
            raise ConfigError(
                f"model {text!r} given; a variant and a size are wanted, such as diff_v1:6.8B or softmax:11B; "
                f"put one of {', '.join(VARIANTS)} and a colon before it"
            )
        found = read_checkpoint(text)
        return Model(text, found.attention, found.shape, found.shape, found.left_out)
    if variant not in VARIANTS:
        near = difflib.get_close_matches(variant, VARIANTS, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"model {text!r} given; one of {', '.join(VARIANTS)} is wanted before the colon{meant}")
    shape = _shape(size)
    shape.check_variant(variant)
    return Model(text, variant, shape, match_parameters(shape, variant))


def _shape(size: str) -> ModelShape:
    about = size.removeprefix("about-")
    if size in presets() or size.endswith(".toml"):
        return ModelShape.load(size)
    if size and Path(size).exists():
        return read_checkpoint(size).shape
    try:
        count = parse_count(about)
    except ConfigError:
        raise ConfigError(
            f"size {size!r} given; a preset ({', '.join(presets())}), a .toml file, a checkpoint's folder or a count "
            "such as 11B is wanted; there is no such file: check the path"
        ) from None
    return shape_about(count)
