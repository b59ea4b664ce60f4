"""Spreads a model over ranks: tensor parallelism, checkpointing, compilation and FSDP2, in this order, in place.

Tensor parallelism and FSDP2 are PyTorch's own. What is ours is what they cannot know: which modules have to stay
float32 (λ, DEX), how the heads are split (``DiffTransformerConfig.tensor_parallel_plan``), and what the Trainer of
``transformers`` reads of a model that is already in its place.
"""

from __future__ import annotations

import copy
import os
import warnings
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from diffattn.errors import ConfigError, TrainingError
from diffattn.model.attention import Float32Module
from diffattn.model.modeling import DiffDecoderLayer, DiffTransformerModel, DiffTransformerPreTrainedModel
from diffattn.model.transformers_private import mark_as_placed
from diffattn.ops.torch_private import other_parameters, quiet_redistribution
from diffattn.plan.ranks.mesh import mesh_sizes

REPLICATE, SHARD, TENSOR = "replicate", "shard", "tensor"
_DTYPES = (None, torch.float32, torch.bfloat16)
Model = TypeVar("Model", bound=DiffTransformerPreTrainedModel)


class DataRank(NamedTuple):
    """The part of each global batch that a rank takes: the one numbered ``part``, from 0, of ``parts`` equal ones."""

    part: int
    parts: int


def mesh_for(world: int, *, shard: str, tensor: int = 1, per_host: int | None = None, device: str) -> DeviceMesh:
    """Makes the mesh of all ranks for one way of sharding, with the dimensions ``replicate``, ``shard``, ``tensor``.

    Their sizes multiply to ``world``. Neighbouring ranks share a ``tensor`` dimension, since they are on one host.

    Args:
        world: the number of all ranks. The process group has to exist, or the environment has to be that of torchrun.
        shard: ``"full"``: weights, gradients and optimizer are shared out over all ranks. ``"hybrid"``: over the ranks
            of a host, and each host has a copy. ``"none"``: each rank has a copy.
        tensor: the number of ranks that compute one layer together; it divides the key/value heads.
        per_host: the number of ranks on each host, which ``"hybrid"`` needs. Default: all ranks are on one.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        ConfigError: an unknown way, or numbers that do not divide each other, or another number of ranks than run.
    """
    running = distributed.get_world_size() if distributed.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if world != running:
        raise ConfigError(
            f"a mesh of {world} rank{'s' * (world != 1)} where {running} run",
            "all ranks in the mesh",
            "give mesh_for the number of all; Accelerator(cpu=True) finds the ranks where there is no GPU",
        )
    sizes = mesh_sizes(world, shard=shard, tensor=tensor, per_host=per_host)
    return init_device_mesh(device, sizes, mesh_dim_names=(REPLICATE, SHARD, TENSOR))


def data_ranks(mesh: DeviceMesh) -> DataRank:
    """Returns which part of each global batch this rank takes; the ranks of one ``tensor`` dimension take the same."""
    part, parts = 0, 1
    for name in (REPLICATE, SHARD):
        if name in _names(mesh):
            size = _size(mesh, name)
            part, parts = part * size + mesh.get_local_rank(name), parts * size
    return DataRank(part, parts)


