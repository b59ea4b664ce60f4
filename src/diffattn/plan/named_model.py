"""A model as it is named on the command line: a variant and a size."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffattn.checkpoint_files import folder_name
from diffattn.errors import ConfigError, did_you_mean
from diffattn.names import one_of, plain
from diffattn.plan.blocks.block import BlockShape
from diffattn.plan.checkpoints.shape import read_checkpoint
from diffattn.plan.cost import match_parameters
from diffattn.plan.models.public import find_public, is_public, public_models
from diffattn.plan.rule import parse_count, shape_about
from diffattn.plan.shape import BuiltShape, ModelShape, check_group, find_preset, presets
from diffattn.quantities import COUNTS, short, whole
from diffattn.variants import BASELINE, DEFAULT, VARIANTS

# The paper's V1, and the softmax model that it equals.
PAIR = (f"{DEFAULT}:6.8B", f"{BASELINE}:11B")


@dataclass(frozen=True)
class Model:
    """A model to plan: its name, its variant, the softmax shape, and the shape that is built.

    ``built`` is ``shape`` but for V2 and gated attention, whose feed-forward network is narrowed to as many parameters
    as softmax has; a checkpoint's own model is built already. ``given`` is how it was written. ``left_out`` are numbers
    in a checkpoint's files that no plan holds, by what they are, and ``said`` sentences that a reader has to know.

    >>> parse_model("diff_v2:3M").built.intermediate_size
    448
    """

    name: str
    attention: str
    shape: ModelShape
    built: ModelShape
    given: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    said: tuple[str, ...] = ()


def parse_model(text: str, *, variant: str | None = None, group: int | None = None) -> Model:
    """Reads a model as it is written on the command line: ``variant:size``.

    Size is a preset, the path of a ``.toml`` file, a checkpoint's folder or ``config.json``, a public model, or a count
    such as 11B: the shape nearest to it by the rule of ``shape_about``; about-6.8B is that too, where 6.8B is a preset.
    A checkpoint or a public model alone brings its own variant. Names are found in any case.

    Args:
        text: such as ``"diff_v1:6.8B"``, ``"softmax:11B"``, ``"diff_v2:shape.toml"``, ``"runs/my-model"``,
            ``"llama-3.2-1B"`` or ``"diff_v2:llama-3.2-1B"``.
        variant: that of a size alone. Default: a size alone is refused.
        group: query heads for each key/value head. Default: as the size says.

    Raises:
        ConfigError: an unknown variant, a size that is none of these, or a shape that cannot carry the variant.

    Source: V2's width is that of ``match_parameters``.

    >>> model = parse_model("softmax:11B")
    >>> model.attention, model.shape == shape_about(11e9)
    ('softmax', True)
    >>> parse_model("DIFF_V1:6,8b").name, parse_model("6.8B", variant="diff_v1").name
    ('diff_v1:6.8B', 'diff_v1:6.8B')
    """
    text = text.strip()
    if os.path.exists(text) and not text.endswith(".toml"):
        _check_own(text, group)
        found = read_checkpoint(text)
        return Model(_file_name(text), found.attention, found.shape, found.shape, text, found.left_out, found.said)
    name, colon, size = (part.strip() for part in text.partition(":"))
    if not colon:
        if is_public(text) or not _is_size(text):
            _check_own(text, group)
            return _public(text)
        if variant is None:
            raise ConfigError(
                f"model {short(text)}",
                "a variant and a size, such as diff_v1:6.8B or softmax:11B, a public model or a checkpoint's folder",
                f"put one of {', '.join(VARIANTS)} and a colon before it, or check the path",
            )
        name, size = variant, text
    attention = one_of(name, VARIANTS, given=f"model {short(text)}")
    shape, called = _shape(size, group)
    shape.check_variant(attention)
    return Model(f"{attention}:{called}", attention, shape, match_parameters(shape, attention), text)


def named(model: str | Model | None, against: str | Model | None, group: int | None = None) -> list[Model]:
    """Returns the one or two models of a plan; two that have one name are called as they were written.

    ``group`` is that of ``parse_model``, for those that are not parsed yet.

    Raises:
        ConfigError: what ``parse_model`` raises.

    >>> [model.name for model in named(None, None)], [model.name for model in named("3M", None)]
    (['diff_v1:6.8B', 'softmax:11B'], ['diff_v1:3M'])
    """
    if model is None and against is None:
        against = PAIR[1]
    found = [
        parse_model(each, variant=each_variant, group=group) if isinstance(each, str) else each
        for each, each_variant in ((PAIR[0] if model is None else model, DEFAULT), (against, BASELINE))
        if each is not None
    ]
    if len(found) > 1 and found[0].name == found[1].name and found[0].built != found[1].built:
        found = [replace(each, name=each.given or each.name) for each in found]
    return found


def load_shape(name_or_path: str | Path) -> ModelShape:
    """Returns a shape by the name of a preset, or by the path of a TOML file, a checkpoint's folder or its config.json.

    A preset's name wins over a file's.

    Raises:
        ConfigError: neither a preset nor a file; or what ``ModelShape.from_toml`` and ``read_checkpoint`` raise.

    >>> load_shape("3M") == ModelShape.preset("3M")
    True
    """
    text = str(name_or_path)
    if text not in presets():
        if text.endswith(".json") or os.path.isdir(text):
            return _twin(read_checkpoint(text).shape, text).plain()
        if text.endswith(".toml") or os.path.isfile(text):
            return ModelShape.from_toml(text)
    return ModelShape.preset(text)


def _public(text: str) -> Model:
    """Returns a public model by its name alone."""
    try:
        record = find_public(text, given=f"model {short(text)}")
    except ConfigError as error:
        if not error.wanted.startswith("one of"):
            raise
        # A list of all names would be longer than a screen, and docs/plan.md has it.
        raise ConfigError(
            error.given,
            "a variant and a size, such as diff_v1:6.8B or softmax:11B, a public model such as llama-3.2-1B, or a "
            "checkpoint's folder",
            error.way_out
            if error.way_out.startswith("did you mean")
            else f"put one of {', '.join(VARIANTS)} and a colon before a size, or check the name or the path",
        ) from None
    found = record.planned()
    return Model(record.name, found.attention, found.shape, found.shape, text, said=found.said)


def _is_size(text: str) -> bool:
    if text.endswith(".toml"):
        return True
    try:
        parse_count(text.removeprefix("about-"))
    except ConfigError:
        return False
    return True


def _shape(size: str, group: int | None) -> tuple[ModelShape, str]:
    """Returns the shape of a size with so many query heads for each key/value head, and the size's name."""
    check_group(group)
    if size in presets():
        shape, called = ModelShape.preset(size), size
    elif size.endswith(".toml"):
        shape, called = ModelShape.from_toml(size), _file_name(size)
    elif size and os.path.exists(size):
        shape, called = _twin(read_checkpoint(size).shape, _file_name(size)), _file_name(size)
    elif is_public(size):
        record = find_public(size, given=f"size {short(size)}")
        shape, called = _twin(record.planned().shape, record.name), record.name
    else:
        shape, called = _counted(size, group)
    return shape.grouped(group), called if group is None else f"{called} (group {group})"


