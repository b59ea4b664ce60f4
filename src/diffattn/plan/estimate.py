"""The cost of one model on one machine: memory, FLOPs, bytes moved, seconds, disk, and its share under parallelism.

Seconds are a roofline's: peak rates, one limit at a time, no overhead. They are lower bounds, and for telling which of
two models is slower and why they are of more use than for telling the time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Generic, TypeVar

from diffattn.plan.activations import layer
from diffattn.plan.cost import (
    ByKind,
    Parameters,
    count_parameters,
    decoding_flops_per_token,
    flops_per_token,
    weight_bytes,
)
from diffattn.plan.inference import InferenceMemory
from diffattn.plan.memory import TrainingMemory, decoding_memory, prefill_memory, training_memory
from diffattn.plan.ranks.memory import RankTraining, check_tensor, rank_memory
from diffattn.plan.setting import BYTES, Setting
from diffattn.plan.shape import ModelShape
from diffattn.variants import VARIANTS

DISK_DTYPES = ("fp32", "bf16", "int8", "int4")
# How often decoding reads the cache where an attention call is made twice or four times: V1's two_calls read each key
# once and the values of width 2d twice, its four_calls both twice. In halves.
_CACHE_READS = {"two_calls": 3, "four_calls": 4}
Memory = TypeVar("Memory", bound=ByKind)


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs per token, a multiply-add being two; in prefill the mean over a sequence, which need not be whole."""

    model: float
    """FLOPs by the definition, which no backend changes."""
    executed: float
    """FLOPs that the backend does."""


@dataclass(frozen=True, kw_only=True)
class PhaseCost(Generic[Memory]):
    """The cost of one training step, of one prefill, or of one decoded token of each sequence."""

    memory: Memory
    """Bytes alive at the peak, by kind."""
    flops_per_token: TokenFlops
    """FLOPs of one token."""
    flops: int
    """FLOPs of all of it that the backend does."""
    bytes_moved: int
    """Bytes that have to be read from memory and written to it."""
    seconds: float | None
    """Seconds that it takes at least; None where a rate of the machine is unknown."""
    tokens_per_second: float | None
    """Tokens per second at most; None as for ``seconds``."""

    @property
    def intensity(self) -> float:
        """FLOPs per byte moved."""
        return self.flops / self.bytes_moved

    def to_json(self) -> dict[str, object]:
        """Returns the fields by name, and the intensity."""
        return {
            "memory": self.memory.to_json(),
            "flops_per_token": asdict(self.flops_per_token),
            "flops": self.flops,
            "bytes_moved": self.bytes_moved,
            "intensity": self.intensity,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }


@dataclass(frozen=True, kw_only=True)
class TrainingCost(PhaseCost[TrainingMemory]):
    """The cost of one training step, and its peak with and without checkpointing, whatever the setting says."""

    peak_without_checkpointing: int
    """Bytes at the peak where every layer keeps what its backward pass needs."""
    peak_with_checkpointing: int
    """Bytes at the peak where every layer keeps its input alone."""

    def to_json(self) -> dict[str, object]:
        """Returns the fields by name, and the intensity."""
        keys = ("peak_without_checkpointing", "peak_with_checkpointing")
        return super().to_json() | {key: getattr(self, key) for key in keys}


@dataclass(frozen=True)
class DiskSize:
    """The parameters in a file."""

    bytes: int
    """Bytes of the parameters, without the file's header."""
    read_seconds: float | None
    """Seconds to read them at least; None where the machine's disk is unknown."""


