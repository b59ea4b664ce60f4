"""Runs that tests train on several ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from support.small_run import RECIPE, SHAPE, prepare

from diffattn.errors import DiffattnError
from diffattn.model.pairing import build_pair
from diffattn.train.run import train
from diffattn.train.spread.layout import Layout
from diffattn.train.spread.ranks import tell

# So many heads that two ranks share those of V1's call.
HEADS = dataclasses.replace(SHAPE, num_kv_heads=4)
TWENTY = dataclasses.replace(RECIPE, steps=20, batch_size=8, evaluations=2, checkpoints=2)


def trained(folder: Path, out: str, attention: str, layout: dict[str, Any], options: dict[str, Any]) -> list[int]:
    """Trains a small model in ``folder / out``; returns the steps that this rank was told of."""
    torch.set_num_threads(1)
    seen: list[int] = []
    train(
        build_pair(HEADS, attention, seed=0).model,
        prepare(folder),
        dataclasses.replace(TWENTY, **options),
        folder / out,
        layout=Layout(**layout),
        resume=(folder / out).exists(),
        on_progress=lambda step: seen.append(step.step),
    )
    return seen


def all_trained(
    folder: Path, out: str, attentions: list[str], layout: dict[str, Any], options: dict[str, Any]
) -> list[list[int]]:
    """Trains a model of each variant, one after another, in ``folder / OUT-VARIANT``."""
    return [trained(folder, f"{out}-{attention}", attention, layout, options) for attention in attentions]


def failing(folder: Path, out: str, layout: dict[str, Any], options: dict[str, Any]) -> tuple[int, str]:
    """Returns the status with which this rank ends, and what it says."""
    said: list[str] = []
    try:
        trained(folder, out, "diff_v1", layout, options)
    except DiffattnError as error:
        return tell(2, lambda message=str(error): said.append(message)), "".join(said)
    return 0, ""
