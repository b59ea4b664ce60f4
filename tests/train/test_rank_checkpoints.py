"""Checkpoints of many ranks: the same state and the same losses on any number of them, and nothing lost to a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import rank_checkpoints
from support.rank_checkpoints import SAVED, Training
from support.ranks import outcomes_of_ranks, run_ranks
from torch.distributed import checkpoint as dcp

from diffattn.errors import CheckpointError
from diffattn.train.checkpoints.loading import load
from diffattn.train.checkpoints.sealing import checkpoints, defect, last_good

# Sums of float32 in another order, over three steps.
SAME_LOSS = 2e-6
WRITERS = {"one": 1, "ddp": 2, "full": 2, "tensor": 4}
READERS = {1: ["one"], 2: ["ddp", "full"], 4: ["tensor"]}


def on_ranks(function: Any, count: int, *arguments: Any) -> Any:
    """What rank 0 returns; one rank is this process."""
    return function(*arguments) if count == 1 else run_ranks(function, count, *arguments)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[float], dict[str, Any]]]:
    """The checkpoint of each way to spread a model, the losses of the run that wrote it, and what was saved."""
    found = {}
    for way, count in WRITERS.items():
        run = tmp_path_factory.mktemp(way)
        losses, state = on_ranks(rank_checkpoints.train_and_save, count, run, way)
        found[way] = (run / f"checkpoint-{SAVED}", losses, state)
    return found


def test_every_rank_writes_a_part_and_no_pickle(saved: dict[str, Any]) -> None:
    for way, count in WRITERS.items():
        folder, _, _ = saved[way]
        shards = {f"shard-{rank + 1}-of-{count}.safetensors" for rank in range(count)}
        assert {path.name for path in folder.iterdir()} == {*shards, "state.json", "manifest.json"}
        assert defect(folder) is None
        sizes = [(folder / name).stat().st_size for name in shards]
        # The parts are shared out: none is much larger than another.
        assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize("count", READERS)
@pytest.mark.parametrize("way", WRITERS)
def test_any_number_of_ranks_goes_on_from_any_other_with_the_same_losses(
    way: str, count: int, saved: dict[str, Any]
) -> None:
    folder, losses, state = saved[way]
    found = on_ranks(rank_checkpoints.go_on, count, folder, READERS[count])
    for reader, (after, loaded) in found.items():
        assert loaded == state, reader
        assert after == pytest.approx(losses[SAVED:], abs=SAME_LOSS, rel=0), reader
        if (reader, count) == (way, WRITERS[way]):
            assert after == losses[SAVED:]
    assert losses == pytest.approx(saved["one"][1], abs=SAME_LOSS, rel=0)


def test_dcp_reads_a_checkpoint_without_us(saved: dict[str, Any]) -> None:
    folder, _, state = saved["tensor"]
    model = Training("one").model
    weights = {f"model.{name}": weight for name, weight in model.named_parameters()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(weights, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    assert {name: rank_checkpoints.digest(weight) for name, weight in weights.items()} == {
        name: value for name, value in state.items() if name.startswith("model.")
    }


def test_a_checkpoint_of_another_model_is_refused_and_the_first_difference_is_named(saved: dict[str, Any]) -> None:
    folder, _, _ = saved["full"]
    other = Training("one", "softmax").model
    with pytest.raises(CheckpointError) as raised:
        load(folder, other)
    assert str(raised.value) == (
        f"{folder} is of another model: model.model.layers.0.self_attn.lam.lambda_k1 is 8 of float32 in it, and "
        "unknown in this model; wanted a checkpoint of the same model: restore the file, or start again with another "
        "--out"
    )


ENDS = {
    "rank 1 is killed": "TrainingError: a checkpoint could not be completed: a rank has ended, or was too slow",
    "rank 0 is killed before the manifest": "TrainingError: a checkpoint could not be completed: a rank has ended",
    "the disk of rank 1 is full": "TrainingError: the disk is full: could not write ",
    "rank 1 may not write": "TrainingError: rank 1 could not write its part of a checkpoint ([Errno 13] Permission",
    "rank 0 may not seal": "TrainingError: rank 0 could not write its part of a checkpoint ([Errno 13] Permission",
    "rank 1 does not see the folder": "ConfigError: ",
}


@pytest.mark.parametrize("point", ENDS)
def test_a_save_that_one_rank_does_not_complete_leaves_the_last_sealed_checkpoint(point: str, tmp_path: Path) -> None:
    rank, _ = rank_checkpoints.FAILURES[point]
    outcomes = outcomes_of_ranks(rank_checkpoints.fail_in_second_save, 2, tmp_path, point)
    assert outcomes[1 - rank].value.startswith(ENDS[point])
    assert "\n" not in outcomes[1 - rank].value
    if "killed" in point:
        assert outcomes[rank].exitcode == -9
    assert [step for step, _ in checkpoints(tmp_path)] == [1]
    assert last_good(tmp_path)[0] == (1, tmp_path / "checkpoint-1")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    torch.manual_seed(0)
    Training("one").load(tmp_path / "checkpoint-1")
