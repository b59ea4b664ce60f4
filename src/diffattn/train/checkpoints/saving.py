"""Writes checkpoints of one or many ranks in the background: each rank writes its part, and rank 0 seals the whole.

The plan of who writes what is that of ``torch.distributed.checkpoint``, and its readers read the files. Its own
``async_save`` is not used: it plans anew for each checkpoint, copies what other ranks write too, and keeps its index in
a pickle.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from diffattn.errors import ConfigError, DiffattnError, TrainingError, one_line
from diffattn.files import FileFacts, explained, file_facts, sync, whole_folder, write_json
from diffattn.train.checkpoints.sealing import OF_THE_RUN, is_sealed, prune, seal
from diffattn.train.checkpoints.state import (
    RANDOM,
    SHARDING,
    STATE,
    random_state,
    rank_and_world,
    settings_of,
    shard_name,
    tensors_of,
)

PATIENCE = timedelta(minutes=30)
"""The time that a rank waits for the slowest to write its part."""
_T = TypeVar("_T")


class Saver:
    """Writes the checkpoints of a run in the background, at most one at a time.

    ``save`` copies what this rank has to write and returns; a thread writes it while the training goes on. All ranks
    make their Saver, and call ``save``, ``wait`` and ``close``, for the same steps. An error of the thread is raised by
    the next call of any of them. A checkpoint appears as ``checkpoint-STEP`` once every rank has written its part of
    it, with its seal, or not at all; older ones than the newest ``keep`` are removed then.

    Args:
        run: the folder of the run, which all ranks see.
        model: the model, whole on each rank or shared out.
        optimizer: its optimizer, not the wrapper of another library.
        scheduler: the schedule of the learning rate.
        keep: the number of checkpoints that are kept.
        patience: how long a rank waits for the slowest.
    """

    def __init__(
        self,
        run: Path,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scheduler: LRScheduler | None = None,
        keep: int = 1,
        patience: timedelta = PATIENCE,
    ) -> None:
        self.run = run
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.keep = keep
        self.rank, self.world = rank_and_world()
        # The thread talks to the other ranks while the training does; so it has a group of its own.
        self._group = distributed.new_group(backend="gloo", timeout=patience) if self.world > 1 else None
        self._plan: SavePlan | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, files: Mapping[str, object] | None = None) -> None:
        """Begins to write the checkpoint of a step; waits for the one before it.

        Args:
            step: the number of optimizer steps so far.
            files: other content of the checkpoint by the name of its file, to be written as JSON.

        Raises:
            TrainingError: the one before it could not be written.
        """
        self.wait()
        tensors, header = self._staged()
        of_run: dict[Path, int] = {}
        content: dict[str, object] = {}
        if self.rank == 0:
            found = [self.run / Path(name).name for name in OF_THE_RUN]
            of_run = {file: file.stat().st_size for file in found if file.is_file()}
            schedule = None if self.scheduler is None else self.scheduler.state_dict()
            content = {STATE: {"ranks": self.world, "optimizer": settings_of(self.optimizer), "schedule": schedule}}
            # They are turned into text now, since the training changes them.
            content = json.loads(json.dumps(content | dict(files or {})))
        self._writing = self._thread.submit(self._write, step, tensors, header, content, of_run)

    def wait(self) -> None:
        """Returns when the checkpoint that was begun is sealed; raises if it could not be written."""
        if self._writing is None:
            return
        try:
            self._writing.result()
        finally:
            # A signal may have ended the waiting before the writing.
            if self._writing.done():
                self._writing = None

    def check(self) -> None:
        """Raises if the checkpoint that was begun has failed already; never waits."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def close(self) -> None:
        """Waits as ``wait`` does, and ends the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _staged(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns copies of the tensors that this rank writes, and the header of its file."""
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(tensors_of(self.model, self.optimizer), is_coordinator=self.rank == 0)
        if self._plan is None:
            self._plan = self._planned(planner)
        tensors, offsets = {}, {}
        for item in self._plan.items:
            assert item.tensor_data is not None
            name, part = item.index.fqn, planner.resolve_data(item)
            assert isinstance(part, Tensor)
            tensors[name] = part.detach().to("cpu", copy=True).contiguous()
            offsets[name] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        device = next(self.model.parameters()).device
        return tensors, {SHARDING: json.dumps(offsets), RANDOM: random_state(device), "format": "pt"}

    def _planned(self, planner: DefaultSavePlanner) -> SavePlan:
        """Returns what this rank writes; of what several ranks have, each writes a part."""
        plans = self._of_all(planner.create_local_plan)
        # Each rank makes the whole plan from the same parts, so that nothing has to be sent back.
        return planner.create_global_plan(plans)[0][self.rank]

    def _write(
        self,
        step: int,
        tensors: dict[str, Tensor],
        header: dict[str, str],
        content: dict[str, object],
        of_run: dict[Path, int],
    ) -> None:
        """Is what the thread does: writes this rank's part of a checkpoint, and on rank 0 seals all parts."""
        target = self.run / f"checkpoint-{step}"
        with contextlib.ExitStack() as stack:
            first = self.rank == 0
            folder = self._of_all(
                lambda: stack.enter_context(whole_folder(target, replaces=is_sealed)) if first else None
            )[0]
            assert folder is not None
            name = shard_name(self.rank, self.world)
            facts = self._of_all(lambda: _write_part(folder, name, tensors, header, target))
            tensors.clear()

            def finish() -> None:
                with explained(target):
                    for name, values in content.items():
                        write_json(folder / name, values)
                    known = dict(zip((shard_name(rank, self.world) for rank in range(self.world)), facts, strict=True))
                    for file, size in of_run.items():
                        # A checkpoint that outlives a power cut is of no use without the rows up to it.
                        sync(file)
                        known[f"../{file.name}"] = file_facts(file, size)
                    seal(folder, known)
                stack.close()
                prune(self.run, self.keep)

            self._of_all(lambda: finish() if first else None)

    def _of_all(self, act: Callable[[], _T]) -> list[_T]:
        """Does something on each rank and returns what each returned; an error of one is raised by all."""
        if self._group is None:
            return [act()]
        value, failure, told = None, None, None
        try:
            value = act()
        except Exception as error:
            failure, told = error, error if isinstance(error, DiffattnError) else one_line(error)
        said: list[Any] = [None] * self.world
        try:
            distributed.all_gather_object(said, (value, told), group=self._group)
        # PyTorch has no type for a rank that is gone or late.
        except RuntimeError as error:
            raise failure or TrainingError(
                f"a checkpoint could not be completed: a rank has ended, or was too slow ({one_line(error, 200)})",
                "all ranks until it is sealed",
                "continue with --resume; what was saved before is kept",
            ) from error
        if failure is not None:
            raise failure
        for rank, (_, told) in enumerate(said):
            if isinstance(told, DiffattnError):
                raise told
            if told is not None:
                raise TrainingError(
                    f"rank {rank} could not write its part of a checkpoint ({told})",
                    "a part from every rank",
                    "mend that, and continue with --resume; what was saved before is kept",
                )
        return [value for value, _ in said]


def _write_part(folder: Path, name: str, tensors: dict[str, Tensor], header: dict[str, str], target: Path) -> FileFacts:
    if not folder.is_dir():
        raise ConfigError(
            f"{socket.gethostname()} does not see the folder {folder} that rank 0 made",
            "a folder on a file system that all hosts share",
            "choose one with --out",
        )
    with explained(target):
        save_file(tensors, folder / name, header)
        # The disk of another host is flushed there alone.
        sync(folder / name)
        return file_facts(folder / name)
