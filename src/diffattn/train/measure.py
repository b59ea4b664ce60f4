"""Measures the seconds and the memory of a training step, and the seconds to load a checkpoint, on this machine."""

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
    """The measured cost of a training step."""

    seconds: float
    """The median seconds of a step after the first."""
    peak_bytes: int
    """The most bytes of tensors alive at once within a step."""


@dataclass(frozen=True)
class LoadCost:
    """The measured cost of loading a model."""

    load_seconds: float
    """The median seconds of ``from_pretrained``."""
    first_token_seconds: float
    """The median seconds from a prompt of 32 tokens to the next token."""


def measure_step(model: DiffTransformerForCausalLM, data: PreparedData, recipe: Recipe, *, steps: int = 3) -> StepCost:
    """Trains ``model`` for a few steps, which change it, and measures them: forward, backward, clipping, AdamW.

    Peak memory counts the bytes that torch's allocator gives out: weights, gradients, optimizer state, activations and
    the workspace of kernels. It leaves out the interpreter and the libraries' own code and pools, so it does not depend
    on what ran before in the process. On CPU it is summed from the allocator's events in torch's profiler.
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
    """The most bytes of tensors alive at once while ``function`` runs, including the tensors ``alive`` before it.

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
    """Loads a model folder and writes one token, several times; the system has the files in its cache."""
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
