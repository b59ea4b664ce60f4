"""What a run refuses, and how it ends where a file is damaged or numbers stop being numbers."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.small_run import RECIPE, StoppedError, assert_same_run, at, checkpoint_steps, rows, run, small_model, stop

from diffattn.data.packing import PreparedData
from diffattn.errors import CheckpointError, ConfigError, TrainingError
from diffattn.train.recipe import Recipe
from diffattn.train.run import read_result, train


def test_a_finished_run_is_not_trained_again(whole: Path, data: PreparedData) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    result = run(data, whole, resume=True, on_progress=lambda progress: pytest.fail("trained"))
    assert result == read_result(whole)
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


def test_a_folder_that_holds_a_run_is_refused(whole: Path, data: PreparedData) -> None:
    with pytest.raises(
        ConfigError, match=f"{whole} holds a run already; wanted a new folder: continue it with --resume or choose"
    ):
        run(data, whole)


@pytest.mark.parametrize(
    ("recipe", "attention", "words"),
    [
        (dataclasses.replace(RECIPE, steps=12), "diff_v1", "recipe steps = 11, now it is 12"),
        (dataclasses.replace(RECIPE, learning_rate=0.5), "diff_v1", "recipe learning_rate = 0.002, now it is 0.5"),
        (RECIPE, "diff_v2", "model attention = 'diff_v1', now it is 'diff_v2'"),
    ],
)
def test_a_changed_setting_is_named(
    recipe: Recipe, attention: str, words: str, whole: Path, data: PreparedData
) -> None:
    with pytest.raises(
        ConfigError, match=f"{words}; wanted the same settings: resume with the same settings or choose another --out"
    ):
        train(small_model(attention), data, recipe, whole, resume=True)


def test_a_folder_that_cannot_be_written(data: PreparedData, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "run"
    for folder, words in [
        (tmp_path / "file", "is a file; wanted a new or an empty folder: choose another folder with --out"),
        (
            below,
            rf"cannot write to {below} \(Not a directory\); wanted a folder that can be written",
        ),
    ]:
        with pytest.raises(ConfigError, match=words):
            run(data, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_attention_function_that_is_not_there_is_refused_and_eager_is_used(
    data: PreparedData, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="attn_implementation is 'nonsense'"):
        run(data, tmp_path / "run", dataclasses.replace(RECIPE, attn_implementation="nonsense"))
    assert list(tmp_path.iterdir()) == []
    model = small_model()
    train(model, data, dataclasses.replace(RECIPE, attn_implementation="eager"), tmp_path / "run")
    assert model.config._attn_implementation == "eager"
    for eager, sdpa in zip(rows(tmp_path / "run"), rows(whole), strict=True):
        assert eager == pytest.approx(sdpa, rel=1e-4)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "metrics.jsonl").unlink(), "metrics.jsonl ends before step 6 of the checkpoint"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json. is damaged"),
    ],
)
def test_files_of_a_run_that_were_damaged(
    damage: Callable[[Path], object], words: str, data: PreparedData, tmp_path: Path
) -> None:
    with pytest.raises(StoppedError):
        run(data, tmp_path, on_progress=at(7, stop))
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        run(data, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("step", "fields", "words", "kept"),
    [
        (7, {}, r"the loss at step 8 is nan \(gradient norm nan\)", [3, 6]),
        (4, {}, "the held-out loss at step 4 is nan", [3]),
        (6, {"evaluations": 0}, "after step 6 a weight is infinite or NaN", [3]),
        (11, {}, "the held-out loss at step 11 is nan", [6, 9]),
    ],
)
def test_a_run_that_diverged_ends_with_a_message_and_keeps_the_last_good_checkpoint(
    step: int, fields: dict, words: str, kept: list[int], data: PreparedData, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(RECIPE, **fields)
    model, folder = small_model(), tmp_path / "run"
    poison = at(step, lambda: model.model.norm.weight.data.fill_(math.nan))
    with pytest.raises(TrainingError, match=f"^{words}; wanted a finite number: .* lower --learning-rate") as raised:
        train(model, data, recipe, folder, on_progress=poison)
    assert "\n" not in str(raised.value)
    assert checkpoint_steps(folder) == kept
    for checkpoint in folder.glob("checkpoint-*"):
        tensors = load_file(checkpoint / "shard-1-of-1.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    assert not (folder / "result.json").exists()
    run(data, folder, recipe, resume=True)
    run(data, tmp_path / "whole", recipe)
    assert_same_run(folder, tmp_path / "whole")


def test_an_absurd_learning_rate_ends_the_run_with_a_message(data: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="wanted a finite number"):
        run(data, tmp_path, dataclasses.replace(RECIPE, learning_rate=1e38))