@dataclass(frozen=True, kw_only=True)
class RankInference(ByKind):
    """Bytes alive at the peak of prefill or of one decoding step on one rank, by kind."""

    weights: int
    """Bytes of its share of the parameters."""
    cache: int
    """Bytes of the keys and values of its heads."""
    scores: int
    """Bytes of the T × T maps of its heads."""
    activations: int
    """Bytes of the results of layers, counted whole."""
    workspace: int
    """Bytes that the pass needs besides, counted whole."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The share of the first of several ranks, which has the most."""

    ranks: int
    """The number of ranks."""
    wrapper: str
    """The wrapper that trains them together: ``"DDP"``, ``"FSDP2"``, or ``""`` for one rank."""
    replicate: int
    """Copies of the weights."""
    shard: int
    """Ranks that share one copy of the weights, the gradients and the optimizer's state."""
    tp: int
    """Ranks that share the heads and the feed-forward network of each layer."""
    batch: int
    """Sequences that the rank computes in a forward pass."""
    training: RankTraining | None
    """The rank's part of a training step; None where the weights are integers."""
    prefill: RankInference
    """The rank's part of a prefill, which ``tp`` alone shares."""
    decoding: RankInference
    """The rank's part of a decoding step, which ``tp`` alone shares."""

    def to_json(self) -> dict[str, object]:
        """Returns the fields by name."""
        parts = {
            "training": None if self.training is None else self.training.to_json(),
            "prefill": self.prefill.to_json(),
            "decoding": self.decoding.to_json(),
        }
        return vars(self) | parts


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Everything that is known of a model before it is built."""

    backend: str
    """The backend that is planned: the setting's, and for ``"auto"`` the one that serves on its machine."""
    parameters: Parameters
    """Numbers of parameters, by part."""
    active_parameters: int
    """Parameters that one token meets: all but those of experts that are not chosen."""
    training: TrainingCost | None
    """One training step; None where the weights are integers, which are not trained, or where the layers differ."""
    prefill: PhaseCost[InferenceMemory]
    """Reading ``context`` tokens of each sequence into the cache."""
    decoding: PhaseCost[InferenceMemory]
    """One new token of each sequence behind them."""
    disk: dict[str, DiskSize]
    """The parameters in a file, by dtype (``DISK_DTYPES``)."""
    read_seconds: float | None
    """Seconds to read the weights from disk at least; None where the machine's disk is unknown."""
    first_token_seconds: float | None
    """Seconds to read the weights and the prompt at least; None where a rate of the machine is unknown."""
    cache_bytes_per_token: int
    """Bytes that one token keeps in the key/value cache, on average over the context."""
    gradient_bytes: int | None
    """Bytes of the gradients of all parameters (the peak may lie where few of them exist); None without training."""
    score_bytes: int
    """Bytes of the T × T maps that training keeps; 0 where the backend writes none out."""
    rank: Rank
    """The share of one rank."""

    @property
    def inference_peak(self) -> int:
        """Bytes at the larger of the two peaks of inference, prefill's and decoding's."""
        return max(self.prefill.memory.total, self.decoding.memory.total)

    def to_json(self) -> dict[str, object]:
        """Returns the fields by name."""
        return {
            "backend": self.backend,
            "parameters": self.parameters.to_json(),
            "active_parameters": self.active_parameters,
            "training": None if self.training is None else self.training.to_json(),
            "prefill": self.prefill.to_json(),
            "decoding": self.decoding.to_json(),
            "disk": {dtype: asdict(found) for dtype, found in self.disk.items()},
            "read_seconds": self.read_seconds,
            "first_token_seconds": self.first_token_seconds,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "gradient_bytes": self.gradient_bytes,
            "score_bytes": self.score_bytes,
            "rank": self.rank.to_json(),
        }


