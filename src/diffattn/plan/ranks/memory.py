"""The memory of one rank in training: what DDP and FSDP2 hold, as ``diffattn.shard`` and ``train`` set them up.

Without sharding and tensor parallelism a rank trains the whole model under DDP: its memory is that of one process on
its part of the batch, and DDP's buckets, into which all gradients are copied. Otherwise it is FSDP2's, whose groups are
in ``groups.py``. With G the bytes of one layer's weights as they are gathered, and R those of the root group:

================================ =======================================================================
always                           parts of weights and moments in the dtype in which they are kept
forward pass                     R from its beginning to the end of the backward pass, G of the layer at work, and the
                                 buffer of the last gathering, G, until the next one is copied out of its own
backward pass                    G of the layer at work, G of the buffer into which the next one is gathered ahead, the
                                 layer's gradients in the dtype of its products, and the float32 buffer from which the
                                 gradients of the layer before were reduced, until the next is filled
after it                         parts of all gradients; the root group is reduced last
================================ =======================================================================

gloo, by which processors speak to each other, copies what it gathers and what it reduces; NCCL does not. ``full`` with
one rank gathers nothing and still copies; ``hybrid`` holds what its ranks of one host hold.

Letters as in ``memory.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffattn.errors import ConfigError
from diffattn.plan.activations import layer, norm
from diffattn.plan.cost import ByKind, count_parameters
from diffattn.plan.memory import count_tensors, training_moments
from diffattn.plan.ranks.groups import Group, groups_of, local_shape
from diffattn.plan.setting import BYTES, Setting
from diffattn.plan.shape import ModelShape
from diffattn.variants import VARIANTS


@dataclass(frozen=True, kw_only=True)
class RankTraining(ByKind):
    """Bytes alive at the peak of a training step on the first rank, by kind."""

    weights: int
    """Bytes of its part of the parameters."""
    gradients: int
    """Bytes of those gradients that exist at the peak: its parts of those that are reduced, and whole ones of a layer
    that are not yet."""
    optimizer: int
    """Bytes of its part of the optimizer's state."""
    gathered: int
    """Bytes of the weights that FSDP2 has gathered, and of the buffers into which it gathers."""
    buffers: int
    """Bytes of the buffers in which gradients are reduced: DDP's buckets, or those of FSDP2."""
    activations: int
    """Bytes of the results that the backward pass needs."""
    scores: int
    """Bytes of the T × T maps of its heads."""
    workspace: int
    """Bytes that the passes need besides."""


def check_tensor(shape: ModelShape, attention: str, tensor: int) -> None:
    """Raises unless ``tensor`` ranks can compute each layer together; returns nothing.

    Raises:
        ConfigError: a number that does not divide the key/value heads of the one attention call.

    >>> check_tensor(ModelShape.preset("3M"), "softmax", 2)
    """
    groups = VARIANTS[attention].heads(shape).groups
    if groups % tensor:
        possible = [str(number) for number in range(1, groups + 1) if groups % number == 0]
        raise ConfigError(
            f"tp={tensor} with {groups} key/value heads of the one {attention} call",
            "a divisor of them, so that both maps of a pair stay on one rank",
            f"use one of {', '.join(possible)}",
        )


def rank_memory(shape: ModelShape, attention: str, setting: Setting) -> RankTraining:
    """Returns the peak of one training step on the first rank, which has the most to hold.

    Args:
        shape: the softmax Transformer being replaced; for a matched V2, what ``match_parameters`` returned.
        attention: a name in ``VARIANTS``.
        setting: how it is trained, with its ranks; the batch is that of all ranks together.

    Raises:
        ConfigError: as ``training_memory``; ranks that do not divide the batch or the heads.

    Source: PyTorch 2.13, ``torch/distributed/fsdp/_fully_shard``; docs/plan.md gives the error against measured steps.

    >>> setting = Setting(context=256, batch=2, precision="fp32", backend="standard", ranks=2, shard="full")
    >>> rank_memory(ModelShape.preset("3M"), "softmax", setting).weights
    6000768
    """
    return max(rank_moments(shape, attention, setting).values(), key=lambda moment: moment.total)


