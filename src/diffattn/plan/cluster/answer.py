"""Training on a cluster: which layout fits and is fastest, how long it takes at least, and at an assumed rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from diffattn.config_fields import is_number
from diffattn.errors import ConfigError
from diffattn.plan.activations import layer
from diffattn.plan.blocks.block import BlockShape
from diffattn.plan.cluster.links import Cluster, parse_cluster
from diffattn.plan.cluster.options import ClusterOptions
from diffattn.plan.cluster.traffic import Traffic, traffic
from diffattn.plan.cost import flops_per_token
from diffattn.plan.named_model import Model, parse_model
from diffattn.plan.ranks.groups import groups_of, local_shape
from diffattn.plan.ranks.memory import RankTraining, rank_memory
from diffattn.plan.rule import parse_count
from diffattn.plan.setting import BYTES, DEFAULT_SETTING, Setting
from diffattn.variants import BASELINE, DEFAULT, VARIANTS

# The paper's recipes, each beside the softmax model of its size.
MODELS = (f"{DEFAULT}:3B", f"{BASELINE}:3B", f"{DEFAULT}:13.1B", f"{BASELINE}:13.1B")
# What is left of a card's memory to the allocator, to NCCL and to libraries.
FILLED = 0.9
_MOST_SEQUENCES = 64


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to spread a model over a cluster, with the most sequences for each rank that fit."""

    shard: str
    """``none``, ``full`` or ``hybrid``."""
    tp: int
    """Ranks that compute each layer together."""
    checkpointing: bool
    """True where layers are computed again."""
    sequences: int
    """Sequences that a rank computes in one pass."""
    passes: int
    """Passes of each step of the optimizer."""
    memory: RankTraining
    """Bytes at the peak of a rank."""
    fits: bool
    """True where they are at most nine tenths of the machine's memory."""
    traffic: Traffic
    """The exchange of a rank in one pass."""
    compute_seconds: float
    """Seconds of a step's arithmetic at the machine's peak rates."""
    traffic_seconds: float
    """Seconds of a step's exchange at the links' full rate."""
    assumed_seconds: float
    """Seconds of a step where arithmetic runs at the assumed rate: beside the exchange of weights and gradients, and
    waiting for that of ``tensor`` groups."""
    mfu: float
    """The part of the peak rate that the model's FLOPs, as its formula has them, make of those seconds."""

    @property
    def least_seconds(self) -> float:
        """Seconds of a step at least: arithmetic and exchange run side by side, both at their peak rates."""
        return max(self.compute_seconds, self.traffic_seconds)

    @property
    def serial_seconds(self) -> float:
        """Seconds of a step at peak rates where nothing runs side by side."""
        return self.compute_seconds + self.traffic_seconds

    def to_json(self) -> dict[str, object]:
        """Returns the fields by name, and the two bounds."""
        parts = {"memory": self.memory.to_json(), "traffic": self.traffic.to_json()}
        return asdict(self) | parts | {"least_seconds": self.least_seconds, "serial_seconds": self.serial_seconds}


@dataclass(frozen=True, kw_only=True)
class ClusterModel:
    """One model on a cluster."""

    name: str
    """The name, as ``variant:size``."""
    context: int
    """Tokens in a sequence."""
    step_tokens: int
    """Tokens in a step of the optimizer, in whole passes of all ranks."""
    layouts: list[Layout]
    """The layouts, the best first: those that fit, by their seconds at the assumed rate; then the others by memory."""
    tokens_per_second: float
    """Tokens per second of all ranks at the assumed rate."""
    most_tokens_per_second: float
    """Tokens per second at most."""
    hours: float
    """Hours to all tokens at the assumed rate."""
    gpu_hours: float
    """Those hours times the machines."""
    least_gpu_hours: float
    """Hours times machines at least."""

    @property
    def best(self) -> Layout:
        """The layout to take."""
        return self.layouts[0]

    def to_json(self) -> dict[str, object]:
        """Returns the fields by name."""
        return asdict(self) | {"layouts": [layout.to_json() for layout in self.layouts]}


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """Models on a cluster, one beside another."""

    cluster: Cluster
    """The machines and their links."""
    tokens: int
    """Tokens to train on."""
    utilization: float
    """The assumed part of the peak rate at which arithmetic runs."""
    models: list[ClusterModel]
    """The models."""

    def to_json(self) -> dict[str, object]:
        """Returns the fields by name, as ``diffattn plan --cluster --json`` prints them."""
        return {
            "cluster": self.cluster.to_json(),
            "tokens": self.tokens,
            "utilization": self.utilization,
            "models": [model.to_json() for model in self.models],
        }