def shard(
    model: Model,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None = None,
    checkpointing: bool = False,
    compiled: bool = False,
) -> Model:
    """Spreads a model over the ranks of a mesh, in place, and returns it.

    The order is: tensor parallelism, checkpointing, compilation, FSDP2. FSDP2 groups are: the λ or DEX of each layer,
    which are float32 whatever ``dtype`` is; each layer without them; the embedding; the last norm with the output head.
    If the embedding is the output head too, the last two are one, which is kept whole during the step.
    Weights keep their dtype, in which the optimizer changes them, and gradients are summed over ranks in float32.
    All parameters become ``DTensor``, so that ``torch.nn.utils.clip_grad_norm_`` and PyTorch's optimizers, made
    afterwards, do as with one process. ``transformers.Trainer`` takes the model as it is.

    Args:
        model: one of our models with the same weights on every rank, on any device.
        mesh: of :func:`mesh_for`, or with dimensions named ``shard``, and ``replicate`` and ``tensor`` where wanted.
        dtype: in which layers compute, ``torch.bfloat16`` or ``torch.float32``. Default: that of the weights.
        checkpointing: keep the input of each layer alone, and compute the layer again in the backward pass.
        compiled: compile each layer.

    Raises:
        ConfigError: another model, mesh or dtype; a ``tensor`` size that parts a pair of heads or a key/value head;
            weights that are not the same on each rank.

    >>> shard(model, mesh_for(8, shard="full", device="cuda"), dtype=torch.bfloat16)  # doctest: +SKIP
    """
    _check(model, mesh, dtype)
    _check_same(model, mesh)
    tensor = _size(mesh, TENSOR)
    if tensor > 1:
        _parallelize(model, mesh[TENSOR])
    set_computation(model, checkpointing=checkpointing, compiled=compiled)
    layers = _layers(model)
    quiet_redistribution()
    # FSDP2 says that nothing may be written into DEX's part or the logits, and nothing is.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPD\w+\) returned a view")
    replicas = _size(mesh, REPLICATE)
    data = mesh[REPLICATE, SHARD] if replicas > 1 else mesh[SHARD]
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, Float32Module) and any(True for _ in module.parameters()):
                # They are small: to gather them twice would take longer than to keep them.
                fully_shard(module, mesh=data, mp_policy=exact, reshard_after_forward=False)
        fully_shard(layer, mesh=data, mp_policy=policy)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:
        fully_shard(embedding, mesh=data, mp_policy=policy)
        # The backward pass begins with them.
        fully_shard([model.base_model.norm, head], mesh=data, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=data, mp_policy=policy)
    mark_as_placed(model, shard=_size(mesh, SHARD), replicate=replicas, tensor=tensor)
    return model


def set_computation(model: DiffTransformerPreTrainedModel, *, checkpointing: bool, compiled: bool) -> None:
    """Has a model compute its layers again in the backward pass, or compiled, in place; ``shard`` does this too.

    Args:
        model: one of our models.
        checkpointing: keep the input of each layer alone, and compute the layer again in the backward pass.
        compiled: compile each layer.
    """
    if checkpointing:
        # The second is its name before transformers 5.23.
        name = "activation_checkpointing_enable"
        enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
        enable({"use_reentrant": False})
    if compiled:
        for layer in _layers(model):
            # The function alone, so that the hooks of FSDP2 stay outside of the graph.
            layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]


def whole_model(model: Model) -> Model | None:
    """Returns a model that is not spread: the one given, or on rank 0 a copy of a spread one in the CPU's memory.

    All ranks call it. The others get None.
    """
    if not any(isinstance(weight, DTensor) for weight in model.parameters()):
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if distributed.get_rank() != 0:
        return None
    config = copy.deepcopy(model.config)
    config.distributed_config = None
    whole = type(model)(config)
    whole.load_state_dict(weights)
    return whole


def _layers(model: nn.Module) -> list[DiffDecoderLayer]:
    return [module for module in model.modules() if isinstance(module, DiffDecoderLayer)]


def check_sharded(model: nn.Module) -> None:
    """Raises unless a model was sharded by FSDP2, for loops in which a wrapper is to do it, and may not have.

    ``Trainer(fsdp=True)`` is one such: on a CPU it trains whole copies of the model, and says nothing.

    Raises:
        TrainingError: no weight of the model is shared out.
    """
    if not any(isinstance(weight, DTensor) for weight in model.parameters()):
        raise TrainingError(
            "the weights are whole on every rank, so no wrapper sharded this model",
            "a model that is sharded by FSDP2",
            "call diffattn.shard(model, mesh) before training, and give the model to no other wrapper",
        )


def _check(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None) -> None:
    if not isinstance(model, DiffTransformerPreTrainedModel):
        raise ConfigError(
            f"a {type(model).__name__}", "a model of diffattn without a wrapper", "shard it before anything wraps it"
        )
    if any(isinstance(weight, DTensor) for weight in model.parameters()):
        raise ConfigError("a model that is sharded already", "one that is whole on each rank", "shard it once")
    names = _names(mesh)
    if SHARD not in names or set(names) - {REPLICATE, SHARD, TENSOR}:
        raise ConfigError(
            f"a mesh with the dimensions {', '.join(names) or 'of no name'}",
            f"{SHARD}, and {REPLICATE} and {TENSOR} where they are wanted",
            "make it with diffattn.mesh_for",
        )
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype}", "torch.float32 or torch.bfloat16", "take torch.bfloat16")
    model.config.check_tensor_parallel(_size(mesh, TENSOR))


