"""Reads a checkpoint folder without a copy of its weights, and writes one that is whole or not there.

A folder is what ``save_pretrained`` of ``transformers`` writes: ``config.json``, ``model.safetensors`` or an index with
its shards, and the files of a tokenizer. No pickle is opened and no program of the folder's is run.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from diffattn.checkpoint_files import (
    CHAT_TEMPLATE,
    CONFIG,
    TOKENIZERS,
    check_finite,
    companions,
    copy_companions,
    read_config,
    read_tensors,
)
from diffattn.config_fields import Config
from diffattn.convert.layout import Tensors, check_shapes, shapes_of
from diffattn.errors import CheckpointError, ConfigError, one_line
from diffattn.files import whole_folder, write_json, write_text
from diffattn.folders import own_folder


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint folder."""

    folder: Path
    config: Config
    """The content of ``config.json``."""
    tensors: Tensors
    """The weights by name, mapped from the files: they take memory only as they are read."""
    copied: tuple[Path, ...]
    """The files that a conversion copies as they are, such as those of the tokenizer."""
    notes: tuple[str, ...] = ()
    """Words for what was done to read it, where that is more than reading."""
    merged: bool = False
    """True where an adapter was merged into the weights."""

    @property
    def has_tokenizer(self) -> bool:
        return any(path.name in TOKENIZERS for path in self.copied)


def read_folder(folder: str | Path) -> Checkpoint:
    """Reads a checkpoint folder; the header of every file is checked against the file before any weight is read.

    Raises:
        CheckpointError: no such folder, no config.json or none that is a JSON object, weights that are missing, cut
            off, damaged, pickles, or not finite numbers.

    >>> read_folder("absent")
    Traceback (most recent call last):
    diffattn.errors.CheckpointError: there is no folder 'absent'; wanted the folder of a checkpoint: check the path
    """
    folder = Path(folder)
    config = read_config(folder)
    entries = read_tensors(folder)
    check_finite(entries)
    tensors = mapped(sorted({entry["file"] for entry in entries.values()}))
    return Checkpoint(folder, config, tensors, tuple(companions(folder)))


def mapped(files: Sequence[Path]) -> Tensors:
    """Returns the tensors of files of safetensors by name; they take memory only as they are read.

    Raises:
        CheckpointError: a file that cannot be read, or a type of numbers that torch does not have.
    """
    tensors: Tensors = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        # AttributeError and KeyError: the format has types of numbers that torch does not have.
        except (SafetensorError, AttributeError, KeyError, OSError) as error:
            raise CheckpointError(
                f"{str(path)!r} cannot be read ({one_line(error)})",
                "a file of safetensors that torch can hold",
                "copy or download it again",
            ) from error
    return tensors


def check_destination(source: str | Path, destination: str | Path) -> Path:
    """Returns the folder to write as an absolute path, after checking that nothing is there.

    Raises:
        ConfigError: it is a file, holds something, or is the source or a folder inside the source.
    """
    target, origin = Path(destination).resolve(), Path(source).resolve()
    if target == origin or origin in target.parents:
        raise ConfigError(
            f"{str(destination)!r} is {str(source)!r} or lies inside it",
            "a folder beside the source",
            "choose another folder",
        )
    own_folder(destination, option=None)
    return target


def check_loads(config: Config, tensors: Mapping[str, Tensor]) -> None:
    """Raises unless the model that ``transformers`` builds from the configuration has exactly these tensors.

    The model is built without storage, so it takes no memory; names and shapes are compared.
    """
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    wanted = shapes_of(parsed, lambda: AutoModelForCausalLM.from_config(parsed))
    check_shapes(wanted, tensors, parsed.model_type)


def write_folder(
    destination: Path,
    config: Config,
    tensors: Mapping[str, Tensor],
    copied: Sequence[Path] = (),
    max_shard_size: int | str = "5GB",
    chat_template: str | None = None,
) -> int:
    """Writes a checkpoint folder as ``save_pretrained`` does, whole or not at all.

    Args:
        destination: the folder that :func:`check_destination` returned.
        config: the content of ``config.json``.
        tensors: the weights by name; they are written in their dtype.
        copied: files to copy as they are.
        max_shard_size: the largest size of one safetensors file, in bytes or as ``"5GB"``; larger checkpoints are
            written as several files with an index.
        chat_template: the tokenizer's, in place of the one among the copied files.

    Returns:
        The bytes of the weights.

    Raises:
        ConfigError: nothing can be written there.
        TrainingError: the disk is full.
    """
    try:
        with whole_folder(destination) as partial:
            copy_companions(copied, partial)
            if chat_template is not None:
                write_text(partial / CHAT_TEMPLATE, chat_template)
            save_torch_state_dict(dict(tensors), partial, max_shard_size=max_shard_size)
            write_json(partial / CONFIG, dict(config))
            # The library leaves out a tensor that shares its memory with another.
            written = {name: tuple(entry["shape"]) for name, entry in read_tensors(partial).items()}
            assert written == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    except OSError as error:
        raise ConfigError(
            f"cannot write {str(destination)!r} ({error.strerror})",
            "a folder that can be written",
            "choose another folder",
        ) from error
    return sum(tensor.nbytes for tensor in tensors.values())
