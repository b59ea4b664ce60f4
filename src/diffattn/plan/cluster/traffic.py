"""The bytes that the ranks of a cluster exchange in one pass, and the seconds that this takes at least.

Per forward and backward pass, with P the numbers of a group as FSDP2 gathers it and a the bytes of a product's result:

=============== ================================================ ==================================================
of              what is exchanged                                 bytes of the whole
=============== ================================================ ==================================================
FSDP2           each layer is gathered in the forward pass, and   a·P each time; λ 4·P once
                again in the backward pass; embedding and head
                once
FSDP2           gradients are summed, each rank keeps its part    4·P of all groups
copies, DDP     gradients are summed over the copies              4 · the numbers that a rank keeps, twice
tensor          two sums a layer in the forward pass, two in the  a·D·tokens each, twice
                backward pass, and two more where layers are
                computed again; the embedding's sum
tensor          the logits of all symbols                         a·V·tokens
=============== ================================================ ==================================================

"Twice": a sum that all ranks get moves twice what a gathering moves. The ranks of a ``tensor`` group are neighbours.
Bytes are those that one rank receives at least.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from diffattn.plan.cluster.links import Cluster
from diffattn.plan.cost import count_parameters
from diffattn.plan.ranks.groups import groups_of
from diffattn.plan.setting import BYTES, Setting
from diffattn.plan.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The exchange of a rank in one forward and backward pass."""

    gathered: int
    """Bytes of weights that it receives as layers are gathered."""
    scattered: int
    """Bytes of gradients that it receives as they are summed within the ranks that share weights."""
    copied: int
    """Bytes of gradients that it receives as they are summed over copies of the weights."""
    tensor: int
    """Bytes of results that it receives from the ranks that compute a layer with it."""
    seconds: float
    """Seconds of all of it at least, at the links' full rate."""
    tensor_seconds: float
    """Those of ``tensor`` alone, for which the next product has to wait."""

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return self.gathered + self.scattered + self.copied + self.tensor

    def to_json(self) -> dict[str, object]:
        """Returns the fields by name, and the sum of the bytes."""
        return asdict(self) | {"total": self.total}


def traffic(shape: ModelShape, attention: str, setting: Setting, cluster: Cluster) -> Traffic:
    """Returns what a rank exchanges in one forward and backward pass.

    Args:
        shape: the softmax Transformer being replaced; for a matched V2, what ``match_parameters`` returned.
        attention: a name in ``VARIANTS``.
        setting: how it is trained, with its ranks.
        cluster: the machines and their links.

    >>> from diffattn.plan.cluster.links import parse_cluster
    >>> setting = Setting(context=256, batch=16, ranks=16, shard="none")
    >>> traffic(ModelShape.preset("3M"), "softmax", setting, parse_cluster("16xH100")).gathered
    0
    """
    mesh, size = setting.mesh, int(BYTES[setting.precision.activations])
    groups = groups_of(shape, attention, mesh)
    L, D, V = shape.num_layers, shape.hidden_size, shape.vocab_size
    tokens = setting.rank_batch * setting.context
    gathering = size * (2 * L * groups.layer.gathered + groups.root.gathered) + 4 * L * groups.exact.gathered
    scattering = 4 * (L * (groups.layer.gathered + groups.exact.gathered) + groups.root.gathered)
    if setting.wrapper == "FSDP2":
        kept = 4 * groups.part
    else:
        kept = int(count_parameters(shape, attention).total * BYTES[setting.precision.gradients])
    sums = (4 + 2 * setting.checkpointing) * L + 1
    hidden, logits = size * D * tokens, size * V * tokens

    def part(whole: int, ranks: int) -> int:
        return whole * (ranks - 1) // ranks

    seconds = cluster.seconds(gathering + scattering, mesh.shard, mesh.tensor)
    seconds += cluster.seconds(2 * kept, mesh.replicate, mesh.tensor * mesh.shard)
    tensor = cluster.seconds(2 * sums * hidden + logits, mesh.tensor, 1)
    return Traffic(
        gathered=part(gathering, mesh.shard),
        scattered=part(scattering, mesh.shard),
        copied=part(2 * kept, mesh.replicate),
        tensor=part(2 * sums * hidden + logits, mesh.tensor),
        seconds=seconds + tensor,
        tensor_seconds=tensor,
    )
