"""Training on ranks that Ray starts, without Ray: how many, what each does, and what is refused."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.small_comparison import write_shape, write_text

from diffattn.cli.main import main
from diffattn.errors import ConfigError, TrainingError
from diffattn.train.lock import InUseError
from diffattn.train.options import LaunchOptions
from diffattn.train.recipe import Recipe
from diffattn.train.record import TrainResult
from diffattn.train.spread.layout import Layout
from diffattn.train.spread.ranks import lost
from diffattn.train.spread.ray_launch import _places, rank_on_ray


def cluster_of(*machines: dict[str, float]) -> Any:
    """A cluster that is asked for its machines alone."""
    total = {name: sum(machine.get(name, 0) for machine in machines) for name in ("CPU", "GPU")}
    nodes = [{"Alive": True, "Resources": machine} for machine in machines]
    return SimpleNamespace(nodes=lambda: nodes, cluster_resources=lambda: total)


@pytest.mark.parametrize(
    ("machines", "batch", "layout", "asked", "wanted"),
    [
        # A rank a thread, as far as they share the batch equally.
        ([{"CPU": 8}], 8, Layout(), None, (8, 1, False)),
        ([{"CPU": 7}], 8, Layout(), None, (4, 1, False)),
        ([{"CPU": 2}], 5, Layout(), None, (1, 2, False)),
        ([{"CPU": 8}], 6, Layout(shard="full", tensor_parallel=2), None, (6, 1, False)),
        # Ranks that were asked for share the threads, and each has to find room on one machine.
        ([{"CPU": 8}], 8, Layout(), 2, (2, 4, False)),
        ([{"CPU": 3}, {"CPU": 5}], 8, Layout(), 2, (2, 3, False)),
        # All GPUs.
        ([{"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 4}], 8, Layout(), None, (8, 4, True)),
    ],
)
def test_ranks_and_their_threads_fit_the_cluster(
    machines: list[dict[str, float]], batch: int, layout: Layout, asked: int | None, wanted: tuple[int, int, bool]
) -> None:
    recipe = SimpleNamespace(batch_size=batch, device="auto")
    places = _places(cluster_of(*machines), recipe, layout, asked)  # type: ignore[arg-type]
    assert (places.ranks, places.threads, places.gpus) == wanted


def test_gpus_are_left_alone_by_a_run_on_the_processor() -> None:
    recipe = Recipe(steps=1, batch_size=4, device="cpu")
    assert not _places(cluster_of({"CPU": 4, "GPU": 2}), recipe, Layout(), None).gpus
    with pytest.raises(ConfigError, match="--ranks 5 on a cluster with 4 threads; wanted 1 to 4"):
        _places(cluster_of({"CPU": 4, "GPU": 2}), recipe, Layout(), 5)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a rank has put into its mailbox."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda value: value))
    return {}


def job_of(call: Any, said: dict[str, Any], folder: Path, **changes: object) -> dict[str, Any]:
    box = SimpleNamespace(put=SimpleNamespace(remote=said.__setitem__))
    return {"call": call, "resume": False, "folder": folder, "cwd": os.getcwd(), "box": box, "threads": 1} | changes


def test_a_rank_begins_the_run_and_after_a_restart_goes_on_with_it(tmp_path: Path, said: dict[str, Any]) -> None:
    result = TrainResult(tmp_path, val_loss=4.0, bits_per_byte=1.5, train_tokens_per_second=100.0)
    calls: list[bool | None] = []

    def train(resume: bool | None = None, **callbacks: Any) -> TrainResult:
        calls.append(resume)
        callbacks["on_note"]("one")
        callbacks["on_note"]("two")
        return result

    rank_on_ray(job_of(train, said, tmp_path))
    (tmp_path / "config.json").write_text("{}")
    rank_on_ray(job_of(train, said, tmp_path))
    # A run that is resumed knows it by itself.
    rank_on_ray(job_of(train, said, tmp_path, resume=True))
    assert calls == [False, True, None]
    assert said == {"start": True, "note 0": "one", "note 1": "two", "result": result.numbers()}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            TrainingError("the loss is nan", "a number", "lower it"),
            ["TrainingError", "the loss is nan", "a number", "lower it"],
        ),
        (lost("gloo"), None),
        (InUseError("the folder is in use", "a free one", "wait"), None),
    ],
)
def test_an_error_is_told_unless_it_is_that_of_a_lost_rank(
    tmp_path: Path, said: dict[str, Any], error: Exception, told: list[str] | None
) -> None:
    def train(**callbacks: Any) -> TrainResult:
        raise error

    with pytest.raises(type(error)):
        rank_on_ray(job_of(train, said, tmp_path))
    assert said.get("error") == told


def test_what_cannot_be_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="--ranks 2 without --on ray; wanted --on ray beside it"):
        LaunchOptions(ranks=2)
    with pytest.raises(ConfigError, match="ranks is 0; wanted at least 1"):
        LaunchOptions(on="ray", ranks=0)
    with pytest.raises(ConfigError, match="on is 'slurm'; wanted here or ray"):
        LaunchOptions(on="slurm")  # type: ignore[arg-type]
    words = ["train", "--on", "ray", "--shape", write_shape(tmp_path), "--text", write_text(tmp_path)]
    words = [*map(str, words), "--out", str(tmp_path / "out")]
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(words) == 2
    line = "diffattn: --on ray, and Ray is not installed; wanted the package ray: pip install 'diffattn[ray]'\n"
    assert capsys.readouterr().err == line
    assert not (tmp_path / "out").exists()
