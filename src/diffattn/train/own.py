"""What a run folder says that its run was started with, so that it goes on from any working directory."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffattn.config_fields import is_count
from diffattn.data.text import read_corpus
from diffattn.errors import CheckpointError, ConfigError
from diffattn.folders import RUN, own_folder
from diffattn.plan.shape import ModelShape
from diffattn.sealed import read_sealed
from diffattn.train.checkpoint import WAY_OUT
from diffattn.train.recipe import Recipe


@dataclass(frozen=True)
class Own:
    """The options of a run: of a shape, or of a model that is trained on (``source``)."""

    recipe: Recipe
    attention: str
    text: str
    context: int
    data_digest: str
    text_column: str = "text"
    lossy_tokenizer: bool = False
    shape: ModelShape | None = None
    """None, as ``match``, with a source, and where an earlier version of diffattn did not keep it."""
    match: str | None = None
    source: Path | None = None
    """The model that it started from, in place of a shape."""
    source_digest: str | None = None


def read_own(folder: Path) -> Own:
    """The options of a run.

    Raises:
        ConfigError: there is no run, but perhaps something else.
        CheckpointError: its ``config.json`` is damaged, or was changed after it was written.
    """
    check_resumable(folder, resume=True)
    file = own_folder(folder, RUN) / "config.json"
    config = read_sealed(file, way_out=WAY_OUT)
    try:
        source, data = config.get("source"), config["data"]
        options = config.get("options", {"text": data["name"], "context": data["context"]})
        column = options.get("text_column", "text")
        lossy = options.get("lossy_tokenizer", False)
        texts = [options["text"], data["digest"], config["model"]["attention"], column]
        texts += [source["folder"], source["digest"]] if source else []
        if (
            not all(isinstance(text, str) for text in texts)
            or not is_count(options["context"])
            or not isinstance(lossy, bool)
        ):
            raise TypeError("a name is no text, or a number none")
        return Own(
            recipe=Recipe(**config["recipe"]),
            attention=config["model"]["attention"],
            text=options["text"],
            context=options["context"],
            data_digest=data["digest"],
            text_column=column,
            lossy_tokenizer=lossy,
            shape=ModelShape(**options["shape"]) if "shape" in options else None,
            match=options.get("match"),
            source=Path(source["folder"]) if source else None,
            source_digest=source["digest"] if source else None,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged, or of another command ({error}); {WAY_OUT}") from None


def check_resumable(out: str | Path, resume: bool) -> None:
    """Raise where a run is to be resumed and there is none."""
    if resume and not (Path(out) / "config.json").exists():
        raise ConfigError(f"{out} holds no run to resume; wanted its config.json: name its folder with --out")


def to_keep(text: str, context: int, text_column: str, **others: Any) -> dict[str, Any]:
    """The ``options`` of ``config.json``, of which :func:`read_own` makes what a run goes on with."""
    shape = others.pop("shape", None)
    kept = {"text": lasting(text), "context": context, "text_column": text_column} | others
    return kept if shape is None else kept | {"shape": dataclasses.asdict(shape)}


def lasting(text: str) -> str:
    """A text's name that means the same from any working directory.

    >>> lasting("sotu")
    'sotu'
    """
    path = Path(os.path.expanduser(text))
    return str(path.absolute()) if text not in ("", "sotu") and path.exists() else text


def same_text(given: str, own: str, digest: str, text_column: str) -> bool:
    """Whether a text is the one that a run has: of the same name, or another place with the same content."""
    return lasting(given) in (own, lasting(own)) or read_corpus(given, text_column=text_column).digest == digest


def same_shape(one: ModelShape, other: ModelShape) -> bool:
    """Whether two shapes are one but for their names."""
    unnamed = [dataclasses.replace(shape, name="", source="") for shape in (one, other)]
    return unnamed[0] == unnamed[1]