def plan_cluster(
    cluster: str | Cluster,
    models: Sequence[str | Model] = MODELS,
    setting: Setting = DEFAULT_SETTING,
    *,
    tokens: int | str = ClusterOptions.tokens,
    step_tokens: int | str = ClusterOptions.step_tokens,
    utilization: float = ClusterOptions.utilization,
    context: int | None = None,
    fixed: bool = False,
) -> ClusterPlan:
    """Plans the training of models on a cluster: memory of a rank, bounds of a step, hours and GPU-hours.

    Every layout is tried: ``shard``, tensor parallelism within a host, checkpointing, and 1, 2, 4 … sequences for each
    rank. Of a layout the most sequences that fit are taken; of the layouts that fit, the fastest.

    Args:
        cluster: such as ``"64xH100"``, or a ``Cluster`` with links of its own.
        models: as in ``parse_model``. Default: the paper's 3B and 13B, DIFF beside softmax.
        setting: its precision, backend and, where ``fixed``, its shard, tp and checkpointing.
        tokens: to train on. Default: 1T.
        step_tokens: of one step of the optimizer, over all ranks. Default: 4M.
        utilization: the assumed part of the peak rate at which arithmetic runs. Default: 0.4.
        context: tokens of a sequence. Default: the longest that the model's shape has.
        fixed: take the setting's layout alone. Default: False.

    Raises:
        ConfigError: no such cluster or model, numbers out of their range, or a batch with fewer sequences than ranks.

    >>> found = plan_cluster("8xH100", ["softmax:830M"], tokens="1B")
    >>> found.models[0].best.fits
    True
    """
    cluster = parse_cluster(cluster) if isinstance(cluster, str) else cluster
    if not is_number(utilization) or not 0 < utilization <= 1:
        raise ConfigError(
            f"utilization={utilization!r}", "a part of the peak, above 0 and at most 1", "take such as 0.4"
        )
    wanted, in_step = (parse_count(value) for value in (tokens, step_tokens))
    found = []
    for each in models:
        model = parse_model(each, variant=DEFAULT) if isinstance(each, str) else each
        if isinstance(model.built, BlockShape):
            raise ConfigError(
                f"{model.name} on a cluster",
                "a model whose training is planned, which has the same layer all through",
                "plan it without --cluster",
            )
        length = context or model.built.max_position_embeddings
        at = replace(setting.alone, machine=cluster.machine, context=length)
        ways = [setting] if fixed else None
        layouts = sorted(_layouts(model, at, cluster, ways, in_step, utilization), key=_order)
        if not layouts:
            raise ConfigError(
                f"{in_step:,} tokens in a step of {cluster.count} ranks with sequences of {length:,}",
                "a sequence for each part of the batch",
                "raise --step-tokens, or take fewer machines or a shorter --context",
            )
        best = layouts[0]
        made = best.passes * best.sequences * length * (cluster.count // best.tp)
        steps = wanted / made
        found.append(
            ClusterModel(
                name=model.name,
                context=length,
                step_tokens=made,
                layouts=layouts,
                tokens_per_second=made / best.assumed_seconds,
                most_tokens_per_second=made / best.least_seconds,
                hours=steps * best.assumed_seconds / 3600,
                gpu_hours=steps * best.assumed_seconds / 3600 * cluster.count,
                least_gpu_hours=steps * best.least_seconds / 3600 * cluster.count,
            )
        )
    return ClusterPlan(cluster=cluster, tokens=wanted, utilization=utilization, models=found)


def _order(layout: Layout) -> tuple[bool, float]:
    return (not layout.fits, layout.assumed_seconds / _tokens(layout) if layout.fits else layout.memory.total)


def _tokens(layout: Layout) -> float:
    """Returns what a step makes, in sequences for each machine."""
    return layout.passes * layout.sequences / layout.tp


def _layouts(
    model: Model, setting: Setting, cluster: Cluster, ways: list[Setting] | None, step_tokens: int, utilization: float
) -> Iterator[Layout]:
    """Yields each layout with the most sequences that fit, or with one where not even that does."""
    heads = VARIANTS[model.attention].heads(model.built).groups
    if ways is None:
        tensors = [tp for tp in (1, 2, 4, 8, 16) if tp <= cluster.per_host and cluster.per_host % tp == 0]
        shards = ["none", *(["full"] if cluster.count > 1 else []), *(["hybrid"] if cluster.hosts > 1 else [])]
        tried = [(shard, tp, again) for shard in shards for tp in tensors if heads % tp == 0 for again in (False, True)]
    else:
        tried = [(way.shard, way.tp, way.checkpointing) for way in ways]
    for shard, tp, again in tried:
        best = None
        sequences = 1
        while sequences <= _MOST_SEQUENCES:
            at = replace(
                setting, batch=sequences * max(1, cluster.count // tp), ranks=cluster.count, shard=shard, tp=tp,
                per_host=cluster.per_host, checkpointing=again,
            )  # fmt: skip
            if at.batch * at.context > step_tokens:
                break
            memory = rank_memory(model.built, model.attention, at)
            assert cluster.machine.memory is not None
            fits = memory.total <= FILLED * cluster.machine.memory
            if best is None or fits:
                best = (at, memory, fits)
            if not fits:
                break
            sequences *= 2
        if best is not None:
            yield _layout(model, *best, cluster, step_tokens, utilization)


def _layout(
    model: Model,
    setting: Setting,
    memory: RankTraining,
    fits: bool,
    cluster: Cluster,
    step_tokens: int,
    utilization: float,
) -> Layout:
    shape, machine, dtype = model.built, cluster.machine, setting.precision.activations
    backend = setting.for_model(shape, model.attention).backend
    tokens = setting.rank_batch * setting.context
    passes = max(1, round(step_tokens / (setting.batch * setting.context)))
    training = flops_per_token(shape, model.attention, context=setting.context, backend=backend)
    again = 0
    if setting.checkpointing:
        forward = flops_per_token(shape, model.attention, context=setting.context, phase="forward", backend=backend)
        again = forward.executed - 2 * shape.vocab_size * shape.hidden_size
    flops = (training.executed + again) * tokens // setting.tp
    size = int(BYTES[dtype])
    one = layer(local_shape(shape, setting.tp), model.attention, backend=backend, size=size, autocast=False, gpu=True)
    groups = groups_of(shape, model.attention, setting.mesh)
    own = shape.num_layers * groups.layer.own + groups.root.own
    # Weights read by each pass, what layers keep written and read.
    moved = (3 + setting.checkpointing) * size * own + 2 * shape.num_layers * one.token * tokens
    seconds = machine.seconds(flops, moved, dtype)
    assert seconds is not None
    assert machine.flops is not None
    exchanged = traffic(shape, model.attention, setting, cluster)
    aside = exchanged.seconds - exchanged.tensor_seconds
    assumed = max(flops / (machine.flops[dtype] * utilization), seconds, aside) + exchanged.tensor_seconds
    return Layout(
        shard=setting.shard,
        tp=setting.tp,
        checkpointing=setting.checkpointing,
        sequences=setting.rank_batch,
        passes=passes,
        memory=memory,
        fits=fits,
        traffic=exchanged,
        compute_seconds=passes * seconds,
        traffic_seconds=passes * exchanged.seconds,
        assumed_seconds=passes * assumed,
        mfu=training.model * tokens / setting.tp / machine.flops[dtype] / assumed,
    )
