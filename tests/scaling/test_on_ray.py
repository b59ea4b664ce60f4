"""A ladder on Ray has the rows of one process, whoever dies, and leaves nothing behind: ``make test-ray``."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ray_cases import left_of_ray
from support.small_comparison import write_text
from support.small_ladder import small

from diffattn.errors import ConfigError
from diffattn.files import LOCK
from diffattn.results.ladder import LadderRow
from diffattn.scaling.ladder import run_ladder
from diffattn.scaling.options import WorkOptions
from diffattn.scaling.rows import read_rows
from diffattn.scaling.runs import LadderProgress
from diffattn.train.spread.ray_cluster import cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]
ON_RAY = WorkOptions(on="ray")
# Long enough that a run is met while it trains, with a checkpoint every tenth of its steps.
LONG = {"sizes": ("7k",), "seeds": 1, "tokens": "20000", "variants": ("diff_v2",)}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_text(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One Ray for the tests that need not start their own."""
    with cluster(lambda line: None) as ray:
        yield ray


def losses(rows: list[LadderRow]) -> list[float]:
    return [row.val_loss for row in rows]


def at_checkpoint(folder: Path, act: Callable[[Path], None]) -> Callable[[LadderProgress], None]:
    """Does something once, behind the first checkpoint of a run and before its last."""
    done: list[bool] = []

    def see(progress: LadderProgress) -> None:
        for run in folder.glob("*-seed*"):
            if not done and list(run.glob("checkpoint-*/manifest.json")) and (run / LOCK).exists():
                done.append(True)
                act(run)

    return see


def test_the_command_starts_ray_trains_the_rows_of_one_process_and_leaves_nothing(text: Path) -> None:
    words = f"scale run --sizes 7k --tokens 100 --seeds 2 --vocab-size 300 --context 16 --batch-size 2 --device cpu \
        --dtype float32 --text {text / 'text'} --out {text / 'out'} --on ray --json"
    before = left_of_ray()
    done = subprocess.run(
        [sys.executable, "-m", "diffattn", *words.split()], capture_output=True, text=True, timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "Ray" in line and "so far" not in line]
    wanted = [r"reaching Ray", r"Ray \d[\d.]+ started on this machine: \d+ threads.*", r"starting .* on Ray"]
    assert len(lines) == 3
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(wanted, lines, strict=True)), lines
    assert left_of_ray() == before
    alone = run_ladder(small(text, sizes=("7k",)), out=text / "alone")
    rows = read_rows(text / "out" / "rows.jsonl")
    assert {row.key: row.val_loss for row in rows} == {row.key: row.val_loss for row in alone}
    assert len(json.loads(done.stdout)["rows"]) == len(rows) == 6


def test_a_worker_that_is_killed_is_replaced_and_goes_on_from_its_checkpoint(text: Path, ray: Any) -> None:
    kept: list[str] = []

    def kill(run: Path) -> None:
        first = min(int(path.name.partition("-")[2]) for path in run.glob("checkpoint-*"))
        kept.extend((run / "metrics.jsonl").read_text().splitlines()[:first])
        os.kill(int((run / LOCK).read_text().split()[1]), signal.SIGKILL)

    options = small(text, **LONG)
    rows = run_ladder(options, out=text / "out", work=ON_RAY, on_progress=at_checkpoint(text / "out", kill))
    assert kept
    (run,) = (text / "out").glob("*-seed*")
    # These have the seconds that their steps took, so they were not trained twice.
    assert (run / "metrics.jsonl").read_text().splitlines()[: len(kept)] == kept
    assert losses(rows) == losses(run_ladder(options, out=text / "alone"))
    assert len(read_rows(text / "out" / "rows.jsonl")) == 1


def test_ctrl_c_stops_the_tasks_which_save_their_steps(text: Path, ray: Any) -> None:
    options = small(text, **{**LONG, "tokens": "200000"})
    with pytest.raises(KeyboardInterrupt):
        run_ladder(
            options, out=text / "out", work=ON_RAY,
            on_progress=at_checkpoint(text / "out", lambda run: os.kill(os.getpid(), signal.SIGINT)),
        )  # fmt: skip
    (run,) = (text / "out").glob("*-seed*")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (run / f"checkpoint-{last}" / "manifest.json").exists()
    assert not (run / LOCK).exists()
    assert not read_rows(text / "out" / "rows.jsonl")


def test_an_error_of_a_task_is_raised_here(text: Path, ray: Any) -> None:
    (text / "out" / "softmax-16x2-seed0-4-0.01" / "model").mkdir(parents=True)
    (text / "out" / "softmax-16x2-seed0-4-0.01" / "model" / "mine.txt").write_text("mine")
    (text / "out" / "rows.jsonl").touch()
    with pytest.raises(ConfigError, match="is not empty: it holds 'model'; wanted") as caught:
        run_ladder(small(text, sizes=("7k",)), out=text / "out", work=ON_RAY)
    assert "\n" not in str(caught.value)


def test_more_threads_than_any_machine_has_are_refused(text: Path, ray: Any) -> None:
    with pytest.raises(ConfigError, match="1000 threads and 0 GPUs for a task; wanted what one machine of the cluster"):
        run_ladder(small(text), out=text / "out", work=WorkOptions(on="ray", threads=1000))


def test_a_machine_that_is_lost_loses_no_run(text: Path) -> None:
    """Three machines that Ray plays on this one: the caller's, which trains nothing, and two with a thread each."""
    script = f"""
import json, os, sys
from pathlib import Path
import diffattn.train.spread.ray_cluster as ours
os.environ.update(ours.SETTINGS)
from ray.cluster_utils import Cluster
from support.small_ladder import small
from diffattn.files import LOCK
from diffattn.scaling.ladder import run_ladder
from diffattn.scaling.options import WorkOptions

text = Path({str(text)!r})
several = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, include_dashboard=False))
machines = [several.add_node(num_cpus=1, include_dashboard=False) for _ in range(2)]
os.environ["RAY_ADDRESS"] = several.address
lost = []

def parents(pid):
    while pid > 1:
        yield pid
        pid = int(Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[1])

def lose(progress):
    for run in (text / "out").glob("*-seed*"):
        if not lost and list(run.glob("checkpoint-*/manifest.json")) and (run / LOCK).exists():
            family = set(parents(int((run / LOCK).read_text().split()[1])))
            for machine in machines:
                (raylet,) = machine.all_processes["raylet"]
                if raylet.process.pid in family and not lost:
                    lost.append(run.name)
                    several.remove_node(machine, allow_graceful=False)

notes = []
rows = run_ladder(small(text, **{LONG!r}), out=text / "out", work=WorkOptions(on="ray"), on_progress=lose,
                  on_note=notes.append)
several.shutdown()
print(json.dumps([lost, notes, [row.val_loss for row in rows]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=500,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lost, notes, found = json.loads(done.stdout.splitlines()[-1])
    assert len(lost) == 1
    assert re.fullmatch(r"Ray \S+ at \S+: 3 machines, 2 threads", notes[0])
    assert found == losses(run_ladder(small(text, **LONG), out=text / "alone"))


def test_an_address_without_ray_is_one_line(text: Path) -> None:
    words = ["scale", "run", "--text", str(text / "text"), "--out", str(text / "out"), "--on", "ray"]
    done = subprocess.run(
        [sys.executable, "-m", "diffattn", *words], capture_output=True, text=True, timeout=300,
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:9"},
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("diffattn: ")]
    assert line.startswith("diffattn: RAY_ADDRESS is '127.0.0.1:9', where no Ray answers; wanted the address")
