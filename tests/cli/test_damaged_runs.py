"""Each file of a run folder damaged in each way: one line, exit status 2, nothing changed; or noticed and made good."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.small_comparison import write_shape, write_text

from diffattn.cli.main import main
from diffattn.train.callbacks import RunCallback
from diffattn.train.checkpoints.sealing import defect

START = {
    "train": "train --steps 4 --checkpoints 2 --evaluations 1 --context 16 --shape small.toml --text text --out run",
    "compare": "compare --variants softmax --seeds 1 --steps 4 --context 16 --shape small.toml --text text --out run",
    "scale run": "scale run --sizes 7k --tokens 64 --seeds 1 --variants softmax --vocab-size 300 --context 16 "
    "--batch-size 1 --text text --out run",
}
RESUME = {"train": "train --resume --out run", "compare": "compare --resume --out run", "scale run": START["scale run"]}


def edited(content: bytes, change: Callable[[object], object]) -> bytes:
    """JSON with a value of its own changed; of rows, the first."""
    first, rest = (content, b"") if content.startswith(b"{\n") else content.split(b"\n", 1)
    return json.dumps(change(json.loads(first))).encode() + (b"\n" + rest if rest or first != content else b"")


def other_numbers(value: object) -> object:
    if isinstance(value, dict):
        return {key: other_numbers(item) for key, item in value.items()}
    return value + 1 if isinstance(value, int | float) and not isinstance(value, bool) else value


def huge_numbers(value: object) -> object:
    if isinstance(value, dict):
        return {key: huge_numbers(item) for key, item in value.items()}
    return 10**400 if isinstance(value, int | float) and not isinstance(value, bool) else value


def lists_for_parts(value: object) -> object:
    return {key: [item] for key, item in value.items()} if isinstance(value, dict) else [value]


WAYS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "a list": lambda content: b"[]\n",
    "null": lambda content: b"null\n",
    "a number": lambda content: b"5\n",
    "an empty object": lambda content: b"{}\n",
    "no JSON": lambda content: b"{'loss': 1\n",
    "no UTF-8": lambda content: b"\xff\xfe" + content,
    "zeros": lambda content: bytes(len(content)),
    "deep": lambda content: b"[" * 100_000 + b"\n",
    "a deep value": lambda content: b'{"step": ' + b'{"a":' * 100_000 + b"\n",
    "other numbers": lambda content: edited(content, other_numbers),
    "numbers of 400 digits": lambda content: edited(content, huge_numbers),
    "numbers of 5000 digits": lambda content: b'{"step": ' + b"9" * 5000 + b"}\n",
    "lists for parts": lambda content: edited(content, lists_for_parts),
    "texts for numbers": lambda content: content.replace(b": 1", b': "1"').replace(b": 0.", b': "0.'),
}
# Of a run that was stopped in step 3, and of one that was finished.
FILES = {
    ("train", "cut"): ["config.json", "metrics.jsonl", "checkpoint-2/manifest.json", "checkpoint-2/trainer_state.json"],
    ("train", "finished"): ["config.json", "metrics.jsonl", "result.json", "model/config.json"],
    ("compare", "cut"): ["config.json", "softmax-seed0/config.json", "softmax-seed0/metrics.jsonl"],
    ("compare", "finished"): ["config.json", "softmax-seed0/result.json", "softmax-seed0/metrics.jsonl"],
    ("scale run", "cut"): ["RUN/config.json", "RUN/metrics.jsonl"],
    ("scale run", "finished"): ["rows.jsonl"],
}
# Where a checkpoint itself is damaged, the one before it is used, and it is said.
MADE_GOOD = "checkpoint-2/"
CASES = [(verb, state, name) for (verb, state), names in FILES.items() for name in names]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """By verb and state, a folder to work in with a run of it."""
    root = tmp_path_factory.mktemp("runs")
    original = RunCallback.on_log

    def stop(self: RunCallback, args: object, state: object, *rest: object, **more: object) -> None:
        original(self, args, state, *rest, **more)
        if state.global_step == 3:
            # As a kill would: without a checkpoint of this step.
            raise RuntimeError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffattn.cache.cache_folder", lambda: root / "cache")
        for verb, state in FILES:
            folder = root / f"{verb}-{state}"
            folder.mkdir()
            write_shape(folder)
            write_text(folder)
            patch.chdir(folder)
            with pytest.MonkeyPatch.context() as inner:
                if state == "cut":
                    inner.setattr(RunCallback, "on_log", stop)
                    with pytest.raises(RuntimeError):
                        main(START[verb].split())
                else:
                    assert main(START[verb].split()) == 0
        yield root


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}


@pytest.mark.parametrize(("verb", "state", "name"), CASES)
def test_a_damaged_file_is_one_line_and_nothing_is_changed(
    verb: str, state: str, name: str, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs / f"{verb}-{state}"
    monkeypatch.chdir(folder)
    monkeypatch.setattr("diffattn.cache.cache_folder", lambda: runs / "cache")
    whole = contents()
    (run,) = [path for path in Path("run").iterdir() if path.is_dir()] if "RUN" in name else [Path("run")]
    file = run / name.removeprefix("RUN/")
    for way, damage in WAYS.items():
        file.write_bytes(damage(whole[file]))
        if file.read_bytes() == whole[file]:
            continue
        if name.startswith(MADE_GOOD):
            assert defect(file.parent) is not None, way
            # One of them is as good as all, and each takes a second.
            if way != "deep":
                file.write_bytes(whole[file])
                continue
        before = contents()
        capsys.readouterr()
        status = main(RESUME[verb].split())
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffattn: ")]
        # Without its row, a run that is finished is asked for its result.
        if name.startswith(MADE_GOOD) or (name, way) == ("rows.jsonl", "empty"):
            assert status == 0, (way, lines)
            shutil.rmtree("run")
            for path, content in whole.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            continue
        assert status == 2, (way, lines)
        assert len(lines) == 1, way
        assert len(lines[0]) < 700, way
        assert contents() == before, way
        file.write_bytes(whole[file])


@pytest.mark.parametrize(("verb", "state"), [key for key in FILES if key[1] == "cut"])
def test_an_undamaged_run_goes_on(
    verb: str, state: str, runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the refusals above are worth."""
    monkeypatch.setattr("diffattn.cache.cache_folder", lambda: runs / "cache")
    shutil.copytree(runs / f"{verb}-{state}", tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    arguments = RESUME[verb].split()
    assert main(arguments if verb == "scale run" else [*arguments, "--text", "text"]) == 0
