"""The groups of tensors that FSDP2 gathers and reduces at once, as one rank has them: rows are cut, and filled up.

FSDP2 cuts each tensor along its rows into as many parts as there are ranks, all as large as the first. So a tensor
whose rows the ranks do not divide is longer once it is gathered. Tensor parallelism has cut it before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffattn.plan.ranks.mesh import Mesh
from diffattn.plan.shape import ModelShape
from diffattn.variants import VARIANTS


@dataclass(frozen=True)
class Group:
    """One group of parameters on one rank.

    >>> Group.of([(5, 4), (3,)], shard=2)
    Group(own=23, part=14, gathered=28, filled=28)
    """

    own: int
    """Numbers that the layer has on this rank once it is gathered: after tensor parallelism, without filling."""
    part: int
    """Numbers that the first rank keeps, which are the most."""
    gathered: int
    """Numbers of the buffer in which the parts of all ranks lie."""
    filled: int
    """Numbers of those tensors that have to be filled up, as long as they are then."""

    @classmethod
    def of(cls, tensors: list[tuple[int, ...]], *, shard: int, besides: int = 0) -> Group:
        """Makes a group of tensors of these shapes, and of further numbers that are cut evenly."""
        own = part = filled = 0
        for rows, *rest in tensors:
            width = math.prod(rest)
            kept = -(-rows // shard) * width
            own, part = own + rows * width, part + kept
            filled += kept * shard if rows % shard else 0
        more = -(-besides // shard)
        return cls(own + besides, part + more, (part + more) * shard, filled)


@dataclass(frozen=True)
class Groups:
    """All groups of a model: one for each layer, one for λ of each layer, and one for the rest."""

    layer: Group
    """The tensors of one layer."""
    exact: Group
    """Those of one layer that stay float32 whatever the dtype: V1's λ vectors."""
    root: Group
    """The embedding, the output head where it is not the embedding, and the last norm."""
    layers: int
    """The number of layers."""

    @property
    def part(self) -> int:
        """Numbers that the first rank keeps of all groups."""
        return self.layers * (self.layer.part + self.exact.part) + self.root.part


def local_shape(shape: ModelShape, tensor: int) -> ModelShape:
    """Returns the shape of what one of ``tensor`` ranks computes of each layer: a part of its heads and of its columns.

    >>> local_shape(ModelShape.preset("3M"), 2).num_heads
    3
    """
    sizes = vars(shape.plain()) | {
        "num_heads": shape.num_heads // tensor,
        "num_kv_heads": shape.num_kv_heads // tensor,
        "intermediate_size": -(-shape.intermediate_size // tensor),
    }
    return ModelShape(**sizes)


def groups_of(shape: ModelShape, attention: str, mesh: Mesh) -> Groups:
    """Returns the groups of a model on the first rank of a mesh.

    What a checkpoint has beside its shape is cut evenly.

    >>> found = groups_of(ModelShape.preset("3M"), "diff_v1", Mesh(1, 2, 1))
    >>> found.layer.part, found.exact.part, found.root.part
    (221408, 64, 393312)
    """
    one, variant, tensor = local_shape(shape, mesh.tensor), VARIANTS[attention], mesh.tensor
    D, F, d = one.hidden_size, one.intermediate_size, one.head_dim
    queries, keys, width = variant.query_width(one), one.num_kv_heads * d, one.num_heads * d
    layer: list[tuple[int, ...]] = [(queries, D), (keys, D), (keys, D), (D, width), (F, D), (F, D), (D, F), (D,), (D,)]
    exact: list[tuple[int, ...]] = []
    for own in variant.tensors:
        sizes = one if own.split else shape
        axes = own.shape(D=D, d=d, H=variant.output_heads(sizes), V=variant.heads(sizes).width)
        if own.trained:
            (exact if own.float32 else layer).append(axes)
    if variant.norm:
        layer.append((variant.heads(one).width,))
    vocabulary = -(-shape.vocab_size // tensor)
    root: list[tuple[int, ...]] = [(vocabulary, D)] * (1 if shape.tie_word_embeddings else 2) + [(D,)]
    besides = sum(shape.beside(part) for part in ("attention", "feed_forward", "norms")) // (tensor * shape.num_layers)
    return Groups(
        layer=Group.of(layer, shard=mesh.shard, besides=besides),
        exact=Group.of(exact, shard=mesh.shard),
        root=Group.of(root, shard=mesh.shard),
        layers=shape.num_layers,
    )
