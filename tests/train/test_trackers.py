"""Trackers get the numbers of metrics.jsonl and keep their files in the run folder; they neither end nor change it."""

import dataclasses
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from support.small_run import CONTEXT, SHAPE, StoppedError, assert_same_run, at, run, stop
from transformers import TrainerCallback

from diffattn.cli.main import main
from diffattn.data.packing import PreparedData
from diffattn.errors import ConfigError
from diffattn.folders import RUN, own_folder
from diffattn.study.compare import compare
from diffattn.study.options import CompareOptions
from diffattn.train.callbacks import MetricsFile, read_metrics
from diffattn.train.own import read_own, to_keep
from diffattn.train.trackers import programs
from diffattn.train.trackers.callback import Trackers

# Not by importing them: trackio decides as it is imported where its files lie.
for package in ("tensorboard", "trackio", "wandb"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

# A value as a tracker names it, at a step.
Values = dict[str, list[tuple[int, float]]]


def of_metrics(folder: Path) -> Values:
    """What a tracker has to show of a run, by its rows."""
    values: Values = defaultdict(list)
    tokens, seconds = 0, 0.0
    for row in read_metrics(folder / "metrics.jsonl"):
        if "val_loss" in row:
            values["eval/val_loss"].append((row["step"], row["val_loss"]))
            values["eval/tokens"].append((row["step"], row["tokens"]))
            continue
        for name in ("loss", "grad_norm", "learning_rate", "tokens"):
            values[f"train/{name}"].append((row["step"], row[name]))  # type: ignore[literal-required]
        speed = (row["tokens"] - tokens) / (row["seconds"] - seconds)
        values["train/tokens_per_second"].append((row["step"], speed))
        tokens, seconds = row["tokens"], row["seconds"]
    return dict(values)


def of_tensorboard(folder: Path) -> Values:
    from tensorboard.backend.event_processing import event_accumulator

    # At most 0 events means all.
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"), {"scalars": 0})
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def of_trackio(folder: Path) -> Values:
    with sqlite3.connect(folder / "trackio/diffattn.db") as database:
        rows = database.execute("SELECT metrics FROM metrics ORDER BY id").fetchall()
    database.close()
    return by_step(json.loads(row) for (row,) in rows)


def of_wandb(folder: Path) -> Values:
    """The history in W&B's own file: records behind 7 bytes each, of which the fifth and sixth are the length."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, place, rows = file.read_bytes(), 7, []
    assert len(content) < 32768, "a longer file has records in parts"
    while place < len(content):
        length = int.from_bytes(content[place + 4 : place + 6], "little")
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content[place + 7 : place + 7 + length])
        place += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in items.items() if not name.startswith("_")})
    return by_step(rows)


def by_step(rows: Any) -> Values:
    values: Values = defaultdict(list)
    for row in rows:
        step = row.pop("train/global_step")
        for name, value in row.items():
            values[name].append((step, value))
    return dict(values)


def assert_shows(shown: Values, metrics: Values) -> None:
    assert shown.keys() == metrics.keys()
    for name, expected in metrics.items():
        assert [step for step, _ in shown[name]] == [step for step, _ in expected], name
        # TensorBoard keeps float32.
        assert [value for _, value in shown[name]] == pytest.approx([value for _, value in expected], rel=1e-6), name


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nobody is logged in anywhere, and no settings of the person who runs the tests are read."""
    monkeypatch.setenv("WANDB_MODE", "online")
    for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_PROJECT", "TRACKIO_DIR", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def tracked(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all three trackers, whose W&B is offline."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.delenv("TRACKIO_DIR", raising=False)
        run(data, folder, track=("tensorboard", "trackio", "wandb"))
    return folder


@pytest.mark.parametrize("read", [of_tensorboard, of_trackio, of_wandb])
def test_a_tracker_has_the_numbers_of_the_metrics(read: Any, tracked: Path) -> None:
    metrics = of_metrics(tracked)
    assert len(metrics["train/loss"]) == 11
    assert_shows(read(tracked), metrics)


def test_a_tracked_run_is_the_same_run(tracked: Path, whole: Path) -> None:
    assert_same_run(tracked, whole)
    assert own_folder(tracked, RUN) == tracked


def test_a_run_that_goes_on_shows_no_step_twice(data: PreparedData, tmp_path: Path, whole: Path) -> None:
    with pytest.raises(StoppedError):
        run(data, tmp_path, track=["tensorboard"], on_progress=at(8, stop))
    run(data, tmp_path, track=["tensorboard"], resume=True)
    assert_same_run(tmp_path, whole)
    shown = of_tensorboard(tmp_path)
    # The pace of the first step of a process is not that of the steps around it.
    assert_shows(shown, {name: shown[name] if "second" in name else at for name, at in of_metrics(tmp_path).items()})


def test_wandb_goes_on_with_its_run(data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(StoppedError):
        run(data, tmp_path, track=["wandb"], on_progress=at(4, stop))
    run(data, tmp_path, track=["wandb"], resume=True)
    ids = [file.stem for file in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    assert len(ids) == 2
    assert len(set(ids)) == 1


def test_without_an_account_wandb_keeps_all_in_the_folder(
    data: PreparedData, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(data, tmp_path, track=["wandb"])
    said = capfd.readouterr()
    (line,) = [line for line in said.err.splitlines() if "wandb" in line]
    (kept,) = tmp_path.glob("wandb/offline-run-*")
    assert line == (
        "the metrics go to wandb too: nobody is logged in, which wandb login does; "
        f"send them later with wandb sync {kept}"
    )
    assert said.out == ""
    assert_shows(of_wandb(tmp_path), of_metrics(tmp_path))


def test_without_its_server_wandb_keeps_all_in_the_folder(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # Nobody listens there.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(programs, "_INIT_SECONDS", 0.5)
    run(data, tmp_path, track=["wandb"])
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "wandb" in line]
    assert "send them later with wandb sync" in line
    assert_shows(of_wandb(tmp_path), of_metrics(tmp_path))


class Failing(TrainerCallback):
    """A tracker that fails at the fifth row."""

    rows = 0

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print("not for stdout")
        self.rows += 1
        if self.rows == 5:
            raise OSError("the server\nis gone")


@pytest.mark.parametrize("starts", [False, True])
def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    starts: bool, data: PreparedData, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tracker = Failing()

    def start(folder: Path, kept: object) -> tuple[TrainerCallback, str]:
        if not starts:
            raise OSError("the server\nis gone")
        return tracker, "there"

    monkeypatch.setitem(programs.STARTS, "tensorboard", start)
    run(data, tmp_path, track=["tensorboard"])
    assert_same_run(tmp_path, whole)
    said = capsys.readouterr()
    assert said.out == ""
    failed = "tensorboard failed (the server is gone); the run goes on without it, and metrics.jsonl has every row"
    lines = [line for line in said.err.splitlines() if "tensorboard" in line]
    assert lines == (["the metrics go to tensorboard too: there", failed] if starts else [failed])
    assert tracker.rows == (5 if starts else 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_tracks(
    rank: int, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Failing()
    monkeypatch.setitem(programs.STARTS, "tensorboard", lambda folder, kept: (tracker, "there"))
    metrics = MetricsFile(tmp_path / "metrics.jsonl", kept=[])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    with Trackers(["tensorboard"], tmp_path, metrics) as ours:
        metrics.append({"step": 1, "tokens": 1, "seconds": 1.0, "loss": 1.0})
        ours.on_log(None, None, None)
    metrics.close()
    assert tracker.rows == (1 if rank == 0 else 0)


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["tensorboard", "none"], "track is tensorboard none; wanted each tracker once, or none alone"),
        (["wandb", "wandb"], "track is wandb wandb; wanted each tracker once, or none alone"),
        (["mlflow"], "track holds 'mlflow'; wanted one of none, tensorboard, trackio, wandb"),
    ],
)
def test_what_is_no_tracker_is_refused(names: list[str], line: str, data: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        run(data, tmp_path / "new", track=names)
    assert str(raised.value).startswith(line)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_a_package_that_is_not_installed_is_one_line(
    verb: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "wandb" else find(name, *more))
    out = tmp_path / "new"
    assert main([verb, "--text", str(text / "text"), "--track", "wandb", "--out", str(out)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "diffattn: track holds wandb, and its package is not installed; wanted the package wandb: "
        "pip install wandb, or leave it out of --track"
    )
    assert not out.exists()


@pytest.mark.parametrize(("words", "tracked"), [([], True), (["--track", "none"], False)])
def test_a_run_remembers_its_trackers_until_others_are_given(
    words: list[str], tracked: bool, data: PreparedData, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFATTN_CACHE", str(text / "cache"))
    kept = to_keep(
        str(text / "text"), CONTEXT, "text", shape=SHAPE, attention="diff_v1", match="parameters", track=["tensorboard"]
    )
    with pytest.raises(StoppedError):
        run(data, tmp_path, options=kept, on_progress=at(8, stop))
    assert main(["train", "--resume", "--out", str(tmp_path), *words]) == 0
    assert (tmp_path / "tensorboard").exists() == tracked
    assert read_own(tmp_path).track == ("tensorboard",)


def test_a_comparison_tracks_each_of_its_runs(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFATTN_CACHE", str(text / "cache"))
    given: list[object] = []

    def train(*of_the_run: object, track: object, **more: object) -> None:
        given.append(track)
        raise StoppedError

    monkeypatch.setattr("diffattn.study.compare.train", train)
    options = CompareOptions(shape="300K", steps=1, context=16, text=str(text / "text"), variants=("softmax",), seeds=1,
                             device="cpu", track=("tensorboard",))  # fmt: skip
    for resume, now in ((False, options), (True, None), (True, dataclasses.replace(options, track=("none",)))):
        with pytest.raises(StoppedError):
            compare(now, out=tmp_path / "pair", resume=resume)
    assert given == [("tensorboard",), ("tensorboard",), ()]


def test_the_offline_mode_of_wandb_leaves_stdout_to_results(text: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "WANDB_MODE": "offline", "DIFFATTN_CACHE": str(text / "cache")}
    words = [
        "train",
        "--shape",
        "300K",
        "--attention",
        "softmax",
        "--steps",
        "1",
        "--context",
        "16",
        "--text",
        str(text / "text"),
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "diffattn", *words, "--track", "wandb", "--out", str(tmp_path / "run")],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == str(tmp_path / "run")
    assert "offline; send them later with wandb sync" in done.stderr
