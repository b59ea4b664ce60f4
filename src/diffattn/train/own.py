"""Reads the options that a run was started with from its folder, so that it continues from any working directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffattn.config_fields import is_count
from diffattn.data.sources import lasting, sources_of
from diffattn.data.text import open_text, text_digest
from diffattn.errors import CheckpointError, ConfigError, one_line
from diffattn.folders import RUN, own_folder
from diffattn.plan.shape import ModelShape
from diffattn.sealed import read_sealed
from diffattn.train.checkpoints.sealing import WAY_OUT, check_form, checkpoints
from diffattn.train.options import TrainOptions
from diffattn.train.recipe import Recipe
from diffattn.train.spread.layout import Layout


@dataclass(frozen=True)
class Own:
    """The options of a run, either of a shape or of an existing model that is trained further."""

    recipe: Recipe
    attention: str
    text: tuple[str, ...]
    context: int
    data_digest: str
    text_column: str = "text"
    tokenizer: Path | None = None
    """The folder of a tokenizer that was given for a shape."""
    lossy_tokenizer: bool = False
    chat_template: str | None = None
    """The chat template that was given for the tokenizer."""
    track: tuple[str, ...] = TrainOptions.track
    layout: Layout = field(default_factory=Layout)
    """The way it was spread over ranks and computed, which the ranks that go on with it may change."""
    shape: ModelShape | None = None
    """The shape; None, like ``match``, if the run has a source or an earlier version of diffattn did not keep it."""
    match: str | None = None
    source: Path | None = None
    """The folder of the model that the run started from, instead of a shape."""
    source_digest: str | None = None
    """The digest of that model's weights."""


def read_own(folder: Path) -> Own:
    """Reads the options of a run.

    Raises:
        ConfigError: there is no run, but perhaps something else.
        CheckpointError: its ``config.json`` is damaged, or was changed after it was written; or an earlier version of
            diffattn wrote its checkpoints.
    """
    check_resumable(folder, resume=True)
    file = own_folder(folder, RUN) / "config.json"
    # Of a finished run no checkpoint is read.
    for _, checkpoint in [] if (folder / "result.json").exists() else checkpoints(folder):
        check_form(checkpoint)
    config = read_sealed(file, way_out=WAY_OUT)
    try:
        source, data = config.get("source"), config["data"]
        options = config.get("options", {"text": data["name"], "context": data["context"]})
        column = options.get("text_column", "text")
        lossy, tokenizer = options.get("lossy_tokenizer", False), options.get("tokenizer")
        template = options.get("chat_template")
        # An earlier version of diffattn kept the name of its one text.
        text = (options["text"],) if isinstance(options["text"], str) else tuple(options["text"])
        track = tuple(options.get("track", TrainOptions.track))
        texts = [*text, data["digest"], config["model"]["attention"], column, *track]
        texts += [source["folder"], source["digest"]] if source else []
        if (
            not all(isinstance(text, str) for text in texts)
            or not is_count(options["context"])
            or not isinstance(lossy, bool)
            or not isinstance(template, str | None)
        ):
            raise TypeError("a name is no text, or a number is none")
        return Own(
            recipe=Recipe(**config["recipe"]),
            attention=config["model"]["attention"],
            text=text,
            context=options["context"],
            data_digest=data["digest"],
            text_column=column,
            tokenizer=Path(tokenizer) if tokenizer is not None else None,
            lossy_tokenizer=lossy,
            chat_template=template,
            track=track,
            layout=Layout(**options.get("layout", {})),
            shape=ModelShape(**options["shape"]) if "shape" in options else None,
            match=options.get("match"),
            source=Path(source["folder"]) if source else None,
            source_digest=source["digest"] if source else None,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is damaged, or another command wrote it ({one_line(error)})", "the options of a run", WAY_OUT
        ) from None


def check_resumable(out: str | Path, resume: bool) -> None:
    """Raises if a run is to be resumed and there is none."""
    if resume and not (Path(out) / "config.json").exists():
        raise ConfigError(f"{out} holds no run to resume", "its config.json", "name the run's folder with --out")


def to_keep(
    text: str | Path | Sequence[str | Path],
    context: int,
    text_column: str,
    *,
    shape: ModelShape | None = None,
    **others: object,
) -> dict[str, object]:
    """Returns the ``options`` of ``config.json``, with which :func:`read_own` lets the run continue."""
    kept: dict[str, object] = {"text": lasting(text), "context": context, "text_column": text_column, **others}
    return kept if shape is None else kept | {"shape": dataclasses.asdict(shape)}


def same_text(
    given: str | Path | Sequence[str | Path],
    own: str | Path | Sequence[str | Path],
    digest: str,
    text_column: str,
) -> bool:
    """Returns whether a text is that of a run: it has the same names, or other paths and the same content; and the same
    weights."""
    weights = [[source.weight for source in sources_of(text)] for text in (given, own)]
    if weights[0] != weights[1]:
        return False
    return lasting(given) == lasting(own) or text_digest(open_text(given, text_column=text_column)) == digest


def same_shape(one: ModelShape, other: ModelShape) -> bool:
    """Returns whether two shapes are equal except for their names."""
    unnamed = [dataclasses.replace(shape, name="", source="") for shape in (one, other)]
    return unnamed[0] == unnamed[1]
