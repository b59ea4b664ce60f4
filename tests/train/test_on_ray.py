"""A run on ranks that Ray starts has the losses of one process, also when one of them dies: ``make test-ray``."""

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ray_cases import left_of_ray
from support.small_comparison import write_shape, write_text

from diffattn.errors import DataError
from diffattn.files import LOCK
from diffattn.train.callbacks import Progress, read_metrics
from diffattn.train.recipe import Recipe
from diffattn.train.resume import resume_training
from diffattn.train.single import train_shape
from diffattn.train.spread.ray_cluster import cluster
from diffattn.train.spread.ray_launch import train_on_ray

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]
RECIPE = Recipe(steps=60, batch_size=4, dtype="float32", device="cpu", learning_rate=1e-3, checkpoints=10)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One Ray for the tests that need not start their own."""
    with cluster(lambda line: None) as ray:
        yield ray


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a shape, a text, and the undisturbed run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    shape, text = write_shape(folder), write_text(folder)
    train_shape(str(shape), "diff_v1", RECIPE, folder / "alone", text=str(text))
    return folder


def call(whole: Path, out: Path, **changes: Any) -> Callable[..., Any]:
    given = {"text": str(whole / "text")} | changes
    return functools.partial(train_shape, str(whole / "small.toml"), "diff_v1", RECIPE, out, **given)


def assert_same_losses(out: Path, whole: Path) -> None:
    mine, theirs = read_metrics(out / "metrics.jsonl"), read_metrics(whole / "alone" / "metrics.jsonl")
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    for kind in ("loss", "val_loss"):
        pairs = [(row[kind], other[kind]) for row, other in zip(mine, theirs, strict=True) if kind in row]  # type: ignore[literal-required]
        assert len(pairs) >= 4
        assert all(abs(one - other) <= 1e-5 for one, other in pairs)


def at_checkpoint(out: Path, act: Callable[[int], None]) -> Callable[[Progress], None]:
    """Does something to rank 0, by the number of its process, once there is a checkpoint."""
    done: list[bool] = []

    def see(progress: Progress) -> None:
        if not done and list(out.glob("checkpoint-*/manifest.json")) and (out / LOCK).exists():
            done.append(True)
            act(int((out / LOCK).read_text().split()[1]))

    return see


def test_the_command_trains_to_the_losses_of_one_process_and_leaves_nothing(whole: Path, tmp_path: Path) -> None:
    words = f"train --shape {whole / 'small.toml'} --attention diff_v1 --steps 60 --batch-size 4 --dtype float32 \
        --device cpu --learning-rate 1e-3 --checkpoints 10 --text {whole / 'text'} --out {tmp_path / 'out'} --json \
        --on ray --ranks 2"
    before = left_of_ray()
    done = subprocess.run(
        [sys.executable, "-m", "diffattn", *words.split()], capture_output=True, text=True, timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert left_of_ray() == before
    assert sum(line.startswith("Ray ") for line in done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert_same_losses(tmp_path / "out", whole)
    assert json.loads(done.stdout)["folder"] == str(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


def test_a_rank_that_is_killed_comes_back_to_the_losses_of_an_undisturbed_run(
    whole: Path, tmp_path: Path, ray: Any
) -> None:
    notes: list[str] = []
    out = tmp_path / "out"
    result = train_on_ray(
        call(whole, out), RECIPE, out, ranks=2, on_note=notes.append,
        on_progress=at_checkpoint(out, lambda process: os.kill(process, signal.SIGKILL)),
    )  # fmt: skip
    assert notes[-1] == "a rank was lost; all go on from the last checkpoint (restart 1 of 3)"
    assert result.folder == out
    assert_same_losses(out, whole)


def test_ctrl_c_ends_all_ranks_and_another_number_goes_on(whole: Path, tmp_path: Path, ray: Any) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train_on_ray(
            call(whole, out), RECIPE, out, ranks=2,
            on_progress=at_checkpoint(out, lambda process: os.kill(os.getpid(), signal.SIGINT)),
        )  # fmt: skip
    assert not (out / "result.json").exists()
    train_on_ray(functools.partial(resume_training, out), RECIPE, out, ranks=1, resume=True)
    assert_same_losses(out, whole)


def test_an_error_of_a_rank_is_raised_once_and_nothing_is_written(whole: Path, tmp_path: Path, ray: Any) -> None:
    notes: list[str] = []
    out = tmp_path / "made" / "out"
    lacks_text = call(whole, out, text=str(tmp_path / "no_such_text"))
    with pytest.raises(DataError, match="no_such_text") as caught:
        train_on_ray(lacks_text, RECIPE, out, ranks=2, on_note=notes.append)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()
    assert notes == []