def _names(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or ()


def _size(mesh: DeviceMesh, name: str) -> int:
    """Returns the size of a dimension of a mesh, 1 for one that it does not have."""
    names = _names(mesh)
    return mesh.size(names.index(name)) if name in names else 1


def _check_same(model: DiffTransformerPreTrainedModel, mesh: DeviceMesh) -> None:
    """Raises on all ranks where the weights differ between two: each would train its part of another model."""
    names = [name for name, weight in model.named_parameters() if not weight.is_meta]
    if not names:
        return
    sums = torch.stack([_digest(model.get_parameter(name)).cpu() for name in names]).to(mesh.device_type)
    least, most = sums.clone(), sums.clone()
    for dimension in range(mesh.ndim):
        distributed.all_reduce(least, distributed.ReduceOp.MIN, group=mesh.get_group(dimension))
        distributed.all_reduce(most, distributed.ReduceOp.MAX, group=mesh.get_group(dimension))
    if (differ := (least != most).nonzero().flatten().tolist()) != []:
        raise ConfigError(
            f"{names[differ[0]]} is not the same on all ranks",
            "one model, the same on each rank",
            "build it with one seed, or load it from one folder",
        )


def _digest(weight: Tensor) -> Tensor:
    """Returns a number that another weight would hardly have: the sum of its bits, read as whole numbers."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.detach().contiguous().view(whole).sum(dtype=torch.int64)


def _parallelize(model: DiffTransformerPreTrainedModel, mesh: DeviceMesh) -> None:
    """Splits the heads, the feed-forward network and the vocabulary over the ranks of a mesh of one dimension."""
    decoder = model.base_model
    assert isinstance(decoder, DiffTransformerModel)
    styles: dict[str, ParallelStyle] = {}
    for name, style in model.config.tensor_parallel_plan().items():
        # Heads are whole on a rank, and the layer sees its own as plain tensors. The feed-forward width need not be
        # divisible by the ranks, which only a DTensor knows.
        local = not name.startswith("layers.*.mlp.")
        known: dict[str, ParallelStyle] = {
            "colwise": ColwiseParallel(use_local_output=local),
            "rowwise": RowwiseParallel(),
            "replicated_with_grad_allreduce": _OnEachRank(Partial()),
        }
        styles[name] = known[style]
    # The input of all projections of a layer at once, so that their gradients by it are summed once.
    for name in ("self_attn", "mlp"):
        styles[f"layers.*.{name}"] = PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)
        )
    styles["embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    for name in ("layers.*.input_layernorm", "layers.*.post_attention_layernorm", "norm"):
        styles[name] = _OnEachRank(Replicate())
    # The weights are the same on all ranks, so each takes its part of its own.
    parallelize_module(decoder, mesh, styles, src_data_rank=None)
    # The sum over the ranks is a tensor that is still awaited. A compiled layer that is given one has no gradient for
    # it, and a copy is an ordinary tensor.
    decoder.embed_tokens.register_forward_hook(lambda module, arguments, embedded: embedded.clone())
    head = model.get_output_embeddings()
    if head is not None:
        parallelize_module(head, mesh, ColwiseParallel(output_layouts=Replicate()), src_data_rank=None)
        model.tie_weights()


class _OnEachRank(ParallelStyle):
    """A module that each rank has whole, and computes with plain tensors.

    ``gradient`` says what a rank's gradient by its parameters is: ``Replicate`` where the ranks compute the same, and
    ``Partial`` where each computes its own heads, so that the gradients have to be summed.
    """

    def __init__(self, gradient: Placement) -> None:
        super().__init__()
        self.gradient = gradient

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, weight in list(module.named_parameters(recurse=False)):
            spread = distribute_tensor(weight.detach(), device_mesh, [Replicate()], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(spread, requires_grad=weight.requires_grad))
        inner = module.forward

        def forward(*args: object, **kwargs: object) -> object:
            held = dict(module.named_parameters(recurse=False))
            local = {
                name: weight.to_local(grad_placements=[self.gradient])
                for name, weight in held.items()
                if isinstance(weight, DTensor)
            }
            with other_parameters(module, local):
                return inner(*args, **kwargs)

        module.forward = forward
        return module
