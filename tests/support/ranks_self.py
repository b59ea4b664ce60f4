"""Functions that tests/test_ranks.py runs on ranks."""

from __future__ import annotations

import os
import time

import torch
from torch import distributed


def summed(start: int) -> tuple[int, int]:
    """Returns the rank and the sum over all ranks of ``start`` plus the rank."""
    distributed.init_process_group("gloo")
    value = torch.tensor(start + distributed.get_rank())
    distributed.all_reduce(value)
    return distributed.get_rank(), int(value)


def one_fails() -> None:
    """Raises on rank 1, while the others wait for long."""
    if os.environ["RANK"] == "1":
        raise ValueError("rank 1 cannot")
    time.sleep(600)
