"""Functions that tests/model/test_sharding.py runs on ranks: models that are sharded, and what they compute."""

from __future__ import annotations

import dataclasses

import torch
from support.small_models import SHAPE, small_model, tokens
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.model.sharding import data_ranks, mesh_for, shard

# A vocabulary and a feed-forward width that two ranks cannot divide, and few layers.
UNEVEN = dataclasses.replace(SHAPE, num_layers=2)
MODELS: dict[str, tuple[str, dict]] = {
    "softmax": ("softmax", {}),
    "diff_v1": ("diff_v1", {"lambda_std": 0.4, "subln_affine": True, "qk_norm": True}),
    "diff_v2": ("diff_v2", {"tie_word_embeddings": True, "attention_bias": True}),
    "dex": ("dex", {"dex_heads": [[1, 5], [11, 2, 7]], "mlp_bias": True}),
    "gated": ("gated", {}),
}
BATCH, LENGTH = 4, 9


def model_of(name: str) -> DiffTransformerForCausalLM:
    attention, fields = MODELS[name]
    tied = fields.get("tie_word_embeddings", False)
    fields = {key: value for key, value in fields.items() if key != "tie_word_embeddings"}
    model = small_model(attention, shape=dataclasses.replace(UNEVEN, tie_word_embeddings=tied), **fields)
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


def errors(names: list[str], ways: list[tuple[str, int]], parts: int = 1) -> dict[str, tuple[float, str, float]]:
    """Compares models that are sharded in several ways with one process.

    Returns, by model and way: the difference of the losses, and the parameter whose gradient differs most, with the
    difference as a part of its largest number.
    """
    distributed.init_process_group("gloo")
    found = {}
    for name in names:
        alone, ids = model_of(name), tokens(BATCH, LENGTH)
        expected = step(alone, ids)
        for way, tensor in ways:
            mesh = mesh_for(distributed.get_world_size(), shard=way, tensor=tensor, per_host=2, device="cpu")
            part = data_ranks(mesh)
            model = shard(model_of(name), mesh)
            loss = step(model, ids.chunk(part.parts)[part.part], parts=parts)
            distributed.all_reduce(loss)
            loss /= distributed.get_world_size()
            far = {}
            for key, weight in alone.named_parameters():
                gradient = whole(model.get_parameter(key).grad)
                far[key] = float((gradient - weight.grad).abs().max() / weight.grad.abs().max())
            worst = max(far, key=far.get)
            found[f"{name} {way} {tensor}"] = float(loss - expected), worst, far[worst]
    return found
