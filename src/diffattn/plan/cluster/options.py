"""The options of a plan on a cluster, in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """A cluster as a person describes it, and how much is to be trained on it."""

    cluster: str | None = None
    """Also plan training on a cluster: a number, x and a machine, such as 64xH100. Without --model it plans the paper's
    models of 3B and 13B, each beside the softmax model of its size."""
    tokens: str = "1T"
    """Number of tokens to train on."""
    step_tokens: str = "4M"
    """Number of tokens in one step of the optimizer, over all GPUs (the paper's 3B model: 4M)."""
    utilization: float = 0.4
    """Part of the peak rate at which arithmetic is assumed to run, above 0 and at most 1."""
    link_inside: str | None = None
    """Bandwidth between two GPUs of a host, each way, such as 450GB/s. Default: as the machine's data sheet says."""
    link_between: str | None = None
    """Bandwidth between hosts for each GPU, each way, such as 400Gb/s. Default: that of the maker's own servers."""
