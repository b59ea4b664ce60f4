"""Functions that tests/model/test_sharding.py runs on ranks: models that are sharded, and what they compute."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from support.small_models import SHAPE, small_model, tokens
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from diffattn.errors import DiffattnError
from diffattn.model.attention import DexProjection, DifferentialLambda
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.model.sharding import check_sharded, data_ranks, mesh_for, shard

# Two ranks cannot divide their vocabulary and feed-forward width.
MODELS: dict[str, tuple[str, dict]] = {
    "softmax": ("softmax", {}),
    "diff_v1": ("diff_v1", {"lambda_std": 0.4, "subln_affine": True, "qk_norm": True}),
    "diff_v2": ("diff_v2", {"tie_word_embeddings": True, "attention_bias": True}),
    "dex": ("dex", {"dex_heads": [[1, 5], [11, 2, 7]], "mlp_bias": True}),
    "gated": ("gated", {}),
    "diff_gda": ("diff_gda", {"lambda_std": 0.4}),
}
BATCH, LENGTH = 4, 9


def model_of(name: str, *, layers: int = 2) -> DiffTransformerForCausalLM:
    attention, fields = MODELS[name]
    fields = dict(fields)
    shape = dataclasses.replace(SHAPE, num_layers=layers, tie_word_embeddings=fields.pop("tie_word_embeddings", False))
    model = small_model(attention, shape=shape, **fields)
    for key, parameter in model.named_parameters():
        if ".dex." in key or key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    for key, buffer in model.named_buffers():
        if key.endswith("annealed"):
            buffer.fill_(0.6)
    return model.train()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step(model: DiffTransformerForCausalLM, ids: Tensor, *, parts: int = 1) -> Tensor:
    """Returns the loss of a batch, and leaves the gradients: those of ``parts`` passes, one after another."""
    losses = []
    for number, part in enumerate(ids.chunk(parts)):
        if parts > 1 and hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(number == parts - 1)
        loss = model(part, labels=part, use_cache=False).loss / parts
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def furthest(model: DiffTransformerForCausalLM, alone: DiffTransformerForCausalLM) -> tuple[str, float]:
    """Returns the parameter whose gradient differs most, and the difference as a part of its largest number."""
    far = {}
    for key, weight in alone.named_parameters():
        gradient = whole(model.get_parameter(key).grad)
        far[key] = float((gradient - weight.grad).abs().max() / weight.grad.abs().max())
    return max(far.items(), key=lambda item: item[1])


def errors(cases: list[str]) -> dict[str, tuple[float, str, float]]:
    """Compares sharded models with one process.

    Args:
        cases: model, way of sharding, and number of ranks for each layer, as in ``diff_v1 full 2``.

    Returns, by case: the difference of the losses, and what ``furthest`` returns.
    """
    distributed.init_process_group("gloo")
    found = {}
    for case in cases:
        name, way, tensor = case.split()
        alone, ids = model_of(name), tokens(BATCH, LENGTH)
        expected = step(alone, ids)
        mesh = mesh_for(distributed.get_world_size(), shard=way, tensor=int(tensor), per_host=2, device="cpu")
        model = shard(model_of(name), mesh)
        loss = step(model, ours(ids, mesh))
        distributed.all_reduce(loss)
        loss /= distributed.get_world_size()
        found[case] = float(loss - expected), *furthest(model, alone)
    return found


def ours(ids: Tensor, mesh: DeviceMesh) -> Tensor:
    """Returns this rank's rows of a batch."""
    return ids.chunk(data_ranks(mesh).parts)[data_ranks(mesh).part]


def two_ranks(out: str) -> dict[str, Any]:
    """Returns what two ranks found, by the name of each question, and writes a model that was trained for one step."""
    distributed.init_process_group("gloo")
    meshes = {tensor: mesh_for(2, shard="full", tensor=tensor, device="cpu") for tensor in (1, 2)}
    return {
        "exact": {
            f"{name} {tensor}": {cast: exact(name, cast, meshes[tensor]) for cast in (False, True)}
            for name in ("diff_v1", "dex")
            for tensor in meshes
        },
        "written": {tensor: written(mesh) for tensor, mesh in meshes.items()},
        "ways": ways_of_computing(meshes),
        "step": one_step(meshes[1], out),
        "said": lines_said(meshes[1], out),
    }


def exact(name: str, cast: bool, mesh: DeviceMesh) -> dict[str, bool]:
    """Returns whether what is float32 by design has the bits of one process while the rest computes in bfloat16."""

    def watched(model: DiffTransformerForCausalLM) -> list[Tensor]:
        seen: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, DifferentialLambda):
                module.register_forward_hook(lambda module, given, result: seen.append(result.detach().clone()))
            if isinstance(module, DexProjection):
                module.register_forward_pre_hook(
                    lambda module, given: seen.append(whole(module.weight.detach()).clone())
                )
        return seen

    alone, model = model_of(name), model_of(name)
    if cast:
        alone, model = alone.bfloat16(), model.bfloat16()
    ids = tokens(BATCH, LENGTH)
    expected, found = watched(alone), watched(shard(model, mesh, dtype=torch.bfloat16))
    with torch.no_grad():
        alone(ids)
    step(model, ours(ids, mesh))
    layer, computed = model.model.layers[0], []
    handle = layer.mlp.gate_proj.register_forward_pre_hook(lambda module, given: computed.append(module.weight.dtype))
    model(ours(ids, mesh))
    handle.remove()
    frequencies = model.model.rotary_emb.inv_freq
    return {
        "the same": len(found) > 0 and all(map(torch.equal, found, expected)),
        "float32": all(each.dtype == torch.float32 for each in found),
        "rounding would show": any(not torch.equal(each, each.bfloat16().float()) for each in expected),
        "frequencies": torch.equal(frequencies, model_of(name).model.rotary_emb.inv_freq),
        "layers compute in bfloat16": computed == [torch.bfloat16],
        "weights keep their dtype": layer.mlp.gate_proj.weight.dtype == (torch.bfloat16 if cast else torch.float32),
    }


