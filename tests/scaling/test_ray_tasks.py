"""A ladder's tasks of a Ray cluster, called without one; ``make test-ray`` runs them on Ray (``test_on_ray.py``)."""

import json
import os
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.small_comparison import write_text
from support.small_ladder import small

from diffattn.cli.main import main
from diffattn.errors import ConfigError
from diffattn.results.ladder import LadderRow
from diffattn.scaling.ladder import run_ladder
from diffattn.scaling.messages import options_to_json
from diffattn.scaling.ray_tasks import settle, train_one
from diffattn.scaling.runs import runs_of
from diffattn.train.lock import held
from diffattn.train.spread import ray_cluster
from diffattn.train.spread.ray_cluster import Mailbox, at_once, resources

NAME = "softmax-16x2-seed0-4-0.01"


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """What a task is told."""
    write_text(tmp_path)
    options = small(tmp_path, sizes=("7k",), seeds=1, variants=("softmax",))
    digest = runs_of(options)[0].data.facts["digest"]
    return {"options": json.dumps(options_to_json(options)), "folder": str(tmp_path / "out"), "command": "test",
            "name": NAME, "digest": digest, "cwd": os.getcwd(), "threads": torch.get_num_threads()}  # fmt: skip


class Board:
    """A mailbox whose method is called as that of an actor."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.put = SimpleNamespace(remote=lambda name, message: self.kept.append((name, message)))


def test_a_task_trains_to_the_row_of_a_ladder_in_one_process(job: dict[str, Any], tmp_path: Path) -> None:
    board = Board()
    row = LadderRow.from_json(train_one(job, board)["row"])
    (alone,) = run_ladder(small(tmp_path, sizes=("7k",), seeds=1, variants=("softmax",)), out=tmp_path / "alone")
    assert row.val_loss == alone.val_loss
    assert row.key == alone.key
    assert board.kept[0] == (NAME, None)
    assert board.kept[-1][1]["step"] == 4
    # The caller alone writes rows.
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_a_task_says_who_has_its_folder(job: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "out" / NAME
    folder.mkdir(parents=True)
    with held(folder):
        found: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: found.append(train_one(job, Board())))
        thread.start()
        thread.join()
    assert found == [{"by": f"process {os.getpid()} on {socket.gethostname()}"}]


def test_a_task_returns_its_error(job: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out" / NAME / "model").mkdir(parents=True)
    (tmp_path / "out" / NAME / "model" / "mine.txt").write_text("mine")
    kind, given, *_ = train_one(job, Board())["error"]
    assert kind == "ConfigError"
    assert given.endswith("is not empty: it holds 'model'")


def test_a_task_that_finds_another_text_trains_nothing(job: dict[str, Any], tmp_path: Path) -> None:
    kind, given, *_ = train_one({**job, "digest": "0" * 64}, Board())["error"]
    assert (kind, given) == ("DataError", f"the text or its tokenizer on {socket.gethostname()} is another one")
    assert not (tmp_path / "out").exists()


def test_a_machine_says_its_number_format_and_release(job: dict[str, Any]) -> None:
    options = json.loads(job["options"]) | {"dtype": "auto"}
    found = settle(json.dumps(options))
    assert found["dtype"] in ("float32", "bfloat16")
    assert found["version"] == sys.modules["diffattn"].__version__


@pytest.mark.parametrize("verb", ["scale run", "eval ablation"])
def test_without_ray_there_is_one_line(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(f"{verb} --on ray --out {tmp_path / 'out'}".split()) == 2
    line = "diffattn: --on ray, and Ray is not installed; wanted the package ray: pip install 'diffattn[ray]'\n"
    assert capsys.readouterr().err == line


def test_what_is_said_last_is_kept_until_it_is_taken() -> None:
    mailbox = Mailbox()
    mailbox.put("a", 1)
    mailbox.put("b", 2)
    mailbox.put("a", 3)
    assert mailbox.take() == {"a": 3, "b": 2}
    assert mailbox.take() == {}


def cluster_of(*machines: dict[str, float]) -> Any:
    """A cluster that is asked for its machines alone."""
    total = {name: sum(machine.get(name, 0) for machine in machines) for name in ("CPU", "GPU")}
    nodes = [{"Alive": True, "Resources": machine} for machine in machines]
    return SimpleNamespace(nodes=lambda: nodes, cluster_resources=lambda: total)


def test_a_task_takes_a_gpu_where_there_are_any_and_fits_on_a_machine() -> None:
    mixed = cluster_of({"CPU": 4.0}, {"CPU": 8.0, "GPU": 2.0})
    assert resources(mixed, 1, None, wants_gpu=True) == {"num_cpus": 1, "num_gpus": 1}
    assert resources(mixed, 1, None, wants_gpu=False) == {"num_cpus": 1, "num_gpus": 0}
    assert resources(mixed, 2, 0.25, wants_gpu=True) == {"num_cpus": 2, "num_gpus": 0.25}
    assert at_once(mixed, {"num_cpus": 2, "num_gpus": 0.25}) == 6
    assert at_once(mixed, {"num_cpus": 1, "num_gpus": 0.5}) == 4
    with pytest.raises(ConfigError, match=r"16 threads and 0 GPUs for a task; .* 8 threads and 2 GPUs"):
        resources(mixed, 16, 0, wants_gpu=True)
    with pytest.raises(ConfigError, match="1 threads and 4 GPUs for a task"):
        resources(mixed, 1, 4, wants_gpu=True)


def test_the_threads_of_a_task_are_said_before_torch_is_imported() -> None:
    assert ray_cluster.variables(3)["OMP_NUM_THREADS"] == "3"
    assert ray_cluster.variables(3)["RAY_USAGE_STATS_ENABLED"] == "0"
