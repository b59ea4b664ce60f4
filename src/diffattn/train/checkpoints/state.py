"""The state of a run as a checkpoint keeps it: tensors by name, and the rest as JSON.

A tensor is named after its place: ``model.NAME`` is a weight, and ``optimizer.NAME.exp_avg`` is what the optimizer
knows of that weight. The names and the shapes are those of one process, however many ranks share the tensors out.
"""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

STATE = "state.json"
"""The file with what is no tensor: the number of ranks, the settings of the optimizer, the state of the schedule."""
TRAINER = "trainer_state.json"
"""The file with the state of the Trainer, under the name by which the library looks for it."""
SHARDING = "DCP_SHARDING_INFO"
"""The entry of a file's header by which ``torch.distributed.checkpoint`` knows which part of a tensor it holds."""
RANDOM = "random"
"""The entry of a file's header with the state of the random numbers of the rank that wrote the file."""


def rank_and_world() -> tuple[int, int]:
    """Returns the number of this rank and the number of all; 0 and 1 without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def shard_name(rank: int, world: int) -> str:
    """Returns the name of the file that a rank writes.

    >>> shard_name(0, 2)
    'shard-1-of-2.safetensors'
    """
    return f"shard-{rank + 1}-of-{world}.safetensors"


def tensors_of(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Returns the tensors of a model and of its optimizer by name; what is written into them, the two have.

    Each rank names the same tensors; of one that is shared out it holds its own part. A weight that a model has under
    two names is there once. An optimizer that has made no step is prepared for its first.
    """
    # This comes first: it makes FSDP2 give up the whole weights that it may still hold from a measurement.
    state = model.state_dict()
    once = dict(model.named_parameters())
    twice = dict(model.named_parameters(remove_duplicate=False)).keys() - once.keys()
    found = {f"model.{name}": value for name, value in state.items() if name not in twice}
    if optimizer is not None:
        known: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
        for name, values in known["state"].items():
            found |= {f"optimizer.{name}.{key}": value for key, value in values.items()}
    return found


def own_part(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that is on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Returns the settings of each group of an optimizer's weights, which are numbers and words."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def random_state(device: torch.device) -> str:
    """Returns the states of this process's random numbers, as JSON."""
    kind, words, *rest = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(words).tolist(), *rest],
        "torch": _text(torch.get_rng_state()),
    }
    if device.type == "cuda":
        states["cuda"] = _text(torch.cuda.get_rng_state(device))
    return json.dumps(states)


def set_random_state(text: str, device: torch.device) -> None:
    """Sets the random numbers of this process to the states that :func:`random_state` returned."""
    states = json.loads(text)
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(_bytes(states["torch"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_bytes(states["cuda"]), device)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
