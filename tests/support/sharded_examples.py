"""A function that tests/test_examples.py runs on ranks: the examples that train a sharded model."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import torch
from support.small_run import SHAPE

STEPS, BATCH = 3, 4


def losses(examples: str, out: str) -> dict[str, list[float]]:
    """Returns the loss of each step, in nats per token, by example; the models compute in float32."""
    sys.path.insert(0, examples)
    warnings.simplefilter("ignore")
    found = {}
    for ways, tensor in (("full", 1), ("none", 1)):
        model = str(Path(out) / "loop")
        loop = importlib.import_module("loop")
        found[f"loop {ways}"] = loop.main(SHAPE, STEPS, BATCH, torch.float32, ways, tensor, model)
    found["with_accelerate"] = importlib.import_module("with_accelerate").main(SHAPE, STEPS, BATCH, torch.float32)
    trainer = importlib.import_module("with_trainer")
    found["with_trainer"] = trainer.main(SHAPE, STEPS, BATCH, torch.float32, str(Path(out) / "trainer"))
    return found
