"""Runs on several ranks: the same losses as in one process, one folder, and one line where they cannot go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support import trained_ranks
from support.ranks import run_ranks
from support.small_run import prepare, rows

VARIANTS = ["softmax", "diff_v1", "diff_v2"]
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "2 copies": (2, {}, {}),
    "4 copies": (4, {}, {}),
    "shared out over 2": (2, {"shard": "full"}, {}),
    "2 parts of each layer, shared out over 2": (4, {"shard": "full", "tensor_parallel": 2}, {}),
    "2 passes in a step": (2, {"shard": "full", "checkpointing": True}, {"batch_size": 4, "gradient_accumulation": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, and a run of one process for each variant."""
    made = tmp_path_factory.mktemp("ranks")
    prepare(made)
    trained_ranks.all_trained(made, "alone", VARIANTS, {}, {})
    return made


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_train_as_one_process_does(name: str, folder: Path) -> None:
    count, layout, options = LAYOUTS[name]
    told = run_ranks(trained_ranks.all_trained, count, folder, name, VARIANTS, layout, options)
    assert told == [[list(range(1, 21))] * 3, *[[[]] * 3] * (count - 1)]
    for attention in VARIANTS:
        found, expected = rows(folder / f"{name}-{attention}"), rows(folder / f"alone-{attention}")
        for row, right in zip(found, expected, strict=True):
            assert row == pytest.approx(right, abs=1e-5, rel=1e-5)
        weights, right = (
            load_file(folder / f"{run}-{attention}" / "model" / "model.safetensors") for run in (name, "alone")
        )
        assert weights.keys() == right.keys()
        for weight in right:
            assert weights[weight].dtype == right[weight].dtype
            # AdamW takes the sign of a gradient that is nearly nothing.
            assert (weights[weight] - right[weight]).abs().max() < 1e-3
