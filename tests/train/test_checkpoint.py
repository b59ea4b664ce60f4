"""A checkpoint that is not whole is named and passed over; a disk that is full ends a run and loses nothing."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.small_run import RECIPE, assert_same_run, checkpoint_steps, partials, run

from diffattn.data.packing import PreparedData
from diffattn.errors import CheckpointError
from diffattn.train.checkpoints import sealing

SHARD = "shard-1-of-1.safetensors"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    (SHARD, cut, f"{SHARD} is not what was written"),
    (SHARD, flip, f"{SHARD} is not what was written"),
    (SHARD, Path.unlink, f"{SHARD} is missing"),
    ("state.json", flip, "state.json is not what was written"),
    ("state.json", lambda file: file.write_bytes(b""), "(0 bytes of"),
    ("trainer_state.json", Path.unlink, "trainer_state.json is missing"),
    ("manifest.json", Path.unlink, "it has no manifest, so it was not completed"),
    ("manifest.json", cut, "its manifest is damaged"),
    ("manifest.json", lambda file: file.write_text("{}"), "its manifest names no files"),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    stopped: Path,
    whole: Path,
    data: PreparedData,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    damage(stopped / "checkpoint-6" / name)
    run(data, stopped, resume=True)
    notes = [line for line in capsys.readouterr().err.split("\n") if "skipped" in line]
    assert len(notes) == 1
    assert notes[0].startswith(f"{stopped}: skipped checkpoint-6: ")
    assert reason in notes[0]
    assert notes[0].endswith("it is kept as damaged-checkpoint-6")
    assert (stopped / "damaged-checkpoint-6").is_dir()
    assert_same_run(stopped, whole)


def test_without_a_good_checkpoint_the_run_begins_again(
    stopped: Path, whole: Path, data: PreparedData, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (3, 6):
        flip(stopped / f"checkpoint-{step}" / SHARD)
    seen: list[int] = []
    run(data, stopped, resume=True, on_progress=lambda progress: seen.append(progress.step))
    assert seen == list(range(1, RECIPE.steps + 1))
    assert capsys.readouterr().err.count("skipped checkpoint-") == 2
    assert_same_run(stopped, whole)


def test_a_half_written_checkpoint_is_named_and_removed(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.rename(stopped / "checkpoint-6", stopped / "checkpoint-6.partial")
    assert sealing.last_good(stopped) == (
        (3, stopped / "checkpoint-3"),
        ["skipped checkpoint-6.partial: the run ended while it was being written"],
    )
    assert partials(stopped) == []


def test_one_without_a_mark_is_removed_where_it_holds_nothing_or_parts_of_ranks(tmp_path: Path) -> None:
    """A process can be killed before it marks the folder, and a rank can write after another has removed the mark."""
    (tmp_path / "checkpoint-6.a1b2c3d4.partial").mkdir()
    (tmp_path / "checkpoint-9.a1b2c3d4.partial").mkdir()
    (tmp_path / "checkpoint-9.a1b2c3d4.partial" / "mine").touch()
    (tmp_path / "checkpoint-9.partial").mkdir()
    (tmp_path / "checkpoint-12.a1b2c3d4.partial" / "new").mkdir(parents=True)
    (tmp_path / "checkpoint-12.a1b2c3d4.partial" / "new" / "shard-3-of-4.safetensors").touch()
    start, said = sealing.last_good(tmp_path)
    assert start is None
    assert sorted(said) == [
        f"skipped checkpoint-{step}.a1b2c3d4.partial: the run ended while it was being written" for step in (12, 6)
    ]
    assert sorted(partials(tmp_path)) == ["checkpoint-9.a1b2c3d4.partial", "checkpoint-9.partial"]


def test_a_checkpoint_of_an_earlier_version_is_refused_and_left_as_it_is(stopped: Path, data: PreparedData) -> None:
    for name in ("checkpoint-3", "checkpoint-6"):
        (stopped / name / SHARD).rename(stopped / name / "optimizer.pt")
        (stopped / name / "manifest.json").unlink()
        sealing.seal(stopped / name, {})
    before = contents(stopped)
    with pytest.raises(CheckpointError) as raised:
        run(data, stopped, resume=True)
    assert str(raised.value) == (
        f"{stopped}/checkpoint-6 was written by an earlier version of diffattn, in a format that holds a pickle; "
        "wanted a checkpoint of this version: finish the run with the version that began it, or start again with "
        "another --out"
    )
    assert contents(stopped) == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    for name in ("checkpoint-", "checkpoint-x", "checkpoint-3-mine", "my-checkpoint-3"):
        (tmp_path / name).mkdir()
    assert sealing.last_good(tmp_path) == (None, [])
    sealing.prune(tmp_path, 1)
    assert len(list(tmp_path.iterdir())) == 4


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "file").write_text("x")
        sealing.seal(tmp_path / f"checkpoint-{step}", {})
    sealing.prune(tmp_path, 2)
    assert checkpoint_steps(tmp_path) == [20, 100]
    assert sealing.last_good(tmp_path)[0] == (100, tmp_path / "checkpoint-100")
