"""Reads a checkpoint into a model and its optimizer, on any number of ranks and however they share the weights out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, HuggingFaceStorageReader, Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from diffattn.errors import CheckpointError
from diffattn.files import read_object
from diffattn.train.checkpoints.sealing import WAY_OUT
from diffattn.train.checkpoints.state import (
    RANDOM,
    STATE,
    rank_and_world,
    set_random_state,
    shard_name,
    tensors_of,
)


def load(
    checkpoint: Path, model: nn.Module, optimizer: Optimizer | None = None, *, scheduler: LRScheduler | None = None
) -> None:
    """Reads a checkpoint without defect into a model, its optimizer and the schedule of its learning rate, in place.

    Each rank reads what it holds, and none waits for another. The number of ranks that wrote it does not matter.

    Args:
        checkpoint: the folder.
        model: the model, whole on each rank or shared out.
        optimizer: its optimizer, not the wrapper of another library. Default: the model alone is read.
        scheduler: the schedule of the learning rate.

    Raises:
        CheckpointError: a checkpoint of another model; the message names the first difference.
    """
    tensors = tensors_of(model, optimizer)
    reader = HuggingFaceStorageReader(str(checkpoint))
    metadata = reader.read_metadata()
    _check_same_model(checkpoint, metadata, tensors, whole=optimizer is not None)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(tensors, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    with torch.no_grad():
        reader.read_data(planner.create_local_plan(), planner).wait()
    state = read_object(checkpoint / STATE, way_out=WAY_OUT)
    if optimizer is not None:
        for group, settings in zip(optimizer.param_groups, state["optimizer"], strict=True):
            # JSON has no tuples.
            group.update({name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})
    if scheduler is not None:
        scheduler.load_state_dict(state["schedule"])


def load_random_state(checkpoint: Path, device: torch.device) -> None:
    """Sets the random numbers of this process to what they were in the rank of the same number.

    A rank of a number that the checkpoint does not know keeps the random numbers that it began with. Our training draws
    none, so the losses are the same on any number of ranks.
    """
    ranks: Any = read_object(checkpoint / STATE, way_out=WAY_OUT)["ranks"]
    file = checkpoint / shard_name(rank_and_world()[0], ranks)
    if file.is_file():
        with safe_open(file, framework="pt") as shard:
            set_random_state(shard.metadata()[RANDOM], device)


def _check_same_model(checkpoint: Path, metadata: Metadata, tensors: dict[str, Tensor], *, whole: bool) -> None:
    """Raises unless the checkpoint has exactly these tensors; of the model alone where it is not ``whole``."""
    held = {
        name: facts
        for name, facts in metadata.state_dict_metadata.items()
        if isinstance(facts, TensorStorageMetadata) and (whole or name.startswith("model."))
    }
    for name in sorted(held.keys() | tensors.keys()):
        there, here = "missing", "unknown"
        if name in held:
            there = _facts(held[name].size, held[name].properties.dtype)
        if name in tensors:
            here = _facts(tensors[name].shape, tensors[name].dtype)
        if there != here:
            raise CheckpointError(
                f"{checkpoint} is of another model: {name} is {there} in it, and {here} in this model",
                "a checkpoint of the same model",
                WAY_OUT,
            )


def _facts(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{'×'.join(map(str, shape)) or 'a number'} of {str(dtype).removeprefix('torch.')}"
