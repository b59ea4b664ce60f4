"""The planner's bytes of one rank held against real training on the ranks that torchrun has started."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from diffattn.errors import ConfigError
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.model.sharding import mesh_for, set_computation, shard
from diffattn.plan.cost import count_parameters
from diffattn.plan.memory import count_tensors
from diffattn.plan.ranks.groups import groups_of
from diffattn.plan.ranks.memory import rank_memory
from diffattn.plan.setting import Setting
from diffattn.plan.shape import ModelShape
from diffattn.progress import OnStage, Stage, unseen
from diffattn.rank import rank_here
from diffattn.study.measured_machine import main_memory
from diffattn.study.plan_check import IMPLEMENTATIONS, MeasuredRow, as_built_here
from diffattn.train.measure import TrainingStep, peak_bytes
from diffattn.train.spread.ranks import joined


def measure_ranks(
    shape: ModelShape, attention: str, setting: Setting, *, on_stage: OnStage = unseen
) -> list[MeasuredRow]:
    """Trains a model with random weights on all ranks, as ``train`` does, and puts its bytes beside the planner's.

    All ranks call it, on processors, and all get the same rows: the most that any rank holds. Bytes of weights,
    optimizer and gradients must be equal (``exact``); the peak of a step is to be within 10%.

    Args:
        shape: the softmax Transformer being replaced; for a matched V2, what ``match_parameters`` returned.
        attention: a name in ``VARIANTS``.
        setting: as it is planned, with as many ranks as there are; the precision ``"fp32"`` or ``"autocast"``. Its
            machine is not used.
        on_stage: called with what is being measured.

    Raises:
        ConfigError: another number of ranks, a name that is not among these, or a step that memory cannot hold.

    Source: what is measured, and what is not, is in docs/plan.md.
    """
    setting = as_built_here(shape, attention, setting)
    world = rank_here().world
    if setting.ranks != world or world == 1:
        raise ConfigError(
            f"a plan of {setting.ranks} ranks measured by {world}",
            "as many processes as ranks",
            f"start it with torchrun --nproc-per-node {max(setting.ranks, 2)} -m diffattn plan",
        )
    if setting.precision.name not in ("fp32", "autocast"):
        raise ConfigError(f"precision={setting.precision.name!r} on ranks", "float32 or autocast", "pass it as --dtype")
    predicted = rank_memory(shape, attention, setting)
    memory = main_memory()
    if setting.ranks * predicted.total > 0.9 * memory:
        raise ConfigError(
            f"{setting.ranks} ranks that hold {predicted.total / 2**30:.1f} GiB each",
            f"at most nine tenths of this machine's {memory / 2**30:.1f} GiB, to measure them here",
            "take a smaller model, such as 3M, or a shorter context",
        )
    with joined("cpu"):
        on_stage(Stage("measuring a training step on all ranks"))
        weights, optimizer, gradients, peak = _Step(shape, attention, setting).measured()
    if setting.wrapper == "FSDP2":
        part = groups_of(shape, attention, setting.mesh).part
        kept, state = setting.stored * part, 8 * part + 4 * count_tensors(shape, attention)
    else:
        total = count_parameters(shape, attention).total
        kept, state = 4 * total, 8 * total + 4 * count_tensors(shape, attention)
    return [
        MeasuredRow(what="weights of a rank", unit="bytes", predicted=kept, measured=weights, exact=True),
        MeasuredRow(what="optimizer of a rank", unit="bytes", predicted=state, measured=optimizer, exact=True),
        MeasuredRow(what="gradients of a rank", unit="bytes", predicted=kept, measured=gradients, exact=True),
        MeasuredRow(
            what="training peak of a rank", unit="bytes", predicted=predicted.total, measured=peak, exact=False
        ),
    ]


class _Step:
    """A model on this rank, spread as ``train`` spreads it, and its steps."""

    def __init__(self, shape: ModelShape, attention: str, setting: Setting) -> None:
        self.setting = setting
        config = DiffTransformerConfig.from_shape(
            shape, attention, max_position_embeddings=max(shape.max_position_embeddings, setting.context)
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.model = DiffTransformerForCausalLM(config)
        backend = setting.for_model(shape, attention).backend
        self.model.set_attn_implementation(IMPLEMENTATIONS[backend])
        self.ids = torch.randint(0, shape.vocab_size, (setting.rank_batch, setting.context))

    def measured(self) -> list[int]:
        """Returns the most bytes of weights, optimizer and gradients that a rank has, and of all at a step's peak."""
        half = self.setting.precision.name == "autocast"
        if self.setting.wrapper == "FSDP2":
            mesh = mesh_for(
                self.setting.ranks, shard=self.setting.shard, tensor=self.setting.tp, per_host=self.setting.per_host,
                device="cpu",
            )  # fmt: skip
            dtype = torch.bfloat16 if half else None
            shard(self.model, mesh, dtype=dtype, checkpointing=self.setting.checkpointing)
            step = self._settled(self.model, autocast=False)
            peak = peak_bytes(step, [*self._weights(), *map(_local, _states(step))], "cpu")
        else:
            set_computation(self.model, checkpointing=self.setting.checkpointing, compiled=False)
            steps = []

            def everything() -> None:
                # The buckets are made here, and the profiler has to see it.
                steps.append(self._settled(DistributedDataParallel(self.model), autocast=half))
                steps[0]()

            peak = peak_bytes(everything, self._weights(), "cpu")
            step = steps[0]
        ids = self.ids[:, :4]
        with torch.autocast("cpu", torch.bfloat16, enabled=step.autocast):
            step.model(ids, labels=ids, use_cache=False).loss.backward()
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        held = [_bytes(list(self.model.parameters())), _bytes(_states(step)), _bytes(gradients)]
        numbers = torch.tensor([*held, peak])
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
        return [int(number) for number in numbers.tolist()]

    def _settled(self, model: nn.Module, *, autocast: bool) -> TrainingStep:
        """Returns a step that was made twice on a few tokens, by when optimizer and buckets are as they stay."""
        step = TrainingStep(model, self.ids, autocast=autocast, use_cache=False)
        for _ in range(2):
            step(length=4)
        return step

    def _weights(self) -> list[Tensor]:
        return [_local(tensor) for tensor in (*self.model.parameters(), *self.model.buffers(), self.ids)]


def _states(step: TrainingStep) -> list[Tensor]:
    return [value for state in step.optimizer.state.values() for value in state.values()]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes(tensors: list[Tensor]) -> int:
    """Returns the bytes of the memory in which tensors lie, each place once."""
    places = {(local := _local(tensor).untyped_storage()).data_ptr(): local.nbytes() for tensor in tensors}
    return sum(places.values())
