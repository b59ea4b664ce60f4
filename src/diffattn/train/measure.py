"""Measures the seconds and the memory of a training step, and the seconds to load a checkpoint, on this machine."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from diffattn.data.blocks import TrainingOrder
from diffattn.data.packing import PreparedData
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.heads.language import language_class
from diffattn.model.modeling import DiffTransformerLanguageModel
from diffattn.train.checkpoints.state import own_part
from diffattn.train.recipe import Recipe
from diffattn.train.spread.layout import Layout
from diffattn.train.spread.ranks import ALONE, Ranks
from diffattn.train.torch_private import memory_events
from diffattn.train.trainer import spread


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


def measure_step(
    model: DiffTransformerLanguageModel,
    data: PreparedData,
    recipe: Recipe,
    *,
    steps: int = 3,
    layout: Layout | None = None,
    ranks: Ranks = ALONE,
) -> StepCost:
    """Trains ``model`` for a few steps, which change it, and measures them: forward, backward, clipping, AdamW.

    All ranks call it and make each step together; each is told what it cost this rank.

    Peak memory counts the bytes that torch's allocator gives out: weights, gradients, optimizer state, activations and
    the workspace of kernels. It leaves out the interpreter and the libraries' own code and pools, so it does not depend
    on what ran before in the process. On CPU it is summed from the allocator's events in torch's profiler.
    """
    device = recipe.device
    model.to(device)
    part, parts = spread(model, recipe, layout or Layout(), ranks)
    placed = model.is_distributed_loading_by_transformers
    order = TrainingOrder(data.train, seed=recipe.seed, num_samples=recipe.batch_size)
    share = recipe.batch_size // parts
    ids = torch.stack([order[part * share + index]["input_ids"] for index in range(share)]).to(device)
    trained = DistributedDataParallel(model) if ranks.world > 1 and not placed else model
    autocast = recipe.dtype == "bfloat16" and not placed
    step = TrainingStep(trained, ids, autocast=autocast, passes=recipe.gradient_accumulation)
    step()
    peak = step.peak_bytes()
    return StepCost(median_seconds(step, steps, device), peak)


class TrainingStep:
    """A training step on the same tokens again and again: forward, backward, clipping, AdamW.

    Args:
        model: the model, bare or in a wrapper such as DDP, which each step changes; it is put into training mode.
        ids: the tokens (B, T), on the model's device.
        autocast: compute the products of the forward pass in bfloat16.
        passes: forward and backward passes of each step.
        options: further arguments of each forward pass.
    """

    def __init__(self, model: nn.Module, ids: Tensor, *, autocast: bool, passes: int = 1, **options: bool) -> None:
        self.model, self.ids, self.autocast, self.passes, self.options = model.train(), ids, autocast, passes, options
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def __call__(self, length: int | None = None) -> None:
        """Makes one step, on the first ``length`` tokens of each row."""
        ids = self.ids[:, :length]
        for _ in range(self.passes):
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.autocast):
                loss = self.model(ids, labels=ids, **self.options).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak_bytes(self) -> int:
        """The most bytes of tensors alive within one more step; call it after a step, which makes AdamW's state."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        kept = [
            *self.model.parameters(),
            *self.model.buffers(),
            *(s for s in states if isinstance(s, Tensor)),
            self.ids,
        ]
        return peak_bytes(self, map(own_part, kept), self.ids.device.type)


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
    kind = language_class(DiffTransformerConfig.from_pretrained(folder))
    # An encoder gives the logits of all tokens, and has no cache.
    last = {"logits_to_keep": 1, "use_cache": True} if kind.causal else {}
    for _ in range(repeats):
        began = time.perf_counter()
        model = kind.from_pretrained(folder).to(device).eval()
        loads.append(time.perf_counter() - began)
        prompt = torch.zeros(1, min(32, model.config.max_position_embeddings - 1), dtype=torch.long, device=device)
        began = time.perf_counter()
        with torch.no_grad():
            model(prompt, **last).logits.argmax().item()
        tokens.append(time.perf_counter() - began)
    return LoadCost(statistics.median(loads), statistics.median(tokens))


def median_seconds(function: Callable[[], None], repeats: int, device: str) -> float:
    """The median seconds of calls of a function; 0 without a call."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) if seconds else 0.0
