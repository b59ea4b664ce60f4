"""The scripts of ``examples/slurm``: the commands that they give, what they do as time ends, and these commands run."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from support.fake_slurm import calls, install

from diffattn.cli.arguments import check
from diffattn.cli.main import load
from diffattn.cli.options import options_of

SCRIPTS = sorted((Path(__file__).parents[1] / "examples/slurm").iterdir())
TRAIN, LADDER = (next(script for script in SCRIPTS if script.stem == name) for name in ("train", "ladder"))


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    return install(tmp_path / "bin") | {"OUT": str(tmp_path / "out")}


def submit(slurm: dict[str, str], *words: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sbatch", *map(str, words)], env=slurm | more, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_is_right_to_its_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.stat().st_mode & 0o111
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout


def test_train_starts_a_torchrun_on_each_node(slurm: dict[str, str], tmp_path: Path) -> None:
    done = submit(slurm, TRAIN, "--shape", "1.4B", "--text", "a text", FAKE_SRUN='echo "$OMP_NUM_THREADS"')
    assert done.returncode == 0, done.stderr
    assert calls(tmp_path / "bin") == [
        ["scontrol", "show", "hostnames", "node[7-8]"],
        ["srun", "--kill-on-bad-exit=1", "torchrun", "--nnodes=2", "--nproc-per-node=8", "--rdzv-id=4711",
         "--rdzv-backend=c10d", "--rdzv-endpoint=node7:24711", "--shutdown-timeout=500", "-m", "diffattn", "train",
         "--out", str(tmp_path / "out"), "--shape", "1.4B", "--text", "a text"],
    ]  # fmt: skip
    # 64 threads for 8 processes.
    assert done.stdout == "8\n"


def test_train_goes_on_with_a_run_that_is_there(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    assert submit(slurm, TRAIN, "--shape", "1.4B").returncode == 0
    assert calls(tmp_path / "bin")[-1][-4:] == ["train", "--out", str(tmp_path / "out"), "--resume"]


def test_train_ends_as_its_processes_end(slurm: dict[str, str], tmp_path: Path) -> None:
    assert submit(slurm, TRAIN, FAKE_SRUN="exit 2").returncode == 2
    assert [words[0] for words in calls(tmp_path / "bin")] == ["scontrol", "srun"]


@pytest.mark.parametrize("trained", [False, True])
def test_train_is_queued_again_when_its_time_ends(trained: bool, slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    if trained:
        (tmp_path / "out/result.json").write_text("{}")
    # A run that saves a checkpoint when it is told to end.
    saves = 'trap "sleep 0.2; echo saved; exit 130" TERM; echo began; while :; do sleep 0.05; done'
    variables = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    with subprocess.Popen(
        ["bash", str(TRAIN)], env=slurm | variables | {"FAKE_SRUN": f"exec bash -c '{saves}'"}, stdout=subprocess.PIPE,
        text=True,
    ) as job:  # fmt: skip
        assert job.stdout is not None
        assert job.stdout.readline() == "began\n"
        job.send_signal(signal.SIGTERM)
        assert job.communicate(timeout=30)[0] == "saved\n"
    assert job.returncode == 130
    requeued = ["scontrol", "requeue", "4711"]
    assert (calls(tmp_path / "bin")[-1] == requeued) is not trained


def test_the_run_folder_has_to_be_named(slurm: dict[str, str], tmp_path: Path) -> None:
    for script in SCRIPTS:
        environment = {name: value for name, value in slurm.items() if name != "OUT"}
        done = submit(environment, script)
        assert done.returncode != 0
        assert "as in OUT=/shared/runs/" in done.stderr
    assert calls(tmp_path / "bin") == []


def test_a_ladder_has_a_node_for_each_size(slurm: dict[str, str], tmp_path: Path) -> None:
    assert submit(slurm, LADDER, "--tokens", "100M").returncode == 0
    sizes = ["200k", "550k", "1.2M", "1.9M", "4.2M"]
    assert calls(tmp_path / "bin") == [
        ["srun", "diffattn", "scale", "run", "--sizes", size, "--processes", "8", "--out", f"{tmp_path}/out/{size}",
         "--tokens", "100M"]
        for size in sizes
    ]  # fmt: skip
    done = submit(slurm, "--array=5-5", LADDER)
    assert done.returncode != 0
    assert "is not in SIZES" in done.stderr


def test_the_options_are_those_of_diffattn(slurm: dict[str, str], tmp_path: Path) -> None:
    submit(slurm, TRAIN)
    submit(slurm, "--array=0-0", LADDER)
    train, ladder = (words for words in calls(tmp_path / "bin") if words[0] == "srun")
    check("train", options_of(load("train")), train[train.index("train") + 1 :])
    check("scale run", options_of(load("scale run")), ladder[ladder.index("run") + 1 :])
