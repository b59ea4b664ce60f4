"""What the README and the tutorials show is what a user gets."""

import re
import shlex
from pathlib import Path

import pytest

from diffattn.cli.arguments import check
from diffattn.cli.main import VERBS, load, main
from diffattn.cli.options import options_of

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The words of every line of shell."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_what_was_found_stands_in_the_pages() -> None:
    (found,) = re.findall(r"^## What we found\n(.*?)^## ", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    pages = "".join(
        (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        for name in ("findings", "scaling", "plan", "small_machines")
    )
    numbers = re.findall(r"\d+\.\d+", found)
    assert len(numbers) > 12
    assert [number for number in numbers if not re.search(rf"(?<!\d){re.escape(number)}(?!\d)", pages)] == []


def test_library_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = [*blocks(README, "python"), *blocks(ROOT / "docs" / "tutorials" / "researcher.md", "python")]
    assert len(examples) == 3
    for example in examples:
        exec(compile(example, "a page", "exec"), {})


@pytest.mark.parametrize("page", [README, *TUTORIALS], ids=lambda page: page.stem)
def test_every_command_is_one_that_diffattn_takes(page: Path) -> None:
    # By itself, or started on several ranks by torchrun.
    found = [words[words.index("diffattn") + 1 :] for words in commands(page) if words[0] in ("diffattn", "torchrun")]
    assert found
    for words in found:
        verb = next((name for name in (" ".join(words[:2]), words[0]) if name in VERBS), None)
        assert verb, words
        check(verb, options_of(load(verb)), words[len(verb.split()) :])


def test_the_two_commands_are_targets_of_make() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {words[1] for page in PAGES for words in commands(page) if words[0] == "make" and len(words) > 1}
    assert {"compare", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_a_door_has_ten_commands_at_most() -> None:
    for part in re.split(r"^## ", README.read_text(encoding="utf-8"), flags=re.MULTILINE):
        lines = re.findall(r"^```sh\n(.*?)^```", part, re.DOTALL | re.MULTILINE)
        assert sum(len(block.splitlines()) for block in lines) <= 10, part.splitlines()[0]


def test_the_plan_that_the_docs_show_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "plan.md"
    command = next(words for words in commands(page) if words[:2] == ["diffattn", "plan"] and "--against" in words)
    assert main(command[1:]) == 0
    printed = {line.rstrip() for line in capsys.readouterr().err.splitlines()}
    shown = next(block for block in blocks(page, "text") if "Prefill peak memory" in block).splitlines()
    assert len(shown) > 30
    assert [line for line in shown if line not in printed] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.-])(?:src|tests|tools|benchmarks|examples)/[\w/.-]+\.(?:py|jsonl|md)\b", text)
    # NAME stands for a reader's own.
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        # Pages that the build of the site makes; it checks links to them itself.
        assert target.startswith("reference/") or (page.parent / target).exists(), target
