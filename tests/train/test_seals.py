"""A number that somebody changed in a run folder is noticed; a folder from before there were seals still goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.small_run import (
    StoppedError,
    assert_same_run,
    at,
    checkpoint_steps,
    run,
    stop,
    without_seals,
)

from diffattn.data.packing import PreparedData
from diffattn.errors import CheckpointError
from diffattn.sealed import read_sealed, sealed, unbroken
from diffattn.train.record import read_result


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def edit_row(folder: Path, index: int, **values: Any) -> None:
    """Another value in a row of the metrics; a negative index counts from the end."""
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[index] |= values
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_refused(folder: Path, data: PreparedData, *words: str) -> None:
    """One line that holds the words, and nothing in the folder is another."""
    before = contents(folder)
    with pytest.raises(CheckpointError) as raised:
        run(data, folder, resume=True)
    line = str(raised.value)
    assert "\n" not in line
    for word in (*words, "restore the file, or start again with another --out"):
        assert word in line
    assert contents(folder) == before


CHANGES_OF_A_CUT_RUN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a loss": (lambda folder: edit_row(folder, 1, loss=0.5), "metrics.jsonl was changed after the checkpoint of step"),
    "a held-out loss": (lambda folder: edit_row(folder, 4, val_loss=0.5), "metrics.jsonl was changed"),
    "seconds": (lambda folder: edit_row(folder, 0, seconds=0.001), "metrics.jsonl was changed"),
    "a row less": (
        lambda folder: (folder / "metrics.jsonl").write_text("".join(
            (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[1:]
        )),
        "metrics.jsonl was changed",
    ),
    "a cut file": (lambda folder: (folder / "metrics.jsonl").write_text(""), "metrics.jsonl ends before step 6"),
    "steps": (
        lambda folder: edit(folder / "config.json", lambda all_: all_ | {"recipe": all_["recipe"] | {"steps": 7}}),
        "config.json was changed after it was written",
    ),
    "a config without its seal": (
        lambda folder: edit(folder / "config.json", lambda config: {k: config[k] for k in config if k != "seal"}),
        "config.json was changed after the checkpoint of step 6",
    ),
    "half a config": (
        lambda folder: edit(folder / "config.json", lambda config: sealed({k: config[k] for k in ("recipe", "model")})),
        "config.json is damaged (data is no object)",
    ),
    "another run's config": (
        lambda folder: edit(folder / "config.json", lambda config: sealed(config | {"options": {"text": "other"}})),
        "config.json was changed after the checkpoint of step 6",
    ),
    "a manifest without the run's files": (
        lambda folder: edit(
            folder / "checkpoint-6/manifest.json", lambda named: {k: named[k] for k in named if k[0] != "."}
        ),
        "checkpoint-6/manifest.json was changed after it was written",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES_OF_A_CUT_RUN)
def test_a_run_that_was_cut_and_changed_is_refused(change: str, stopped: Path, data: PreparedData) -> None:
    apply, words = CHANGES_OF_A_CUT_RUN[change]
    apply(stopped)
    is_refused(stopped, data, words)


def test_a_config_is_sealed_before_there_is_a_checkpoint(data: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        run(data, tmp_path, on_progress=at(1, stop))
    assert checkpoint_steps(tmp_path) == []
    edit(tmp_path / "config.json", lambda config: config | {"recipe": config["recipe"] | {"learning_rate": 0.5}})
    is_refused(tmp_path, data, "config.json was changed after it was written")


def test_what_was_measured_behind_the_last_checkpoint_is_measured_again(
    stopped: Path, whole: Path, data: PreparedData
) -> None:
    edit_row(stopped, -1, loss=0.001)
    run(data, stopped, resume=True)
    assert_same_run(stopped, whole)


def replaced(folder: Path, **numbers: object) -> None:
    (folder / "result.json").write_text(json.dumps(numbers))


GOOD = {"val_loss": 4.0, "bits_per_byte": 2.0, "train_tokens_per_second": 9.0}
CHANGES_OF_A_FINISHED_RUN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a number": (
        lambda folder: edit(folder / "result.json", lambda result: result | {"val_loss": 0.1}),
        "result.json was changed after it was written",
    ),
    "other numbers": (lambda folder: replaced(folder, **GOOD), "result.json was changed after it was written"),
    "no numbers": (lambda folder: replaced(folder, **{**GOOD, "val_loss": None}), "result.json is damaged"),
    "a text": (lambda folder: replaced(folder, **{**GOOD, "bits_per_byte": "2.0"}), "result.json is damaged"),
    "a huge number": (lambda folder: replaced(folder, **{**GOOD, "val_loss": 10**400}), "result.json is damaged"),
    "no file of the model": (
        lambda folder: (folder / "model/tokenizer.json").unlink(), "model/tokenizer.json is missing, or was changed"
    ),
    "a weight": (
        lambda folder: (folder / "model/model.safetensors").write_bytes(
            (folder / "model/model.safetensors").read_bytes()[:-1] + b"x"
        ),
        "model/model.safetensors is missing, or was changed",
    ),
    "a loss": (lambda folder: edit_row(folder, 1, loss=0.5), "metrics.jsonl is missing, or was changed"),
    "the last loss": (lambda folder: edit_row(folder, -1, val_loss=0.5), "metrics.jsonl is missing, or was changed"),
    "the speed": (lambda folder: edit_row(folder, -1, seconds=0.5), "metrics.jsonl is missing, or was changed"),
    "the recipe": (
        lambda folder: edit(folder / "config.json", lambda config: config | {"recipe": {}}),
        "config.json was changed after it was written",
    ),
    "every seal but the checkpoint's": (
        lambda folder: [
            edit(folder / name, lambda content: {k: content[k] for k in content if k != "seal"})
            for name in ("config.json", "result.json")
        ],
        "result.json was changed after it was written: its seal is gone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES_OF_A_FINISHED_RUN)
def test_a_finished_run_that_was_changed_is_refused(
    change: str, whole: Path, data: PreparedData, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    apply, words = CHANGES_OF_A_FINISHED_RUN[change]
    apply(folder)
    is_refused(folder, data, words)


def test_a_result_of_another_run_is_not_taken(whole: Path, data: PreparedData, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run(data, other, resume=False, on_progress=None)
    shutil.copy(whole / "result.json", other)
    # Equal but for the seconds, which are in the rows that the result seals.
    is_refused(other, data, "metrics.jsonl is missing, or was changed after the run ended")


def test_a_finished_run_from_before_there_were_seals_is_taken_and_it_is_said(
    whole: Path, data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    without_seals(folder)
    result = run(data, folder, resume=True)
    assert capsys.readouterr().err.endswith("its numbers are taken as they are\n")
    expected = read_result(whole)
    assert expected is not None
    assert (result.val_loss, result.bits_per_byte) == (expected.val_loss, expected.bits_per_byte)


def test_a_seal_is_of_everything_else_in_the_object(tmp_path: Path) -> None:
    content = sealed({"a": [1, 2.5, None, "\udcff"], "b": {"c": True}})
    file = tmp_path / "file.json"
    file.write_text(json.dumps(content))
    assert read_sealed(file, way_out="mend it") == content
    for changed in ({"a": [1, 2.5, None, ""]}, {"b": {"c": False}}, {"d": 0}, {"seal": "0"}, {"seal": 5}):
        assert not unbroken(content | changed)
    assert unbroken({"a": 1})
