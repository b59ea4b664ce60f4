"""The options of how a run is spread over processes and computed, in a file that imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from diffattn.errors import ConfigError
from diffattn.plan.ranks.mesh import WAYS


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The way a run is spread over ranks and computed; it changes no result, so a run may be resumed in another.

    Raises:
        ConfigError: an unknown way, or a number below 1.
    """

    shard: str = field(default="none", metadata={"choices": WAYS})
    """Way to spread the model over the processes that torchrun has started. none: each has a copy. full: they share
    out weights, gradients and optimizer (FSDP2). hybrid: those of a host share them out, each host has a copy."""
    tensor_parallel: int = field(default=1, metadata={"option": "tp"})
    """Number of processes that compute each layer together, on parts of its heads; it divides the key/value heads."""
    checkpointing: bool = False
    """Save memory by computing each layer again in the backward pass, in place of keeping what is inside it."""
    compile: bool = False
    """Compile each layer with torch.compile: slower to start, then faster on a GPU."""

    def __post_init__(self) -> None:
        if self.shard not in WAYS:
            raise ConfigError(f"shard is {self.shard!r}", f"one of {', '.join(WAYS)}", "change --shard")
        if self.tensor_parallel < 1:
            raise ConfigError(f"tp is {self.tensor_parallel}", "at least 1", "leave --tp out")

    def check(self, world: int, batch_size: int) -> None:
        """Raises unless so many ranks can be laid out like this, and share out each batch.

        Args:
            world: the number of ranks.
            batch_size: blocks in each forward pass, of all ranks together.

        >>> Layout(tensor_parallel=2).check(4, batch_size=4)
        """
        if world == 1 and (self.shard != "none" or self.tensor_parallel > 1):
            given = f"--shard {self.shard}" if self.shard != "none" else f"--tp {self.tensor_parallel}"
            raise ConfigError(
                f"{given} in one process",
                "several ranks",
                f"start them with torchrun --nproc-per-node N -m diffattn, or leave {given.split()[0]} out",
            )
        if world % self.tensor_parallel:
            raise ConfigError(
                f"--tp {self.tensor_parallel} on {world} ranks",
                "a number that divides the ranks",
                "change --tp, or the number of ranks",
            )
        parts = world // self.tensor_parallel
        if batch_size % parts:
            behind = f" (of {world}, {self.tensor_parallel} to a layer)" if self.tensor_parallel > 1 else ""
            raise ConfigError(
                f"batch_size is {batch_size} on {parts} ranks{behind}",
                "a batch that all ranks share equally: --batch-size counts the blocks of all ranks together",
                f"take --batch-size {-(-batch_size // parts) * parts}, or another number of ranks",
            )

    def going_on(self, world: int) -> Layout:
        """Returns the layout in which a run of this one goes on with so many ranks, where no other is asked for.

        >>> Layout(shard="full", checkpointing=True).going_on(1)
        Layout(shard='none', tensor_parallel=1, checkpointing=True, compile=False)
        """
        return self if world > 1 else dataclasses.replace(self, shard="none", tensor_parallel=1)

    def to_dict(self) -> dict[str, object]:
        """Returns all fields, for ``config.json``."""
        return dataclasses.asdict(self)