def rank_moments(shape: ModelShape, attention: str, setting: Setting) -> dict[str, RankTraining]:
    """Returns the bytes alive on the first rank at each point of a step at which the peak may lie.

    Arguments and errors are those of ``rank_memory``.

    >>> setting = Setting(context=2, batch=2, precision="fp32", ranks=2, shard="full")
    >>> found = rank_moments(ModelShape.preset("3M"), "softmax", setting)
    >>> max(found, key=lambda name: found[name].total)
    'gradient of the embedding'
    """
    mesh = setting.mesh
    check_tensor(shape, attention, mesh.tensor)
    if setting.wrapper != "FSDP2":
        return _copies(shape, attention, setting)
    return _Sharded(shape, attention, setting.for_model(shape, attention)).moments()


def _copies(shape: ModelShape, attention: str, setting: Setting) -> dict[str, RankTraining]:
    """Returns the moments of a rank that has the whole model: those of one process, and the buckets of DDP."""
    buckets, alone = 0, replace(setting.alone, batch=setting.rank_batch)
    if setting.wrapper == "DDP":
        buckets = int(count_parameters(shape, attention).total * BYTES[setting.precision.gradients])
    return {
        name: RankTraining(**vars(moment), gathered=0, buffers=buckets)
        for name, moment in training_moments(shape, attention, alone).items()
    }


