"""Short trainings on ranks that save checkpoints and go on from them: what the tests of checkpoints on ranks call."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.small_run import SHAPE
from support.trained_ranks import HEADS
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from diffattn.model.pairing import build_pair
from diffattn.model.sharding import data_ranks, mesh_for, shard
from diffattn.train.checkpoints import saving
from diffattn.train.checkpoints.loading import load, load_random_state
from diffattn.train.checkpoints.saving import Saver
from diffattn.train.checkpoints.state import rank_and_world, tensors_of

BATCH, STEPS, SAVED = 4, 6, 3


class Training:
    """A model, AdamW and a schedule, spread in one way: ``one``, ``ddp``, ``full`` or ``tensor`` (2, with FSDP2)."""

    def __init__(self, way: str, attention: str = "diff_v1") -> None:
        self.model = build_pair(HEADS, attention, seed=0).model
        self.forward: nn.Module = self.model
        self.part, self.parts = 0, 1
        if way != "one" and not distributed.is_initialized():
            distributed.init_process_group("gloo")
        if way == "ddp":
            self.part, self.parts = rank_and_world()
            self.forward = DistributedDataParallel(self.model)
        elif way != "one":
            world = distributed.get_world_size()
            mesh = mesh_for(world, shard="full", tensor=2 if way == "tensor" else 1, device="cpu")
            shard(self.model, mesh)
            self.part, self.parts = data_ranks(mesh)
        groups = [
            {"params": [weight for weight in self.model.parameters() if (weight.ndim >= 2) == decays],
             "weight_decay": 0.1 * decays}
            for decays in (True, False)
        ]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.done = 0

    def saver(self, run: Path, **options: Any) -> Saver:
        return Saver(run, self.model, self.optimizer, scheduler=self.scheduler, **options)

    def load(self, checkpoint: Path) -> None:
        load(checkpoint, self.model, self.optimizer, scheduler=self.scheduler)
        load_random_state(checkpoint, torch.device("cpu"))
        self.done = int(checkpoint.name.split("-")[1])

    def step(self) -> float:
        """One step on this rank's part of the batch; gives the loss of the whole batch."""
        generator = torch.Generator().manual_seed(self.done)
        ids = torch.randint(SHAPE.vocab_size, (BATCH, 32), generator=generator).chunk(self.parts)[self.part]
        loss = self.forward(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.done += 1
        total = loss.detach().clone()
        if rank_and_world()[1] > 1:
            distributed.all_reduce(total)
            total /= rank_and_world()[1]
        return total.item()

    def state(self) -> dict[str, str]:
        """The hash of every tensor of the state as a whole."""
        tensors = tensors_of(self.model, self.optimizer)
        return {
            name: digest(value.full_tensor() if isinstance(value, DTensor) else value)
            for name, value in tensors.items()
        }


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()[:8]


def train_and_save(run: Path, way: str) -> tuple[list[float], dict[str, str]]:
    """All steps, with a checkpoint on the way; gives the losses, and the state that was saved."""
    training = Training(way)
    saver = training.saver(run)
    losses: list[float] = []
    state: dict[str, str] = {}
    for step in range(1, STEPS + 1):
        losses.append(training.step())
        if step == SAVED:
            # As a measurement of the held-out loss does, which leaves weights whole under FSDP2.
            with torch.no_grad():
                ids = torch.zeros((1, 4), dtype=torch.int64)
                training.forward(input_ids=ids, labels=ids)
            saver.save(step)
            state = training.state()
    saver.close()
    return losses, state


def go_on(checkpoint: Path, ways: list[str]) -> dict[str, tuple[list[float], dict[str, str]]]:
    """The steps behind a checkpoint, in each way; gives the losses, and the state that was loaded."""
    found = {}
    for way in ways:
        training = Training(way)
        training.load(checkpoint)
        state = training.state()
        found[way] = ([training.step() for _ in range(SAVED, STEPS)], state)
    return found


def fail_in_second_save(run: Path, point: str) -> str:
    """Two checkpoints, the second of which fails as ``point`` says; gives what this rank's error says."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    training = Training("full")
    saver = training.saver(run)
    training.step()
    saver.save(1)
    saver.wait()
    training.step()
    rank, act = FAILURES[point]
    if rank_and_world()[0] == rank:
        act()
    try:
        saver.save(2)
        saver.close()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _die(*args: object, **kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _refused(*args: object, **kwargs: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def _replaced(name: str, by: Callable[..., object]) -> Callable[[], None]:
    return lambda: setattr(saving, name, by)


def _blind() -> None:
    Path.is_dir = lambda self, **options: False  # type: ignore[method-assign]


# The rank that fails, and how.
FAILURES: dict[str, tuple[int, Callable[[], None]]] = {
    "rank 1 is killed": (1, _replaced("save_file", _die)),
    "rank 0 is killed before the manifest": (0, _replaced("seal", _die)),
    "the disk of rank 1 is full": (1, _replaced("save_file", _full)),
    "rank 1 may not write": (1, _replaced("save_file", _refused)),
    "rank 0 may not seal": (0, _replaced("seal", _refused)),
    "rank 1 does not see the folder": (1, _blind),
}
