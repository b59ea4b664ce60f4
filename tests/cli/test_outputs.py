"""No verb writes over, renames or deletes what is another's."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.small_comparison import write_shape, write_text
from support.small_folders import small_folder

from diffattn.cli.main import main

INTO_A_FOLDER = {
    "train": "train --shape {shape} --text {text} --steps 2 --out {out}",
    "train --resume": "train --resume --shape {shape} --text {text} --steps 2 --out {out}",
    "train --from": "train --from {model} --text {text} --steps 2 --out {out}",
    "compare": "compare --shape {shape} --text {text} --steps 2 --out {out}",
    "compare --resume": "compare --resume --out {out}",
    "scale run": "scale run --sizes 20k --tokens 1k --seeds 1 --context 32 --text {text} --out {out}",
    "eval ablation": "eval ablation --size 20k --tokens 1k --seeds 1 --context 32 --text {text} --out {out}",
    "convert": "convert {model} {out} --to diffllama",
    "export": "export {model} --onnx --out {out}",
    "eval noise": "eval noise {model} --text {text} --keep {out}",
}
INTO_A_FILE = {
    "plan": "plan --html {out}",
    "lens --html": "lens {model} --text {word} --html {out}",
    "lens --png": "lens {model} --text {word} --html other.html --png {out}",
    "demo": "demo {model} --out {out}",
    "scale fit --html": "scale fit figure3a --bootstrap 100 --html {out}",
    "scale fit --png": "scale fit figure3a --bootstrap 100 --png {out}",
    "eval outliers": "eval outliers {model} --text {text} --png {out}",
    "eval ablation": "eval ablation --size 20k --tokens 1k --seeds 1 --text {text} --png {out} --out runs",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the verbs read."""
    folder = tmp_path_factory.mktemp("inputs")
    model = small_folder(folder / "model")
    return {"shape": write_shape(folder), "text": write_text(folder), "model": str(model), "word": "lower"}


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFATTN_CACHE", str(tmp_path / "cache"))
    # Nothing here is a matter of the kernel, which that cache does not hold.
    monkeypatch.setenv("DIFFATTN_FUSED", "0")
    monkeypatch.chdir(tmp_path)


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder: files with their bytes, links with their targets."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
    return found


def refused(command: str, capsys: pytest.CaptureFixture[str], **places: str) -> str:
    """Status 2, one line, nothing changed anywhere; gives the line."""
    before = tree(Path.cwd())
    assert main([word.format(**places) for word in command.split()]) == 2
    out, line = capsys.readouterr()
    assert (out, line.count("\n")) == ("", 1), line
    assert line.startswith("diffattn: ")
    assert tree(Path.cwd()) == before
    return line


