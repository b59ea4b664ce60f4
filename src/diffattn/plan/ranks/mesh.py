"""The layout of ranks: copies of the model, shares of its weights, and ranks that compute one layer together."""

from __future__ import annotations

from typing import NamedTuple

from diffattn.errors import ConfigError

WAYS = ("none", "full", "hybrid")


class Mesh(NamedTuple):
    """The sizes of the three dimensions, which multiply to the number of ranks."""

    replicate: int
    """Copies of the weights, of which each takes other blocks."""
    shard: int
    """Ranks that share one copy of the weights, and take other blocks as well."""
    tensor: int
    """Ranks that compute each layer together, on the same blocks."""

    @property
    def data(self) -> int:
        """The number of parts into which each global batch is split."""
        return self.replicate * self.shard


def mesh_sizes(world: int, *, shard: str, tensor: int = 1, per_host: int | None = None) -> Mesh:
    """Returns the sizes of the mesh of all ranks for one way of sharding.

    Args:
        world: the number of ranks.
        shard: ``"full"``: weights, gradients and optimizer are shared out over all ranks. ``"hybrid"``: over the ranks
            of a host, and each host has a copy. ``"none"``: each rank has a copy.
        tensor: the number of ranks that compute one layer together.
        per_host: the number of ranks on each host, which ``"hybrid"`` needs. Default: all ranks are on one.

    Raises:
        ConfigError: an unknown way, or numbers that do not divide each other.

    >>> mesh_sizes(16, shard="hybrid", tensor=2, per_host=8)
    Mesh(replicate=2, shard=4, tensor=2)
    """
    per_host = world if per_host is None else per_host
    if shard not in WAYS:
        raise ConfigError(f"shard={shard!r}", "none, full or hybrid", "correct the name")
    if tensor < 1 or world % tensor:
        raise ConfigError(
            f"tensor parallelism over {tensor} ranks of {world}",
            "a number that divides the number of ranks",
            f"take one of {', '.join(str(size) for size in range(1, world + 1) if world % size == 0)}",
        )
    if shard != "hybrid":
        data = world // tensor
        return Mesh(1, data, tensor) if shard == "full" else Mesh(data, 1, tensor)
    if per_host < 1 or world % per_host or per_host % tensor:
        raise ConfigError(
            f"shard='hybrid' with {world} ranks, {per_host} on each host and {tensor} for each layer",
            "the same number of ranks on each host, which the ranks of a layer divide",
            "take shard='full', or another number of ranks",
        )
    return Mesh(world // per_host, per_host // tensor, tensor)