def written(mesh: DeviceMesh) -> bool:
    """Returns whether a sharded model writes what one process writes, also after a pass of training."""
    ids, alone, model = tokens(2, LENGTH), model_of("diff_v1"), shard(model_of("diff_v1"), mesh)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    same = []
    for _ in range(2):
        same.append(torch.equal(model.eval().generate(ids, **options), alone.eval().generate(ids, **options)))
        step(model.train(), ids)
    return all(same)


def saved_by_one_rank(out: str) -> None:
    """Saves a model whose embedding is its output head, sharded over one rank, after a pass, which leaves it whole."""
    distributed.init_process_group("gloo")
    model = shard(model_of("diff_v2").eval(), mesh_for(1, shard="full", device="cpu"), dtype=torch.bfloat16)
    with torch.no_grad():
        model(tokens(1, LENGTH))
    model.save_pretrained(out)


def ways_of_computing(meshes: dict[int, DeviceMesh]) -> dict[str, tuple[str, float]]:
    """Returns what ``furthest`` returns, with checkpointing, compiled layers, and several passes for a step."""
    found = {}
    options: dict[str, dict] = {
        "checkpointing": {"checkpointing": True},
        "compiled": {"compiled": True},
        "accumulated": {},
    }
    for name, tensor, way in (
        ("diff_v1", 1, "checkpointing"), ("dex", 2, "checkpointing"), ("diff_v1", 2, "compiled"),
        ("diff_v1", 1, "accumulated"), ("diff_v1", 2, "accumulated"), ("dex", 2, "accumulated"),
    ):  # fmt: skip
        # To compile a layer takes a second.
        layers = 1 if way == "compiled" else 2
        alone, ids = model_of(name, layers=layers), tokens(BATCH, LENGTH)
        step(alone, ids)
        with light_compiler():
            model = shard(model_of(name, layers=layers), meshes[tensor], **options[way])
        step(model, ours(ids, meshes[tensor]), parts=2 if way == "accumulated" else 1)
        found[f"{name} {way} {tensor}"] = furthest(model, alone)
    return found


@contextlib.contextmanager
def light_compiler() -> Iterator[None]:
    """Has ``torch.compile`` do all but write and compile a program."""
    real = torch.compile
    torch.compile = lambda function: real(function, backend="aot_eager")  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = real


def one_step(mesh: DeviceMesh, out: str) -> dict[str, float]:
    """Trains a sharded model for a step and saves it; returns the norm of its gradients, and that of one process."""
    norms = {}
    for way in ("alone", "sharded"):
        model, ids = model_of("diff_v1"), tokens(BATCH, LENGTH)
        if way == "sharded":
            model, ids = shard(model, mesh), ours(ids, mesh)
        # With this eps the rounding of a small gradient does not decide where its weight goes.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3, fused=True)
        step(model, ids)
        norms[way] = float(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        if way == "sharded" or distributed.get_rank() == 0:
            model.save_pretrained(Path(out) / way)
    return norms


def lines_said(mesh: DeviceMesh, out: str) -> dict[str, str]:
    """Returns the line of each mistake."""

    def plainly(name: str) -> None:
        """Does what a loop does that knows nothing of float32 modules."""
        model, policy = model_of(name), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for module in (*model.model.layers, model):
            fully_shard(module, mp_policy=policy)
        model(tokens(1, LENGTH))

    def of_two_seeds() -> None:
        model = model_of("diff_v1")
        if distributed.get_rank() == 1:
            model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-3
        shard(model, mesh)

    def asked_of_the_trainer() -> None:
        arguments = TrainingArguments(out, use_cpu=True, fsdp=True, max_steps=1, report_to="none")
        Trainer(
            model_of("softmax"), arguments, train_dataset=[{"input_ids": ids, "labels": ids} for ids in tokens(4, 5)]
        ).train()

    mistakes: dict[str, Callable[[], object]] = {
        "plain, λ": lambda: plainly("diff_v1"),
        "plain, DEX": lambda: plainly("dex"),
        "two seeds": of_two_seeds,
        "twice": lambda: shard(shard(model_of("softmax"), mesh), mesh),
        "another model": lambda: shard(torch.nn.Linear(2, 2), mesh),  # type: ignore[type-var]
        "another mesh": lambda: shard(model_of("softmax"), init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))),
        "another number": lambda: mesh_for(1, shard="full", device="cpu"),
        "another dtype": lambda: shard(model_of("softmax"), mesh, dtype=torch.float16),
        "not sharded": lambda: check_sharded(model_of("softmax")),
        "another wrapper": asked_of_the_trainer,
    }
    said = {}
    for name, mistake in mistakes.items():
        try:
            mistake()
        except DiffattnError as error:
            said[name] = str(error)
    check_sharded(shard(model_of("softmax"), mesh))
    return said
