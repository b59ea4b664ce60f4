"""docs/cluster.md, step by step: its own commands, run as they stand there, by torchrun too."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.played_torchrun import command, killed
from support.ranks import outcomes_of_ranks, run_ranks
from support.small_comparison import write_text

from diffattn.cli.arguments import check
from diffattn.cli.main import load
from diffattn.cli.options import options_of
from diffattn.train.callbacks import MetricsRow, read_metrics

PAGE = Path(__file__).parents[1] / "docs/cluster.md"


def commands(language: str) -> list[list[str]]:
    """The words of each line in the page's blocks of a language."""
    blocks = re.findall(rf"^```{language}\n(.*?)\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def steps() -> dict[str, list[str]]:
    """The words of each step's command, by the folder that it writes."""
    return {
        f"{words[words.index('--out') + 1]}{' --resume' * ('--resume' in words)}": words for words in commands("sh")
    }


def rows(folder: Path) -> list[MetricsRow]:
    return read_metrics(folder / "metrics.jsonl")


def environment(folder: Path) -> dict[str, str]:
    """The kernel would be compiled anew for this cache, and the runs are compared with each other alone."""
    return {"DIFFATTN_CACHE": str(folder / "cache"), "DIFFATTN_FUSED": "0", "OMP_NUM_THREADS": "1"}


def played(name: str, folder: Path, ranks: int) -> list[tuple[int, str, str]]:
    """What each rank said of a step's command."""
    words = steps()[name]
    return run_ranks(command, ranks, words[words.index("diffattn") + 1 :], folder, environment(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with `my-text`, in which the first step has been done."""
    folder = tmp_path_factory.mktemp("cluster")
    os.rename(write_text(folder), folder / "my-text")
    ((status, _, said),) = played("runs/laptop", folder, 1)
    assert status == 0, said
    return folder


def assert_same_losses(more: Path, one: Path) -> None:
    assert [(row["step"], row["tokens"]) for row in rows(more)] == [(row["step"], row["tokens"]) for row in rows(one)]
    for a, b in zip(rows(one), rows(more), strict=True):
        assert b.get("loss", b.get("val_loss")) == pytest.approx(a.get("loss", a.get("val_loss")), abs=1e-5)


def test_each_step_is_the_first_one_with_one_thing_more() -> None:
    assert list(steps()) == ["runs/laptop", "runs/two", "runs/shard", "runs/two --resume", "runs/ray"]
    laptop = steps()["runs/laptop"]
    torchrun = ["torchrun", "--nproc-per-node", "2", "-m"]
    for name, before, behind in (("two", torchrun, []), ("shard", torchrun, ["--shard", "full"]),
                                 ("ray", [], ["--on", "ray"])):  # fmt: skip
        assert steps()[f"runs/{name}"] == [*before, *laptop[:-1], f"runs/{name}", *behind]


def test_torchrun_trains_as_one_process_does(folder: Path) -> None:
    words = steps()["runs/two"]
    # The same program whatever PATH says.
    words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    done = subprocess.run(
        words, cwd=folder, env=os.environ | environment(folder), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert_same_losses(folder / "runs/two", folder / "runs/laptop")
    # One of the two speaks.
    assert done.stderr.count("model: runs/two/model") == 1


def test_a_model_that_is_spread_out_trains_as_one_process_does(folder: Path) -> None:
    (status, *_), silent = played("runs/shard", folder, 2)
    assert status == 0
    assert silent == (0, "", "")
    assert_same_losses(folder / "runs/shard", folder / "runs/laptop")


def test_one_process_goes_on_with_what_two_began(folder: Path) -> None:
    words = steps()["runs/two"]
    words = [word.replace("runs/two", "runs/killed") for word in words[words.index("diffattn") + 1 :]]
    ended = outcomes_of_ranks(killed, 2, words, folder, environment(folder), 13)
    assert [each.exitcode for each in ended] == [-signal.SIGKILL] * 2
    assert rows(folder / "runs/killed")[-1]["step"] == 13
    shutil.rmtree(folder / "runs/two", ignore_errors=True)
    (folder / "runs/killed").rename(folder / "runs/two")
    ((status, _, said),) = played("runs/two --resume", folder, 1)
    assert status == 0, said
    assert_same_losses(folder / "runs/two", folder / "runs/laptop")


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_ray_trains_as_one_process_does(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *steps()["runs/ray"]], cwd=folder, env=os.environ | environment(folder),
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same_losses(folder / "runs/ray", folder / "runs/laptop")


def test_commands_on_several_hosts_are_commands_of_diffattn() -> None:
    found = commands("text")
    assert [words[0].partition("=")[0] for words in found] == ["torchrun", "OUT", "OUT"]
    for words in found:
        if words[1] == "sbatch":
            assert (PAGE.parents[1] / words[2]).is_file()
            verb = {"train.sbatch": "train", "ladder.sbatch": "scale run"}[Path(words[2]).name]
            check(verb, options_of(load(verb)), words[3:])
