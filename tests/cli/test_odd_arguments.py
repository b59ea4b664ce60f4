"""Names that are no UTF-8 or too long, and numbers without end: printed, used, or refused in one line."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
from support.small_comparison import write_shape, write_text

from diffattn.cli.arguments import parse
from diffattn.cli.main import VERBS, load, main
from diffattn.cli.options import options_of
from diffattn.cli.terminal.console import print_json
from diffattn.errors import ConfigError
from diffattn.files import command, write_json
from diffattn.files import write_text as write_file
from diffattn.scaling.options import LadderOptions
from diffattn.study.options import CompareOptions
from diffattn.train.recipe import Recipe

ODD = os.fsdecode(b"od\xffd")


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffattn.cache.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def test_a_text_and_a_shape_of_any_name_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    write_shape(Path())
    write_text(Path())
    os.rename("text", ODD)
    os.rename("small.toml", f"{ODD}.toml")
    sizes = ["--steps", "2", "--context", "16"]
    assert main(["train", "--shape", f"{ODD}.toml", *sizes, "--text", ODD, "--out", "run"]) == 0
    assert json.loads(Path("run/config.json").read_text())["options"]["text"] == [os.path.abspath(ODD)]
    capsys.readouterr()
    assert main(["train", "--resume", "--out", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == "run"


@pytest.mark.parametrize("verb", ["train", "compare", "scale run", "eval ablation"])
def test_a_folder_that_models_cannot_be_written_to_is_refused_at_once(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*verb.split(), "--out", ODD]) == 2
    said = capsys.readouterr().err
    assert "wanted a folder whose whole path is UTF-8" in said
    assert "od\\udcffd" in said
    assert said.count("\n") == 1
    assert not Path(ODD).exists()


@pytest.mark.parametrize(
    "arguments",
    [["train", f"--{ODD}"], [ODD], ["train", "--steps", ODD], ["train", "--shape", ODD],
     ["train", "--text", f"./{ODD}"], ["generate", ODD, "a"], ["scale", "fit", ODD]],
)  # fmt: skip
def test_a_mistake_with_any_name_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_command_with_any_name_is_one_for_the_shell() -> None:
    assert command(["diffattn", ODD, "a b", "it's"]) == "diffattn $'\\x6f\\x64\\xff\\x64' 'a b' 'it'\"'\"'s'"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_json_on_stdout_says_every_name(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    for value in ({"a": ODD}, {"a": "λ"}, {"a": "plain"}):
        print_json(value)
        sys.stdout.seek(0)
        assert json.loads(sys.stdout.read()) == value
        sys.stdout.seek(0)
        sys.stdout.truncate()


def test_a_file_of_ours_keeps_every_name() -> None:
    write_json(Path("a.json"), {"a": ODD, "b": "λ"})
    assert json.loads(Path("a.json").read_text(encoding="utf-8")) == {"a": ODD, "b": "λ"}
    write_file(Path("page.html"), f"<p>{ODD}</p>")
    assert Path("page.html").read_text() == "<p>od\\udcffd</p>"


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [["eval", "low_bit", LONG], ["lens", LONG, "--text", "a"], ["generate", LONG, "a"], ["train", "--from", LONG],
     ["train", "--shape", LONG], ["scale", "fit", LONG], ["train", "--text", f"./{LONG}"],
     ["train", "--resume", "--out", LONG], ["compare", "--out", LONG], ["eval", "icl", "a", "--data", LONG]],
)  # fmt: skip
def test_a_name_that_is_too_long_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_numbers_of_hundreds_of_digits_are_refused(verb: str) -> None:
    """Of whole numbers those beyond 64 bits, of others those that are infinite; the last are without a digit."""
    table = options_of(load(verb))
    places = ["a"] * sum(option.positional for option in table)
    for option in table:
        if option.kind not in (int, float) or option.choices:
            continue
        for value in ("9" * 400, "-" + "9" * 400, "9" * 5000, *(["inf", "nan"] if option.kind is float else [])):
            values = [value] * option.together
            with pytest.raises(ConfigError) as raised:
                parse(verb, load(verb), [*places, option.name, *values])
            assert option.name in str(raised.value)
            assert len(str(raised.value)) < 300


@pytest.mark.parametrize("number", [10**10, 10**400])
def test_counts_that_nobody_can_train_are_refused(number: int) -> None:
    for name in ("steps", "batch_size", "gradient_accumulation", "evaluations", "evaluation_blocks", "checkpoints",
                 "keep_checkpoints", "seed"):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{name} is 10000"):
            Recipe(**{name: number})
    for name in ("steps", "seeds", "batch_size"):
        with pytest.raises(ConfigError, match=f"{name} is 10000"):
            CompareOptions(**{name: number})
    for given in ({"seeds": number}, {"batch_size": number}, {"tokens": str(10**400)}):
        with pytest.raises(ConfigError):
            LadderOptions(**given)  # type: ignore[arg-type]