class _Sharded:
    """The bytes of a model under FSDP2, with or without tensor parallelism."""

    def __init__(self, shape: ModelShape, attention: str, setting: Setting) -> None:
        precision, mesh = setting.precision, setting.mesh
        if not precision.trains:
            raise ConfigError(
                f"weights={precision.weights!r} for training", "floating-point weights", "use one of fp32, bf16, fp16"
            )
        self.shape, self.setting, self.mesh = shape, setting, mesh
        self.groups = groups_of(shape, attention, mesh)
        # The dtype in which layers compute, that in which weights and gradients are kept, and that of the reduction.
        self.size, self.kept_size, self.exact_size = int(BYTES[precision.activations]), setting.stored, 4
        self.tokens = setting.rank_batch * setting.context
        self.pairs = self.tokens * setting.context
        self.one = layer(
            local_shape(shape, mesh.tensor), attention, backend=setting.backend, size=self.size, autocast=False,
            gpu=setting.gpu,
        )  # fmt: skip
        self.steps = 4 * count_tensors(shape, attention)
        self.gloo = 0 if setting.gpu else 1
        self.sharded = mesh.shard > 1
        self.kept = self.one.token * self.tokens + self.one.position * setting.context

    def moments(self) -> dict[str, RankTraining]:
        """Returns the bytes at each point of the step, by its name."""
        shape, groups, size, tokens = self.shape, self.groups, self.size, self.tokens
        D, V, L, tensor = shape.hidden_size, shape.vocab_size, shape.num_layers, self.mesh.tensor
        local = -(-V // tensor)
        head = size * local * D
        hidden = size * D * tokens
        final = norm(D, size, False, 1) * tokens
        rope = 2 * size * shape.head_dim * self.setting.context
        outside = 16 * tokens + final + rope
        checkpointing = self.setting.checkpointing
        saved = (L * hidden if checkpointing else L * self.kept) + outside
        maps = 0 if checkpointing else L * self.one.scores * self.pairs
        root, exact = size * groups.root.gathered, self.exact_size * groups.exact.gathered * L
        one = size * groups.layer.gathered
        ahead = one if self.sharded else 0
        gathering = self._gathering()
        # The rank has its part of the logits, and then those of all symbols.
        apart = local if tensor > 1 else 0
        logits = (size + (4 if size < 4 else 0) + 4) * V
        found = {
            "gathering the first layer": self._at(gathered=(1 + self.sharded) * root + gathering),
            "end of the forward pass": self._at(
                gathered=root + exact + (0 if exact else ahead),
                activations=saved, scores=maps, workspace=max(logits, size * (2 * V + apart) if apart else 0) * tokens,
            ),
            "gathering the last layer again": self._at(
                gathered=root + exact + gathering, activations=saved + 4 * V * tokens, scores=maps
            ),
            "backward of the loss": self._at(
                gathered=root + exact + ahead, activations=saved + 4 * V * tokens, scores=maps,
                workspace=8 * V * tokens,
            ),
            "backward of the output projection": self._at(
                gathered=root + exact + ahead, gradients=head, activations=saved, scores=maps,
                workspace=size * (local + max(D, V if apart else 0)) * tokens,
            ),
            "backward of the final norm": self._at(
                gathered=root + exact + ahead, gradients=head, activations=saved - (4 + size) * D * tokens,
                scores=maps, workspace=20 * D * tokens,
            ),
        }  # fmt: skip
        for number in dict.fromkeys((L - 1, max(L - 2, 0), min(1, L - 1), 0)):
            found |= self._layer(number, head, root + exact, saved - final - (16 * tokens if number < L - 1 else 0))
        reduced = self.kept_size * groups.layer.part * L
        last = self.exact_size * groups.layer.gathered
        both = 3 if shape.tie_word_embeddings else 2
        # Each rank of a layer makes a gradient of all symbols, and takes its part of it.
        symbols = size * V * D if tensor > 1 else 0
        found["gradient of the embedding"] = self._at(
            gathered=root + exact, gradients=reduced + both * head, buffers=last, workspace=hidden + symbols
        )
        found |= self._reduction("the rest", self.groups.root, gradients=reduced, gathered=exact)
        found["optimizer step"] = self._at(gradients=self.kept_size * groups.part, workspace=self.steps)
        return found

    def _layer(self, number: int, head: int, root: int, saved: int) -> dict[str, RankTraining]:
        """Returns the moments of one layer's backward pass; ``saved`` is what all layers keep."""
        L, one, tokens = self.shape.num_layers, self.one, self.tokens
        behind = L - 1 - number
        checkpointing = self.setting.checkpointing
        hidden = self.size * self.shape.hidden_size * tokens
        below = saved - behind * (hidden if checkpointing else self.kept)
        again = self.kept if checkpointing else 0
        layers = 1 if checkpointing else number + 1
        maps = layers * one.scores * self.pairs
        reduced = head + behind * self.kept_size * self.groups.layer.part
        gathered = root + self.size * self.groups.layer.gathered
        ahead = self.size * self.groups.layer.gathered if self.sharded and number else 0
        # With λ in a group of its own the next layer is gathered when λ's turn comes, in the attention.
        early = 0 if self.groups.exact.own else ahead
        gathering = self._gathering() if early else 0
        held = self.exact_size * self.groups.layer.gathered if behind else 0
        down = self.size * self.shape.hidden_size * (-(-self.shape.intermediate_size // self.mesh.tensor))
        freed = (one.feed_forward + one.behind) * tokens
        name = f"layer {number}"
        found = {
            f"{name}, gathering": self._at(
                gathered=gathered + gathering, gradients=reduced, buffers=held, activations=below,
                scores=0 if checkpointing else maps, workspace=hidden,
            ),
            f"{name}, feed-forward": self._at(
                gathered=gathered + early, gradients=reduced + down, buffers=held, activations=below + again,
                scores=maps, workspace=one.in_feed_forward * tokens,
            ),
            f"{name}, attention": self._at(
                gathered=gathered + ahead, gradients=reduced + 3 * down, buffers=held,
                activations=below + again - freed, scores=maps,
                workspace=one.in_attention * tokens + one.in_scores * self.pairs,
            ),
        }  # fmt: skip
        return found | self._reduction(
            name, self.groups.layer, gradients=reduced, gathered=root + ahead,
            activations=below - (hidden if checkpointing else self.kept),
            scores=0 if checkpointing else number * one.scores * self.pairs, workspace=hidden,
        )  # fmt: skip

    def _gathering(self) -> int:
        """Returns the bytes that gathering one layer takes: this rank's part as it is cast, the buffer, and gloo's."""
        if not self.sharded:
            return 0
        layer = self.groups.layer
        cast = self.size * layer.part if self.size != self.kept_size else 0
        return cast + (1 + self.gloo) * self.size * layer.gathered

    def _reduction(self, name: str, group: Group, *, gradients: int, **others: int) -> dict[str, RankTraining]:
        """Returns the two moments of a group's reduction: its gradients are copied, and then summed over the ranks."""
        buffer = self.exact_size * group.gathered
        filled = self.size * group.filled if self.sharded else 0
        copies = self.gloo if self.sharded else 0
        return {
            f"{name}, copied to be reduced": self._at(
                gradients=gradients + self.size * group.own + filled, buffers=buffer, **others
            ),
            f"{name}, reduced": self._at(
                gradients=gradients + self.exact_size * group.part, buffers=(1 + copies) * buffer, **others
            ),
        }

    def _at(
        self, *, gradients: int = 0, gathered: int = 0, buffers: int = 0, activations: int = 0, scores: int = 0,
        workspace: int = 0,
    ) -> RankTraining:  # fmt: skip
        moments = 2 * BYTES[self.setting.precision.optimizer] * self.groups.part
        return RankTraining(
            weights=self.kept_size * self.groups.part, gradients=gradients, optimizer=int(moments) + self.steps,
            gathered=gathered, buffers=buffers, activations=activations, scores=scores, workspace=workspace,
        )  # fmt: skip