def _counted(size: str, group: int | None) -> tuple[ModelShape, str]:
    about = size.removeprefix("about-")
    count = whole(about, COUNTS)
    if count is None:
        known = {plain(name): name for name in public_models()}
        raise ConfigError(
            f"size {short(size)}, and there is no such file",
            f"a preset ({', '.join(presets())}), a .toml file, a checkpoint's folder, a public model or a count such "
            "as 11B",
            did_you_mean(plain(size), known, otherwise="check the path or the number"),
        )
    if about == size and (preset := find_preset(about)):
        return ModelShape.preset(preset), preset
    return shape_about(count, group=group or 1), size


def _twin(shape: ModelShape, name: str) -> ModelShape:
    """Returns the shape that another variant takes from a model: its sizes and its windows.

    Raises:
        ConfigError: a model whose layers differ, of which a variant would be another model.
    """
    if isinstance(shape, BlockShape):
        raise ConfigError(
            f"a variant of {name}, which is no plain decoder with a gated feed-forward network in every layer",
            f"{name} alone, or a variant of a size",
            f"write {name} without a variant and a colon",
        )
    return replace(shape, extras=()) if isinstance(shape, BuiltShape) and shape.window else shape.plain()


def _check_own(text: str, group: int | None) -> None:
    """Raises where the heads of a model that is there are to be other ones."""
    if group is not None:
        raise ConfigError(f"group {group} beside the model {short(text)}", "the heads that it has", "leave out --group")


def _file_name(path: str) -> str:
    """Returns the name of a model in a file: that of its folder, where the file is a config.json."""
    name = os.path.basename(os.path.abspath(path))
    return folder_name(os.path.dirname(os.path.abspath(path)) if name == "config.json" else os.path.abspath(path))