def estimate(shape: ModelShape, attention: str, setting: Setting) -> Estimate:
    """Returns everything that is known of a model before it is built.

    ``seconds = max(FLOPs / rate of the activations' dtype, bytes moved / bandwidth)``, and the bytes moved are

    ======== ==============================================================================================
    training weights read by each pass and written once, gradients written and read, optimizer state read and
             written, what the layers keep (and maps) written and read, logits in float32 written and read
    prefill  weights read, cache written, what the layers hold (and maps) written and read
    decoding weights and cache read, for one new token of each sequence
    ======== ==============================================================================================

    An embedding that is not tied is looked up, not read. Checkpointing adds a forward pass of the layers to training.

    Args:
        shape: the softmax Transformer being replaced; for a matched V2, what ``match_parameters`` returned.
        attention: a name in ``VARIANTS``.
        setting: how it is run; without a machine there are no seconds.

    Raises:
        ConfigError: an unknown variant, one that the shape cannot carry or that does not have the backend, or a ``tp``
            that does not divide the key/value heads.

    Source: ``cost.py``, ``memory.py``; Williams, Waterman, Patterson, "Roofline" (2009).

    >>> setting = Setting(context=256, precision="bf16", backend="fused_cpu")
    >>> found = estimate(ModelShape.preset("3M"), "diff_v1", setting)
    >>> found.parameters.total, found.decoding.memory.cache
    (3001344, 983040)
    """
    setting = setting.for_model(shape, attention)
    precision, machine, backend = setting.precision, setting.machine, setting.backend
    batch, context = setting.batch, setting.context
    counted = count_parameters(shape, attention)
    tokens, pairs = batch * context, batch * context * context
    size = int(BYTES[precision.activations])
    one = layer(shape, attention, backend=backend, size=size, autocast=precision.autocast, gpu=setting.gpu)
    held = shape.num_layers * (one.token * tokens + one.position * context + one.scores * pairs)
    weights = weight_bytes(shape, attention, dtype=precision.weights)
    embedding = shape.vocab_size * shape.hidden_size
    read = weights if shape.tie_word_embeddings else weights - int(embedding * BYTES[precision.weights])

    def phase(memory: Memory, flops_per_token: TokenFlops, flops: int, moved: int, made: int) -> PhaseCost[Memory]:
        seconds = None if machine is None else machine.seconds(flops, moved, precision.activations)
        return PhaseCost(
            memory=memory,
            flops_per_token=flops_per_token,
            flops=flops,
            bytes_moved=moved,
            seconds=seconds,
            tokens_per_second=None if seconds is None else made / seconds,
        )

    training = None
    forward = flops_per_token(shape, attention, context=context, phase="forward", backend=backend)
    gradients = int(counted.total * BYTES[precision.gradients])
    if precision.trains:
        plain, again = (
            training_memory(shape, attention, replace(setting, checkpointing=twice)) for twice in (False, True)
        )
        peak = again if setting.checkpointing else plain
        per_token = flops_per_token(shape, attention, context=context, backend=backend)
        executed = per_token.executed + (forward.executed - 2 * embedding if setting.checkpointing else 0)
        passes = 3 + setting.checkpointing
        moved = passes * read + 2 * (gradients + peak.optimizer + held + 4 * shape.vocab_size * tokens)
        step = phase(peak, TokenFlops(per_token.model, executed), executed * tokens, moved, tokens)
        training = TrainingCost(
            **vars(step),
            peak_without_checkpointing=plain.total,
            peak_with_checkpointing=again.total,
        )

    # Logits are made for the last token of each sequence alone.
    model, executed = (each * tokens - 2 * embedding * (tokens - batch) for each in (forward.model, forward.executed))
    of_token = 2 * shape.num_kv_heads * shape.head_dim * BYTES[precision.cache]
    written, cache = (int(of_token * kept) for kept in (shape.num_layers * tokens, batch * shape.tokens_kept(context)))
    prefill = phase(
        prefill_memory(shape, attention, setting),
        TokenFlops(model / tokens, executed / tokens),
        executed,
        read + written + 2 * held,
        tokens,
    )

    one_more = decoding_flops_per_token(shape, attention, context=context + 1, backend=backend)
    reads = _CACHE_READS.get(backend, 2) if VARIANTS[attention].maps > 1 else 2
    decoding = phase(
        decoding_memory(shape, attention, setting),
        TokenFlops(one_more.model, one_more.executed),
        one_more.executed * batch,
        read + cache * reads // 2,
        batch,
    )

    sizes = {dtype: weight_bytes(shape, attention, dtype=dtype) for dtype in DISK_DTYPES}
    read_seconds = None if machine is None else machine.read_seconds(weights)
    return Estimate(
        backend=backend,
        parameters=counted,
        active_parameters=counted.total,
        training=training,
        prefill=prefill,
        decoding=decoding,
        disk={
            dtype: DiskSize(found, None if machine is None else machine.read_seconds(found))
            for dtype, found in sizes.items()
        },
        read_seconds=read_seconds,
        first_token_seconds=None if read_seconds is None or prefill.seconds is None else read_seconds + prefill.seconds,
        cache_bytes_per_token=cache // tokens,
        gradient_bytes=gradients if precision.trains else None,
        score_bytes=one.scores * pairs * (1 if setting.checkpointing else shape.num_layers),
        rank=_rank(shape, attention, setting, prefill.memory, decoding.memory),
    )


def _rank(
    shape: ModelShape, attention: str, setting: Setting, prefill: InferenceMemory, decoding: InferenceMemory
) -> Rank:
    """Returns the bytes of one rank: training as ``rank_memory`` says, inference by ``tp`` alone.

    In inference weights, cache and maps are cut by tp; activations and workspace are counted whole.
    """
    mesh = setting.mesh
    check_tensor(shape, attention, mesh.tensor)

    def inference(memory: InferenceMemory) -> RankInference:
        return RankInference(
            weights=-(-memory.weights // mesh.tensor),
            cache=-(-memory.cache // mesh.tensor),
            scores=-(-memory.scores // mesh.tensor),
            activations=memory.activations,
            workspace=memory.workspace,
        )

    return Rank(
        ranks=setting.ranks,
        wrapper=setting.wrapper,
        replicate=mesh.replicate,
        shard=mesh.shard,
        tp=mesh.tensor,
        batch=setting.rank_batch,
        training=rank_memory(shape, attention, setting) if setting.precision.trains else None,
        prefill=inference(prefill),
        decoding=inference(decoding),
    )
