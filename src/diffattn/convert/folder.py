"""A checkpoint folder read without a copy of its weights, and one written whole.

A folder is what ``save_pretrained`` of ``transformers`` writes: ``config.json``, ``model.safetensors`` or an index with
its shards, and the files of a tokenizer. No pickle is opened and no program of the folder's is run.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from diffattn.checkpoint_files import (
    CONFIG,
    TOKENIZERS,
    check_finite,
    companions,
    copy_companions,
    read_config,
    read_tensors,
)
from diffattn.convert.layout import check_shapes, shapes_of
from diffattn.errors import CheckpointError, ConfigError
from diffattn.files import whole_folder, write_json
from diffattn.folders import own_folder


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds. ``tensors`` are mapped from its files: they take memory only as they are read."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    copied: tuple[Path, ...]

    @property
    def has_tokenizer(self) -> bool:
        return any(path.name in TOKENIZERS for path in self.copied)


def read_folder(folder: str | Path) -> Checkpoint:
    """Read a checkpoint folder; the header of every file is checked against the file before a weight is touched.

    Raises:
        CheckpointError: no such folder, no config.json or none that is a JSON object, weights that are missing, cut
            off, damaged, pickles, or not finite numbers.

    >>> read_folder("absent")
    Traceback (most recent call last):
    diffattn.errors.CheckpointError: 'absent' given; the folder of a checkpoint is wanted; there is none: check the path
    """
    folder = Path(folder)
    config = read_config(folder)
    entries = read_tensors(folder)
    check_finite(entries)
    tensors: dict[str, Tensor] = {}
    for path in sorted({entry["file"] for entry in entries.values()}):
        try:
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        # A type of number that the file format has and torch has not.
        except (SafetensorError, AttributeError, KeyError, OSError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{str(path)!r} cannot be read: {reason}; copy or download it again") from error
    return Checkpoint(folder, config, tensors, tuple(companions(folder)))


def check_destination(source: str | Path, destination: str | Path) -> Path:
    """The folder to write, as an absolute path, once it is known that nothing is there.

    Raises:
        ConfigError: it is a file, holds something, or is the source or a folder inside the source.
    """
    target, origin = Path(destination).resolve(), Path(source).resolve()
    if target == origin or origin in target.parents:
        raise ConfigError(
            f"{str(destination)!r} is {str(source)!r} or lies inside it; a folder beside it is wanted: choose another"
        )
    own_folder(destination, option=None)
    return target


def check_loads(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise unless the model that ``transformers`` builds of the configuration has exactly these tensors.

    Built without storage, so it takes no memory; names and shapes are compared.
    """
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    wanted = shapes_of(parsed, lambda: AutoModelForCausalLM.from_config(parsed))
    check_shapes(wanted, tensors, parsed.model_type)


def write_folder(
    destination: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    copied: Sequence[Path] = (),
    max_shard_size: int | str = "5GB",
) -> int:
    """Write a checkpoint folder as ``save_pretrained`` does, whole or not at all.

    Args:
        destination: of :func:`check_destination`.
        config: the contents of ``config.json``.
        tensors: written in their dtype.
        copied: files to take along as they are.
        max_shard_size: of one safetensors file, in bytes or as ``"5GB"``; more are written with an index.

    Returns:
        The bytes of the weights.

    Raises:
        ConfigError: nothing can be written there.
        TrainingError: the disk is full.
    """
    try:
        with whole_folder(destination) as partial:
            copy_companions(copied, partial)
            save_torch_state_dict(dict(tensors), partial, max_shard_size=max_shard_size)
            write_json(partial / CONFIG, dict(config))
            # The library leaves out a tensor that shares its memory with another.
            written = {name: tuple(entry["shape"]) for name, entry in read_tensors(partial).items()}
            assert written == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    except OSError as error:
        raise ConfigError(f"cannot write {str(destination)!r}: {error.strerror}; choose another folder") from error
    return sum(tensor.nbytes for tensor in tensors.values())
