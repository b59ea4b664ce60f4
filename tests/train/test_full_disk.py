"""A disk that is full ends a run with one line and loses nothing."""

import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError
from support.mounted import file_system
from support.small_run import RECIPE, assert_same_run, at, checkpoint_steps, partials, rows, run

from diffattn import files
from diffattn.data.packing import PreparedData
from diffattn.errors import TrainingError
from diffattn.train.checkpoints import sealing


def fail(error: Exception) -> Callable[..., None]:
    def failing(*args: object, **kwargs: object) -> None:
        raise error

    return failing


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
FULL: list[tuple[str, Exception]] = [
    (
        "diffattn.train.checkpoints.saving.save_file",
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ),
    ("diffattn.train.checkpoints.saving.seal", OSError(errno.EDQUOT, "Disk quota exceeded")),
    ("diffattn.files.os.fsync", NO_SPACE),
    ("diffattn.train.callbacks.json.dumps", NO_SPACE),
]  # fmt: skip


@pytest.mark.parametrize(("where", "error"), FULL, ids=[where for where, _ in FULL])
def test_a_full_disk_ends_the_run_with_one_line_and_keeps_the_last_checkpoint(
    where: str, error: Exception, stopped: Path, whole: Path, data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill() -> None:
        monkeypatch.setattr(where, fail(error))

    with pytest.raises(TrainingError) as raised:
        run(data, stopped, resume=True, on_progress=at(7, fill))
    line = str(raised.value)
    assert line.startswith("the disk is full: could not write ")
    assert ": free some space and run it again, or continue with --resume" in line
    assert "\n" not in line
    assert partials(stopped) == []
    assert checkpoint_steps(stopped) == [3, 6]
    assert sealing.defect(stopped / "checkpoint-6") is None
    monkeypatch.undo()
    run(data, stopped, resume=True)
    assert_same_run(stopped, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A file system of 1.4 MB, and a function that mounts it again with other options."""
    with file_system(tmp_path / "disk", "1400k") as mounted:
        yield mounted


@pytest.mark.parametrize("step", [5, 7, 10])
def test_a_disk_that_is_really_full(
    step: int, small_disk: tuple[Path, Callable[[str], None]], whole: Path, data: PreparedData
) -> None:
    disk, remount = small_disk
    folder, filler = disk / "run", disk / "filler"

    def fill() -> None:
        # The checkpoint before is complete. No room at all; too little for the tensors; a little too little.
        while not (folder / f"checkpoint-{3 * (step // 3)}").exists():
            time.sleep(0.001)
        room = {5: 0, 7: 60_000, 10: 200_000}[step]
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - room))

    with pytest.raises(TrainingError, match="the disk is full"):
        run(data, folder, on_progress=at(step, fill))
    assert partials(folder) == []
    good, skipped = sealing.last_good(folder)
    assert skipped == []
    assert good is not None
    assert good[0] == 3 * (step // 3)
    with pytest.raises(TrainingError, match="the disk is full"):
        run(data, folder, resume=True)
    filler.unlink()
    remount("size=8m")
    run(data, folder, resume=True)
    assert_same_run(folder, whole)


def test_a_row_that_a_full_disk_refuses_ends_the_run_with_one_line(tmp_path: Path, data: PreparedData) -> None:
    """/dev/full refuses every write, also the one in closing the file."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    folder = tmp_path / "run"
    original = files.os.replace

    def replace(source: Path, target: Path) -> None:
        original(source, target)
        if target.name == "metrics.jsonl":
            target.unlink()
            target.symlink_to("/dev/full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffattn.files.os.replace", replace)
        with pytest.raises(TrainingError, match=r"the disk is full: could not write .*metrics\.jsonl"):
            run(data, folder)
    (folder / "metrics.jsonl").unlink()
    run(data, folder, resume=True)
    assert [row["step"] for row in rows(folder) if "loss" in row] == list(range(1, RECIPE.steps + 1))


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file.json"
    files.write_json(file, {"a": 1})
    monkeypatch.setattr("diffattn.files.os.replace", fail(NO_SPACE))
    with pytest.raises(TrainingError):
        files.write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), files.whole_folder(tmp_path / "folder"):
        raise PermissionError(errno.EACCES, "Permission denied")
    assert list(tmp_path.iterdir()) == []
    assert files.is_disk_full(NO_SPACE)
    assert not files.is_disk_full(ValueError("a file of that name"))
