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
    verbs = re.findall(r"diffattn ([a-z]+)", commands)
    assert verbs
    assert set(verbs) <= set(VERBS)


def test_files_that_it_names_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
