"""What a training step and a checkpoint cost on this machine, measured."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from diffattn.data.packing import PreparedData, TrainingOrder
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.train.recipe import Recipe
from diffattn.train.torch_private import memory_events


@dataclass(frozen=True)
class StepCost:
    """``seconds`` of a settled training step (median) and the ``peak_bytes`` of tensors alive within one."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class LoadCost:
    """``load_seconds`` of ``from_pretrained``, and ``first_token_seconds`` from a 32-token prompt to the next token."""

    load_seconds: float
    first_token_seconds: float


def measure_step(model: DiffTransformerForCausalLM, data: PreparedData, recipe: Recipe, *, steps: int = 3) -> StepCost:
    """Train ``model`` for a few steps (it is changed) and measure them: forward, backward, clipping, AdamW.

    Peak memory counts what torch's allocator hands out: weights, gradients, optimizer state, activations and the
    workspace of kernels. It leaves out the interpreter and the libraries' own code and pools, so it does not depend on
    what ran before in the process. On CPU it is summed from the allocator's events in torch's profiler.
    """
    device = recipe.device
    model.to(device).train()
    order = TrainingOrder(data.train, seed=recipe.seed, num_samples=recipe.batch_size)
    ids = torch.stack([order[index]["input_ids"] for index in range(recipe.batch_size)]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        for _ in range(recipe.gradient_accumulation):
            with torch.autocast(device, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
                loss = model(ids, labels=ids).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    peak = peak_bytes(step, [*model.parameters(), *model.buffers(), *states, ids], device)
    return StepCost(_median_seconds(step, steps, device), peak)


def peak_bytes(function: Callable[[], None], alive: Iterable[Tensor], device: str) -> int:
    """Most bytes of tensors alive at once while ``function`` runs, the tensors ``alive`` before it included.

    On CPU ``function`` must not free those: the profiler does not see the end of what began before it.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    # Else the profiler's library prints a line at every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    total = peak = sum(storages.values())
    for event in memory_events(profiler):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def measure_load(folder: Path, device: str, *, repeats: int = 3) -> LoadCost:
    """Load a model folder and give one token, several times; medians, with the files in the system's cache."""
    loads, tokens = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        model = DiffTransformerForCausalLM.from_pretrained(folder).to(device).eval()
        loads.append(time.perf_counter() - began)
        prompt = torch.zeros(1, min(32, model.config.max_position_embeddings - 1), dtype=torch.long, device=device)
        began = time.perf_counter()
        with torch.no_grad():
            model(prompt, logits_to_keep=1, use_cache=True).logits.argmax().item()
        tokens.append(time.perf_counter() - began)
    return LoadCost(statistics.median(loads), statistics.median(tokens))


def _median_seconds(function: Callable[[], None], repeats: int, device: str) -> float:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
