import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.small_comparison import write_shape, write_text
from transformers import AutoModelForCausalLM

from diffattn.cli.main import main
from diffattn.model.trained import read_trained


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Exit status 2, nothing on stdout, one line that holds the words, no file left."""

    def files() -> list[Path]:
        return sorted(path for path in Path.cwd().rglob("*") if "cache" not in path.parts)

    before = files()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.startswith("diffattn: ")
    for word in words:
        assert word in printed.err
    assert files() == before


@pytest.mark.parametrize("verb", ["compare", "train"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stepz", "3"], ["--stepz", "perhaps you meant --steps"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--steps", "-3"], ["steps is -3", "at least 1"]),
        (["--dtype", "float8"], ["float8", "bfloat16"]),
        (["--shape", "7B"], ["7B", "6.8B"]),
        (["--shape", "absent.toml"], ["absent.toml"]),
        (["--text", "./absent.txt"], ["absent.txt"]),
        (["--text", "latin.txt"], ["latin.txt", "byte 3", "UTF-8"]),
        (["--text", "short.txt"], ["tokens"]),
        (["--context", "4096"], ["context is 4096", "256"]),
        (["--learning-rate", "-1"], ["learning_rate is -1.0"]),
        (["--out", "/proc/nothing/here"], ["cannot write to /proc/nothing/here", "--out"]),
        (["--resume"], ["to resume", "--out"]),
        (["--resume", "--out", "absent"], ["absent", "--out"]),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(
    verb: str, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    Path("short.txt").write_text("A few words.")
    fails([verb, *arguments], capsys, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 3, "hidden_size": 48, "num_kv_heads": 3}, ["num_heads=3", "a multiple of 2"]),
        ({"num_kv_heads": 3}, ["num_kv_heads=3", "divides"]),
        ({"num_kv_heads": 1}, ["num_kv_heads=1", "a multiple of 2"]),
        ({"hidden_size": 0}, ["hidden_size"]),
        ({"hidden_size": 30}, ["hidden_size=30"]),
        ({"width": 3}, ["width"]),
    ],
)
def test_a_shape_that_cannot_be_built(
    changes: dict[str, int], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fails(["compare", "--shape", write_shape(tmp_path, **changes)], capsys, *words)


@pytest.mark.parametrize("arguments", [[], ["comparison"], ["compare", "--steps", "2", "--minutes", "1"]])
def test_other_mistakes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    fails(arguments, capsys)


def test_help_is_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "compare" in capsys.readouterr().out


def test_train_prints_one_object_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "train", "--shape", write_shape(tmp_path), "--text", write_text(tmp_path), "--steps", "3", "--out", "run",
        "--attention", "diff_v2", "--json",
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["val_loss"] > 0
    assert result["folder"] == "run"
    assert "held-out loss" in printed.err
    assert "step 1/3" not in printed.err  # no live line where stderr is not a terminal
    said = printed.err.splitlines()
    stages = ["importing torch and transformers", "reading the text", "building the model",
              "getting ready for the first step", "training diff_v2 seed 0: 3 steps", "measuring the held-out loss",
              "saving the model"]  # fmt: skip
    assert [line for line in said if line in stages] == stages
    trained = read_trained(Path("run/model"))
    assert trained is not None
    assert (trained.steps, trained.val_loss, trained.continued) == (3, result["val_loss"], False)
    assert trained.tokens == 3 * 4 * 32
    assert trained.parameters == AutoModelForCausalLM.from_pretrained("run/model").num_parameters()
    fails(arguments, capsys, "run holds a run already", "--resume")
    assert main([*arguments, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out) == result


def test_compare_prints_the_table_and_the_same_json_as_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "compare", "--shape", write_shape(tmp_path), "--text", write_text(tmp_path), "--steps", "2", "--seeds", "1",
        "--variants", "softmax", "diff_v1", "--json",
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr()
    (out,) = Path("runs").glob("compare-*")
    assert json.loads(printed.out) == json.loads((out / "result.json").read_text())
    assert "diff_v1: no difference seen" in printed.err
    assert "Executed FLOPs" in printed.err
    assert re.search(r"2 runs of 2 steps of 4 × \d+ tokens; about \d+ s of training and measuring\n", printed.err)
    stages = ["measuring a training step of softmax", "training softmax seed 0: 2 steps", "measuring the held-out loss",
              "training diff_v1 seed 0: 2 steps",
              "measuring the start-up of the models and writing the report"]  # fmt: skip
    assert [line for line in printed.err.splitlines() if line in stages] == stages
    assert f"report: {out / 'report.html'}" in printed.err


def test_ctrl_c_ends_in_two_seconds_and_resume_continues(tmp_path: Path) -> None:
    """In a process of its own, as a person would: the signal, the time to the end, the line that says how to go on."""
    command = [sys.executable, "-m", "diffattn", "compare", "--shape", write_shape(tmp_path), "--out", "out",
               "--text", write_text(tmp_path), "--variants", "softmax", "--seeds", "1"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [*command, "--steps", "3000"], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "out/softmax-seed0/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 20):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    began = time.monotonic()
    run.send_signal(2)
    _, printed = run.communicate(timeout=30)
    took = time.monotonic() - began
    assert run.returncode == 130
    assert "diffattn compare --resume --out out" in printed
    assert "Traceback" not in printed
    assert took < 2.0
    steps = metrics.read_text().count('"loss"')
    saved = {int(path.name.split("-")[1]) for path in (tmp_path / "out/softmax-seed0").glob("checkpoint-*")}
    assert max(saved) == steps
