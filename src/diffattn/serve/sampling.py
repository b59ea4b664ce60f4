"""Draws the next token of each request in a batch with the request's own temperature, penalties and seed.

A draw is the argmax of ``logit / temperature + noise``, where the noise of the t-th token of a request is a function
of its seed and t alone (Gumbel-max). So requests that are greedy and requests that draw share one batch, whose argmax
the engine takes, and a seed gives the same text whatever else is in the batch. Source of the noise: the counter-based
generator Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from diffattn.model.options import GREEDY_BELOW

# OpenAI's interface says this of a token that is less likely, since JSON has no infinity.
LEAST_LOGPROB = -9999.0


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The options of one answer, as in ``openai_request.Asked``, with every default filled in.

    Args:
        prompt: the ids of the prompt, which ``repetition_penalty`` counts, too.
        likelihoods: takes the model's own probabilities for each token; None where they are not asked for.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    prompt: Sequence[int] = ()
    likelihoods: Likelihoods | None = None

    @property
    def draws(self) -> bool:
        return self.temperature >= GREEDY_BELOW

    @property
    def plain(self) -> bool:
        """True where the next token is the likeliest, whatever came before."""
        penalties = self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1
        return not (self.draws or penalties or self.logit_bias)

    @cached_property
    def prompt_tokens(self) -> Tensor:
        """Each token of the prompt once, int64 ``(tokens,)``."""
        return torch.tensor(self.prompt, dtype=torch.long).unique()


class Likelihoods:
    """The logarithms of the model's own probabilities for the tokens of one answer, before any option shapes them.

    The engine's thread notes them for a place of the answer, then gives the token there; then the server takes them.

    Args:
        top: how many of the likeliest tokens are wanted beside the one that was taken.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._places: dict[int, tuple[Tensor, list[tuple[int, float]]]] = {}

    def note(self, place: int, logits: Tensor) -> None:
        """Notes the probabilities that logits ``(V,)`` give the token at ``place`` of the answer."""
        logprobs = logits.float().log_softmax(-1).clamp(min=LEAST_LOGPROB)
        values, tokens = logprobs.topk(min(self._top, len(logprobs)))
        self._places[place] = logprobs, list(zip(tokens.tolist(), values.tolist(), strict=True))

    def take(self, place: int, token: int) -> tuple[float, list[tuple[int, float]]]:
        """Returns those of the token that was taken at ``place``, and of the likeliest ones there."""
        logprobs, likeliest = self._places.pop(place)
        return float(logprobs[token]), likeliest


def shape_logits(logits: Tensor, sampling: Sampling, answer: Sequence[int]) -> Tensor:
    """Returns float32 logits ``(V,)`` whose argmax is the next token behind the tokens ``answer``."""
    if sampling.logit_bias:
        tokens = torch.tensor(list(sampling.logit_bias), device=logits.device)
        logits = logits.index_add(0, tokens, logits.new_tensor(list(sampling.logit_bias.values())))
    if sampling.repetition_penalty != 1:
        seen = torch.cat([sampling.prompt_tokens, torch.tensor(answer, dtype=torch.long)]).unique().to(logits.device)
        once = logits[seen]
        penalty = sampling.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(once < 0, once * penalty, once / penalty))
    if answer and (sampling.frequency_penalty or sampling.presence_penalty):
        count = torch.bincount(torch.tensor(answer), minlength=len(logits)).to(logits)
        logits = logits - sampling.frequency_penalty * count - sampling.presence_penalty * (count > 0)
    if not sampling.draws:
        return logits
    row = (logits / sampling.temperature)[None]
    if sampling.top_k:
        row = TopKLogitsWarper(sampling.top_k)(None, row)
    if sampling.top_p < 1:
        row = TopPLogitsWarper(sampling.top_p)(None, row)
    if sampling.min_p:
        row = MinPLogitsWarper(sampling.min_p)(None, row)
    generator = np.random.Generator(np.random.Philox(key=sampling.seed % 2**64, counter=[0, 0, 0, len(answer)]))
    # The draw is in float64, which is never 0: minus the logarithm of an exponential is a Gumbel.
    noise = -np.log(generator.standard_exponential(len(logits)))
    return row[0] + torch.from_numpy(noise).to(row)
