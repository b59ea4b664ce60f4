"""The folder of a run, a comparison or a ladder where that of a model is wanted: every verb names the model's."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from support.small_comparison import write_shape, write_text
from support.small_folders import small_folder

from diffattn.cli.main import main

VERBS = {
    "generate": "generate {folder} Oslo",
    "generate --assistant": "generate {model} Oslo --assistant {folder}",
    "serve": "serve {folder} --port 0",
    "convert": "convert {folder} made --to diffllama",
    "export": "export {folder} --onnx --out made",
    "eval noise": "eval noise {folder}",
    "eval of seeds": "eval outliers {model} v1={model},{folder}",
    "lens": "lens {folder} --text Oslo",
    "lens of two": "lens {model} {folder} --text Oslo",
    "demo": "demo {folder} --out made.html",
    "demo of two": "demo {model} {folder} --out made.html",
    "plan": "plan --model {folder}",
    "plan of a variant": "plan --model softmax:{folder}",
    "train": "train --from {folder} --out made",
}
RUN = {"config.json": {"recipe": {"steps": 3}, "model": {"attention": "diff_v1"}, "data": {"name": "text"}}}
COMPARISON = {"config.json": {"options": {"steps": 3}, "command": "diffattn compare"}}
LADDER = {"rows.jsonl": {"attention": "softmax", "seed": 0, "val_loss": 1.0}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("a") / "model")


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DIFFATTN_FUSED", "0")
    monkeypatch.chdir(tmp_path)


def write(folder: str, files: dict[str, dict]) -> None:
    Path(folder).mkdir(parents=True)
    for name, content in files.items():
        Path(folder, name).write_text(json.dumps(content) + "\n")


def refused(command: str, capsys: pytest.CaptureFixture[str], **places: object) -> str:
    before = sorted(Path().rglob("*"))
    assert main([word.format(**places) for word in command.split()]) == 2
    out, line = capsys.readouterr()
    assert (out, line.count("\n")) == ("", 1), line
    assert sorted(Path().rglob("*")) == before
    return line


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_of_runs_is_not_a_models(verb: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("run", RUN)
    line = refused(VERBS[verb], capsys, folder="run", model=model)
    assert (
        "'run' is the folder of a run, which has no model yet; wanted the folder of a model: finish it with diff"
        in line
    )
    shutil.copytree(model, "run/model")
    line = refused(VERBS[verb], capsys, folder="run", model=model)
    assert line == "diffattn: 'run' is the folder of a run; wanted the folder of a model: take 'run/model'\n"
    for folder, files, what in (("compared", COMPARISON, "a comparison"), ("ladder", LADDER, "a ladder")):
        write(folder, files)
        line = refused(VERBS[verb], capsys, folder=folder, model=model)
        assert (
            f"'{folder}' is the folder of {what}, none of whose runs has finished; wanted the folder of a model" in line
        )
        write(f"{folder}/diff_v1-seed0", RUN)
        shutil.copytree(model, f"{folder}/diff_v1-seed0/model")
        line = refused(VERBS[verb], capsys, folder=folder, model=model)
        assert f"wanted the folder of a model: take '{folder}/diff_v1-seed0/model'\n" in line


def test_a_folder_with_a_space_is_named_so_that_the_command_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    write("my run", RUN)
    assert main(["generate", "my run", "Oslo"]) == 2
    assert capsys.readouterr().err.endswith("diffattn train --resume --out 'my run'\n")
    write("-mine", RUN)
    assert main(["generate", "./-mine", "Oslo"]) == 2
    assert capsys.readouterr().err.endswith("diffattn train --resume --out ./-mine\n")


def test_the_command_that_finishes_a_run_does_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    train = ["train", "--shape", write_shape(inputs), "--text", write_text(inputs), "--steps", "2", "--out", "my run"]
    assert main(train) == 0
    # As a run that was killed before it wrote its model.
    shutil.rmtree("my run/model")
    Path("my run/result.json").unlink()
    capsys.readouterr()
    assert main(["generate", "my run", "the"]) == 2
    command = capsys.readouterr().err.rpartition("finish it with ")[2]
    assert main(shlex.split(command)[1:]) == 0
    assert main(["generate", "my run/model", "the", "--max-new-tokens", "2"]) == 0
