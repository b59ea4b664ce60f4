"""Every command that the program prints works as it is printed: it is taken from the line and run."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.small_comparison import write_shape, write_text

from diffattn.cli.main import VERBS, load, main
from diffattn.cli.options import options_of
from diffattn.probes import run as evaluation
from diffattn.sealed import sealed
from diffattn.train.callbacks import RunCallback

SOURCES = Path(__file__).parents[2] / "src" / "diffattn"
LADDER = (
    "--seeds 1 --vocab-size 300 --context 16 --batch-size 2 --tokens 64 --device cpu --dtype float32 --text 'my text'"
)
RUN = "train --shape small.toml --text 'my text' --steps 2 --context 16 --out 'a run'"
STARTED = {
    "scale run": f"scale run --sizes 7k 38k 100k 200k --variants softmax diff_v1 {LADDER} --out 'a ladder'",
    "eval ablation": f"eval ablation --size 7k --arms softmax {LADDER} --out 'an ablation'",
}


@pytest.fixture(scope="module", autouse=True)
def _work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder with a text and a run, both with a space in their names."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffattn.cache.cache_folder", lambda: folder / "cache")
        patch.chdir(folder)
        write_shape(folder)
        write_text(folder)
        Path("text").rename("my text")
        assert run(f"diffattn {RUN}") == 0
        yield


def run(command: str) -> int:
    """As a shell would take it apart."""
    program, *words = shlex.split(command)
    assert program == "diffattn"
    return main(words)


def printed(after: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The command behind some words, in what is on stderr."""
    said = capsys.readouterr().err
    assert after in said, said
    return said.rpartition(after)[2].splitlines()[0]


def stop_in(owner: Any, name: str, call: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Ctrl-C behind the call of that number."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        original, calls = getattr(owner, name), []

        def counted(*given: Any, **more: Any) -> Any:
            result = original(*given, **more)
            calls.append(name)
            if len(calls) == call:
                raise KeyboardInterrupt
            return result

        patch.setattr(owner, name, counted)

    return apply


@pytest.mark.parametrize("verb", STARTED)
def test_behind_ctrl_c_in_a_ladder(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_in(RunCallback, "on_log", 1)(patch)
        assert run(f"diffattn {STARTED[verb]}") == 130
    again = printed("what was trained is kept, go on with: ", capsys)
    assert shlex.split(again)[1:] == shlex.split(STARTED[verb])
    assert run(again) == 0


def test_behind_ctrl_c_in_a_study_that_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    command = "diffattn eval low_bit 'a run/model' --context 16 --samples 2 --text 'my text' --keep 'kept it'"
    with pytest.MonkeyPatch.context() as patch:
        stop_in(evaluation, "write_json", 1)(patch)
        assert run(command) == 130
    assert run(printed("go on with: ", capsys)) == 0


def test_how_a_run_without_a_model_is_finished(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_in(RunCallback, "on_log", 1)(patch)
        assert run(f"diffattn {RUN.replace('a run', 'a cut')}") == 130
    assert run("diffattn generate 'a cut' the") == 2
    assert run(printed("finish it with ", capsys)) == 0
    assert Path("a cut/model/config.json").exists()


def test_how_rows_are_fitted(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"diffattn {STARTED['scale run']}") == 0
    # Losses that fall with the size, which so few steps do not promise.
    rows = Path("a ladder/rows.jsonl")
    made = [json.loads(line) for line in rows.read_text().splitlines()]
    for row in made:
        row["val_loss"] = 2.0 + 30.0 / row["hidden_size"] - 0.05 * (row["attention"] == "diff_v1")
        del row["seal"]
    rows.write_text("".join(json.dumps(sealed(row)) + "\n" for row in made))
    capsys.readouterr()
    assert run(f"diffattn {STARTED['scale run']}") == 0
    command = printed("fit them with: ", capsys)
    assert command == "diffattn scale fit 'a ladder/rows.jsonl'"
    assert run(command) == 0
    # Of one size there is no law, and nothing is proposed.
    assert run(f"diffattn {STARTED['scale run'].replace(' 38k 100k 200k', '').replace('a ladder', 'a rung')}") == 0
    assert "fit them with" not in capsys.readouterr().err


RESULTS = {
    "compare": "compare --shape small.toml --text 'my text' --variants softmax --seeds 1 --steps 2 --out 'a pair' "
    "--json",
    "eval": "eval low_bit 'a run/model' --context 16 --samples 2 --text 'my text' --json",
    "lens": "lens 'a run/model' --text 'the state of the union' --html 'a page.html' --json",
    "plan": "plan --model diff_v1:300K --json",
    "scale fit": "scale fit figure3a --bootstrap 100 --json",
}


@pytest.mark.parametrize("verb", RESULTS)
def test_the_command_in_a_result_makes_it(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    command = f"diffattn {RESULTS[verb]}"
    for _ in range(2):
        assert run(command) == 0
        results.append(json.loads(capsys.readouterr().out))
        command = results[-1]["command"]
        shutil.rmtree("a pair", ignore_errors=True)
    assert results[0]["command"] == results[1]["command"] == f"diffattn {RESULTS[verb]}"
    assert results[0].keys() == results[1].keys()


@pytest.mark.parametrize("verb", VERBS)
def test_where_help_is(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"diffattn {verb} --no-such-option-as-this") == 2
    assert run(printed("see ", capsys)) == 0
    assert f"usage: diffattn {verb}" in capsys.readouterr().out


def test_every_verb_and_option_that_is_named_in_a_message_is_there() -> None:
    named = [
        (file.name, found)
        for file in sorted(SOURCES.rglob("*.py"))
        for found in re.findall(
            r"diffattn ((?:scale |eval )?[a-z_]+)((?: --[a-z]+)*)(?=[ :;.,`'\"(\n{]|$)",
            file.read_text(encoding="utf-8"),
        )
        if found[0] in VERBS or found[1]
    ]
    assert len(named) > 20
    for file, (verb, options) in named:
        assert verb in VERBS or verb == "eval", (file, verb)
        known = {option.name for option in options_of(load(verb))} if verb in VERBS else {"--list"}
        known.add("--help")
        assert set(options.split()) <= known, (file, verb, options)
