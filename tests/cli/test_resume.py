"""``--resume`` takes the run's own options: from anywhere, whatever was given, and nothing that contradicts them."""

import json
import os
import shutil
from pathlib import Path

import pytest
from support.small_comparison import write_shape, write_text

from diffattn.cli.main import main
from diffattn.files import file_facts
from diffattn.train.callbacks import RunCallback

OPTIONS = {
    "train": "--steps 6 --attention diff_v2 --match shape --context 16 --seed 3 --batch-size 2 --learning-rate 0.003 "
    "--gradient-accumulation 2 --warmup-fraction 0.2 --weight-decay 0.2 --checkpoints 3 --evaluations 2 "
    "--dtype float32",
    "compare": "--variants softmax diff_v2 --seeds 1 --steps 6 --match shape --context 16 --batch-size 2",
}


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The text's alone: the compiled kernel's stays where it is.
    monkeypatch.setattr("diffattn.cache.cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "my work").mkdir()
    monkeypatch.chdir(tmp_path / "my work")
    write_shape(Path("."))
    write_text(Path("."))


def cut(step: int, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Ctrl-C in a step of the last model; the command that is printed."""
    original = RunCallback.on_log

    def on_log(self: RunCallback, args: object, state: object, *rest: object, **more: object) -> None:
        original(self, args, state, *rest, **more)
        if state.global_step == step and "diff_v2" in str(self.metrics.path) + " ".join(arguments[:7]):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunCallback, "on_log", on_log)
        assert main(arguments) == 130
    return capsys.readouterr().err.rpartition("go on with: diffattn ")[2].strip()


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row.get("loss", row.get("val_loss")) for row in rows]


def start(verb: str, out: str) -> list[str]:
    return [verb, *OPTIONS[verb].split(), "--shape", "small.toml", "--text", "text", "--out", out]


def last_run(verb: str, out: str) -> Path:
    return Path(out) if verb == "train" else Path(out) / "diff_v2-seed0"


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_the_printed_command_goes_on_to_the_same_losses_from_anywhere(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(start(verb, "whole")) == 0
    again = cut(4, start(verb, "it's"), capsys)
    assert again == f"""{verb} --resume --out 'it'"'"'s'"""
    whole = losses(last_run(verb, "whole"))
    # The shape and the text were named from the folder that was worked in then.
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    Path("../small.toml").unlink()
    assert main([verb, "--resume", "--out", "../it's"]) == 0
    assert losses(last_run(verb, "../it's")) == whole


def test_a_run_before_its_first_step_and_before_its_config_say_what_works(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffattn.train.single.prepare_data", stop)
        assert main(start("train", "early")) == 130
    said = capsys.readouterr().err
    words = "stopped before anything was trained; start again with: diffattn "
    assert words in said
    command = said.rpartition(words)[2].strip()
    assert command.split() == start("train", "early")
    assert main(command.split()) == 0


CONTRADICTIONS = [
    ("train", ["--steps", "7"], "--steps 6, now --steps 7"),
    ("train", ["--steps", "300"], "--steps 6, now --steps 300"),
    ("train", ["--attention", "diff_v1"], "--attention diff_v2, now --attention diff_v1"),
    ("train", ["--shape", "3M"], "--shape small, now --shape 3M"),
    ("train", ["--match", "parameters"], "--match shape, now --match parameters"),
    ("train", ["--context", "32"], "--context 16, now --context 32"),
    ("train", ["--seed", "0"], "--seed 3, now --seed 0"),
    ("train", ["--batch-size", "4"], "--batch-size 2, now --batch-size 4"),
    ("train", ["--gradient-accumulation", "1"], "--gradient-accumulation 2, now --gradient-accumulation 1"),
    ("train", ["--learning-rate", "0.002"], "--learning-rate 0.003, now --learning-rate 0.002"),
    ("train", ["--warmup-fraction", "0.05"], "--warmup-fraction 0.2, now --warmup-fraction 0.05"),
    ("train", ["--anneal-fraction", "0.25"], "--anneal-fraction 0.5, now --anneal-fraction 0.25"),
    ("train", ["--weight-decay", "0.1"], "--weight-decay 0.2, now --weight-decay 0.1"),
    ("train", ["--checkpoints", "4"], "--checkpoints 3, now --checkpoints 4"),
    ("train", ["--evaluations", "4"], "--evaluations 2, now --evaluations 4"),
    ("train", ["--dtype", "bfloat16"], "--dtype float32, now --dtype bfloat16"),
    ("train", ["--text", "sotu"], "/my work/text', now --text sotu"),
    ("train", ["--from", "whole/model"], "without --from, now --from whole/model"),
    ("compare", ["--steps", "7"], "--steps 6, now --steps 7"),
    ("compare", ["--seeds", "2"], "--seeds 1, now --seeds 2"),
    ("compare", ["--variants", "softmax", "diff_v1"], "--variants softmax diff_v2, now --variants softmax diff_v1"),
    ("compare", ["--shape", "3M"], "--shape small.toml, now --shape 3M"),
    ("compare", ["--match", "parameters"], "--match shape, now --match parameters"),
    ("compare", ["--minutes", "6"], "without --minutes, now --minutes 6.0"),
    ("compare", ["--learning-rate", "0.1"], "--learning-rate 0.002, now --learning-rate 0.1"),
    ("compare", ["--text", "sotu"], "/my work/text', now --text sotu"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short run of each verb, and what they were made of."""
    folder, before = tmp_path_factory.mktemp("runs") / "my work", Path.cwd()
    folder.mkdir()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffattn.cache.cache_folder", lambda: folder.parent / "cache")
        write_shape(folder)
        write_text(folder)
        for verb in ("train", "compare"):
            assert main(start(verb, verb)) == 0
    os.chdir(before)
    return folder


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line, from a folder in which nothing changes and for which no data is prepared."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        for module in ("diffattn.train.single", "diffattn.train.continued", "diffattn.study.compare"):
            patch.setattr(f"{module}.prepare_data", lambda *given, **more: pytest.fail("data was prepared"))
        assert main(arguments) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    return line


@pytest.mark.parametrize(("verb", "more", "words"), CONTRADICTIONS)
def test_an_option_that_contradicts_is_refused_before_data_is_prepared(
    verb: str, more: list[str], words: str, runs: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(runs)
    line = refused([verb, "--resume", "--out", verb, *more], capsys)
    assert line.startswith(f"diffattn: {verb} was started with")
    assert words in line
    assert line.endswith(" out, or choose another --out\n")


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_options_that_agree_may_be_given(
    verb: str, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    assert main([*start(verb, verb), "--resume", "--device", "auto"]) == 0
    # The same text in another place, and the same shape under another name.
    shutil.copytree("text", "moved")
    shutil.copy("small.toml", "other.toml")
    try:
        assert main([verb, "--resume", "--out", verb, "--text", "moved", "--shape", "other.toml"]) == 0
        (Path("moved") / "00.txt").write_text("Another text.")
        line = refused([verb, "--resume", "--out", verb, "--text", "moved"], capsys)
        assert "now --text moved;" in line
    finally:
        shutil.rmtree("moved")
        Path("other.toml").unlink()


def test_a_text_that_is_gone_is_named_and_may_be_given_where_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cut(4, start("train", "out"), capsys) == "train --resume --out out"
    Path("text").rename("moved")
    assert main(["train", "--resume", "--out", "out"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "my work/text" in line
    assert main(["train", "--resume", "--out", "out", "--text", "moved"]) == 0


def test_a_model_that_is_trained_on_goes_on_with_its_source(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = runs / "train" / "model"
    arguments = ["train", "--from", str(model), "--text", "text", "--context", "16", "--steps", "4"]
    assert main([*arguments, "--out", "whole"]) == 0
    original = RunCallback.on_log

    def on_log(self: RunCallback, args: object, state: object, *rest: object, **more: object) -> None:
        original(self, args, state, *rest, **more)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunCallback, "on_log", on_log)
        assert main([*arguments, "--out", "cut"]) == 130
    for more, words in (
        (["--shape", "small.toml"], "cut was started without --shape, now --shape small.toml;"),
        (["--attention", "softmax"], "cut was started with --attention diff_v2, now --attention softmax;"),
        (["--learning-rate", "0.002"], "cut was started with --learning-rate 0.0001, now --learning-rate 0.002"),
    ):
        assert words in refused(["train", "--resume", "--out", "cut", *more], capsys)
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    assert main(["train", "--resume", "--out", "cut", "--from", str(moved)]) == 0
    assert losses(Path("cut")) == losses(Path("whole"))


def to_earlier_form(checkpoint: Path) -> None:
    """Adds the file by which a checkpoint of an earlier version is known, a pickle, and seals it."""
    (checkpoint / "optimizer.pt").write_bytes(b"pickle")
    facts = json.loads((checkpoint / "manifest.json").read_text())
    facts["optimizer.pt"] = file_facts(checkpoint / "optimizer.pt")
    (checkpoint / "manifest.json").write_text(json.dumps(facts))


def test_a_run_of_an_earlier_version_is_finished_by_that_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Its checkpoints hold a pickle, which is not read."""
    cut(4, start("train", "out"), capsys)
    checkpoint = Path("out/checkpoint-4")
    to_earlier_form(checkpoint)
    line = refused(["train", "--resume", "--out", "out"], capsys)
    assert "out/checkpoint-4 was written by an earlier version of diffattn" in line
    assert "finish the run with the version that began it" in line
    assert checkpoint.is_dir()


def test_a_finished_run_of_an_earlier_version_has_its_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(start("train", "out")) == 0
    (checkpoint,) = Path("out").glob("checkpoint-*")
    to_earlier_form(checkpoint)
    said = capsys.readouterr().err.splitlines()[-1]
    assert main(["train", "--resume", "--out", "out"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == said