def files(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def a_models(folder: Path) -> None:
    """As ``save_pretrained`` and the Trainer of another program leave it."""
    files(folder, {"config.json": '{"model_type": "llama"}', "model.safetensors": "weights", "metrics.jsonl": "{}\n",
                   "checkpoint-5/trainer_state.json": "{}", "checkpoint-5/config.json": "{}"})  # fmt: skip


def links(folder: Path) -> None:
    files(folder.with_name("elsewhere"), {"model/weights": "mine"})
    folder.mkdir()
    (folder / "model").symlink_to(folder.with_name("elsewhere"))
    (folder / "checkpoint-5").symlink_to(folder.with_name("elsewhere"))


def a_linked_folder(folder: Path) -> None:
    files(folder.with_name("elsewhere"), {"model/weights": "mine"})
    folder.symlink_to("elsewhere")


FOREIGN: dict[str, Callable[[Path], None]] = {
    "a folder named model": lambda folder: files(folder, {"model/notes.txt": "mine"}),
    "an empty folder named model": lambda folder: (folder / "model").mkdir(parents=True),
    "a checkpoint": lambda folder: files(folder, {"checkpoint-5/weights": "mine"}),
    "half-written names": lambda folder: files(folder, {"model.partial/a": "mine", "checkpoint-5.partial/a": "mine"}),
    "another program's model": a_models,
    "another program's rows": lambda folder: files(folder, {"rows.jsonl": '{"text": "mine"}\n' * 3}),
    "another program's config": lambda folder: files(folder, {"config.json": '{"model": "mine", "port": 3}'}),
    "a config that is no JSON": lambda folder: files(folder, {"config.json": "{", "model/a": "mine"}),
    "a hidden file": lambda folder: files(folder, {".keep": ""}),
    "a name of two lines": lambda folder: files(folder, {"a\nb": "mine"}),
    "a name that is no text": lambda folder: files(folder, {os.fsdecode(b"caf\xe9"): "mine"}),
    "links": links,
    "a linked folder": a_linked_folder,
    "a link to nothing": lambda folder: folder.symlink_to("absent"),
    "a file": lambda folder: files(folder.parent, {folder.name: "mine"}),
}


@pytest.mark.parametrize("verb", INTO_A_FOLDER)
@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_folder_of_anothers_is_refused(
    verb: str, foreign: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    FOREIGN[foreign](Path("out"))
    files(Path("out.partial"), {"a": "mine"})
    line = refused(INTO_A_FOLDER[verb], capsys, out="out", **places)
    assert "'out'" in line or "out holds no" in line
    assert "wanted" in line


@pytest.mark.parametrize("verb", INTO_A_FOLDER)
def test_an_option_without_a_name_is_the_folder_one_stands_in(
    verb: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    files(Path(), {"notes.txt": "mine"})
    for out, name in (("", "."), (".", "."), ("/", "/")):
        line = refused(INTO_A_FOLDER[verb], capsys, out=out, **places)
        assert f"'{name}' is not empty" in line or f": {name} holds no" in line


@pytest.mark.parametrize("verb", INTO_A_FILE)
def test_a_file_of_anothers_is_refused(verb: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    command = INTO_A_FILE[verb]
    option = command[: command.index(" {out}")].rpartition(" ")[2]
    for content in ("<html><body>mine</body></html>", "mine" * 5000, "\n"):
        Path("page").write_text(content)
        line = refused(command, capsys, out="page", **places)
        assert f"{option} 'page' is a file that diffattn did not write; wanted a new file" in line
    Path("link").symlink_to("page")
    Path("folder").mkdir()
    assert "choose another name" in refused(command, capsys, out="link", **places)
    assert " is a folder; wanted the name of a file" in refused(command, capsys, out="folder", **places)
    assert " is a folder; wanted the name of a file" in refused(command, capsys, out="", **places)
    assert f"{option} 'page/below' cannot be written" in refused(command, capsys, out="page/below", **places)
    assert f"{option} '/proc/absent/page' cannot be written" in refused(
        command, capsys, out="/proc/absent/page", **places
    )


def test_one_file_for_two_is_refused(places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    line = refused("lens {model} --text {word} --html page --png ./page", capsys, **places)
    assert "--html and --png both name 'page'" in line
    line = refused("scale fit figure3a --html page --png page", capsys, **places)
    assert "--png and --html both name 'page'" in line


def test_the_second_picture_of_a_lens_is_looked_at_too(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    os.symlink(places["model"], "other")
    Path("maps-other.png").write_text("mine")
    command = "lens {model} other --text {word} --html page --png maps.png"
    assert "'maps-other.png' is a file that diffattn did not write" in refused(command, capsys, **places)


WRITTEN = {
    "plan": "plan --html {out}",
    "lens": "lens {model} --text {word} --html {out}",
    "lens --png": "lens {model} --text {word} --html other.html --png {out}",
    "scale fit": "scale fit figure3a --bootstrap 100 --html {out}",
    "scale fit --png": "scale fit figure3a --bootstrap 100 --png {out}",
}


@pytest.mark.parametrize("verb", WRITTEN)
def test_what_a_verb_wrote_it_writes_again(
    verb: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A new file in a new folder, an empty one, by a link, and one of ours; nothing lies beside it afterwards."""
    command = [word.format(out="new/page", **places) for word in WRITTEN[verb].split()]
    Path("new").mkdir()
    Path("new/target").touch()
    Path("new/page").symlink_to("target")
    for _ in range(2):
        assert main(command) == 0, capsys.readouterr().err
        assert Path("new/page").is_symlink()
        assert Path("new/target").stat().st_size > 1000
    assert sorted(os.listdir("new")) == ["page", "target"]


def test_a_new_page_makes_its_folder_and_a_device_stays_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--html", "a/b/page.html"]) == 0
    assert os.listdir("a/b") == ["page.html"]
    assert main(["plan", "--html", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()


def test_a_run_is_started_in_an_empty_folder_and_goes_on_in_its_own(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    files(Path("out"), {".DS_Store": "of the system"})
    command = INTO_A_FOLDER["train"].format(out="out", **places).split()
    assert main(command) == 0
    capsys.readouterr()
    assert "out holds a run already; wanted a new folder: continue it with --resume" in refused(
        INTO_A_FOLDER["train"], capsys, out="out", **places
    )
    files(Path("out"), {"notes.txt": "mine", "checkpoint-1/weights": "mine", "model.partial/a": "mine"})
    kept = tree(Path("out"))
    assert main([*command, "--resume"]) == 0
    assert tree(Path("out")) == kept
    capsys.readouterr()
    # A run is neither a comparison nor a ladder nor the place of a checkpoint, nor where it goes on by itself.
    for verb in ("compare", "compare --resume", "scale run", "eval ablation", "convert", "export", "eval noise"):
        assert ", of a run; wanted a new or an empty" in refused(INTO_A_FOLDER[verb], capsys, out="out", **places)
    line = refused("train --from out/model --text {text} --out out", capsys, **places)
    assert "out holds a run already" in line
    assert "'out/model' is not empty" in refused(
        "train --from out/model --text {text} --out out/model", capsys, **places
    )
    assert "lies inside it" in refused("convert out/model out/model --to diffllama", capsys, **places)
    assert "it holds 'config.json'" in refused("export out/model --onnx --out out/model", capsys, **places)


def test_a_run_whose_config_is_damaged_is_told_so(places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    command = INTO_A_FOLDER["train"].format(out="out", **places).split()
    assert main(command) == 0
    capsys.readouterr()
    for content in ("", "{", '{"recipe": {}}'):
        Path("out/config.json").write_text(content)
        for verb in ("train --resume", "train"):
            assert "it is not empty" not in refused(INTO_A_FOLDER[verb], capsys, out="out", **places)


def test_what_no_run_wrote_where_its_model_is_to_stand_is_not_replaced(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = INTO_A_FOLDER["train"].format(out="out", **places).split()
    assert main(command) == 0
    capsys.readouterr()
    # As a run that was killed before its last file.
    Path("out/result.json").unlink()
    Path("out/model/notes.txt").write_text("mine")
    assert "out/model holds files that no run wrote" in refused(
        INTO_A_FOLDER["train --resume"], capsys, out="out", **places
    )
    Path("out/model/notes.txt").unlink()
    assert main([*command, "--resume"]) == 0
    assert Path("out/result.json").exists()


@pytest.mark.parametrize("verb", ["scale run", "eval ablation"])
def test_a_ladder_goes_on_in_its_own_folder(
    verb: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    option = "--variants" if verb == "scale run" else "--arms"
    arms = [option, "softmax"]
    assert main([*INTO_A_FOLDER[verb].format(out="out", **places).split(), *arms]) == 0
    rows = Path("out/rows.jsonl").read_bytes()
    (run,) = (path for path in Path("out").iterdir() if path.is_dir())
    # The rows alone, as for a ladder that others began; a run before it has a row; the lock of one that begins; an
    # empty file of a process that was stopped before its first row.
    files(Path("of rows"), {"rows.jsonl": rows.decode()})
    shutil.copytree(run, Path("of a run") / run.name)
    files(Path("of a lock"), {f"{run.name}.lock": ""})
    files(Path("of nothing"), {"rows.jsonl": ""})
    for folder in ("out", "of rows", "of a run", "of a lock", "of nothing"):
        command = [word.format(out=folder, **places) for word in INTO_A_FOLDER[verb].split()]
        assert main([*command, *arms]) == 0, capsys.readouterr().err
        assert Path(folder, "rows.jsonl").read_bytes().count(b"\n") == 1
    assert [Path(folder, "rows.jsonl").read_bytes() for folder in ("out", "of rows")] == [rows, rows]
