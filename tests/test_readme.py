"""What the README shows is what a user gets."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_library_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = blocks("python")
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def test_commands_exist() -> None:
    from diffattn.cli.main import VERBS

    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = "\n".join(blocks("sh"))
    targets = re.findall(r"^make ([\w-]+)", commands, re.MULTILINE)
    assert {"compare", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    verbs = re.findall(r"diffattn ((?:scale|eval) \w+|[a-z]+)", commands)
    assert verbs
    assert set(verbs) <= set(VERBS)


def test_the_plan_that_it_shows_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    from diffattn.cli.main import main

    command = re.search(r"diffattn (plan .*)", README)
    assert command
    assert main(command[1].split()) == 0
    printed = {line.rstrip() for line in capsys.readouterr().err.splitlines()}
    shown = next(block for block in blocks("text") if "Prefill peak memory" in block).splitlines()
    assert len(shown) > 30
    assert [line for line in shown if line not in printed] == []


def test_files_that_it_names_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
