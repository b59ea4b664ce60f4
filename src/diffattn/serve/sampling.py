"""How each request of one batch draws its next token: its own temperature, penalties and seed.

A draw is the argmax of ``logit / temperature + noise``, where the noise of the t-th token of a request is a function
of its seed and t alone (Gumbel-max). So requests that are greedy and requests that draw share one batch, whose argmax
the engine takes, and a seed gives the same text whatever else is in the batch. Source of the noise: the counter-based
generator Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """As of ``openai_request.Asked``, with every default filled in."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


def shape_logits(logits: Tensor, sampling: Sampling, answer: Sequence[int]) -> Tensor:
    """Float32 logits ``(V,)`` whose argmax is the next token of a request that has answered ``answer`` so far."""
    if sampling.logit_bias:
        tokens = torch.tensor(list(sampling.logit_bias), device=logits.device)
        logits = logits.index_add(0, tokens, logits.new_tensor(list(sampling.logit_bias.values())))
    if answer and (sampling.frequency_penalty or sampling.presence_penalty):
        count = torch.bincount(torch.tensor(answer), minlength=len(logits)).to(logits)
        logits = logits - sampling.frequency_penalty * count - sampling.presence_penalty * (count > 0)
    if sampling.temperature == 0:
        return logits
    row = (logits / sampling.temperature)[None]
    if sampling.top_k:
        row = TopKLogitsWarper(sampling.top_k)(None, row)
    if sampling.top_p < 1:
        row = TopPLogitsWarper(sampling.top_p)(None, row)
    generator = np.random.Generator(np.random.Philox(key=sampling.seed % 2**64, counter=[0, 0, 0, len(answer)]))
    # In float64, which is never 0: minus the logarithm of an exponential is a Gumbel.
    noise = -np.log(generator.standard_exponential(len(logits)))
    return row[0] + torch.from_numpy(noise).to(row)


class RequestSampling(ContinuousBatchingLogitsProcessor):
    """Shapes each row of a batch's logits as its request asks, which ``add_request(..., sampling=...)`` gave."""

    supported_kwargs: dict[str, type] = MappingProxyType({"sampling": Sampling})  # type: ignore[assignment]
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._requests: list[Any] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        # A tensor of numbers cannot hold a request; the engine that runs without graphs calls this, then __call__.
        self._requests = [request.state for request in requests_with_new_token]
        return torch.zeros(0, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        for row, state in enumerate(self._requests):
            sampling = state.logit_processor_kwargs.get("sampling")
            if sampling is not None and sampling != _GREEDY:
                # What an evicted request had answered is part of its new prompt; the output tells them apart.
                scores[row] = shape_logits(scores[row], sampling, state.to_generation_output().generated_tokens)
        return scores


_GREEDY = Sampling()


def per_request() -> ContinuousBatchingLogitsProcessorList:
    """The engine's processors where every request brings its own :class:`Sampling`."""
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([RequestSampling()]))
    # One line of the batch's input, which stays empty.
    processors.tensors_required = 1
    return processors
