"""What ``tyro_private`` relies on, of which tyro promises nothing."""

import pytest

from diffattn.cli import tyro_private
from diffattn.cli.options import options_of
from diffattn.errors import ConfigError


def verb(folder: str, *, steps: int = 3, on: bool = False, keep: bool = True) -> int:
    """Try it.

    Args:
        folder: A word without a name.
        steps: Number of steps.
        on: A switch that is off.
        keep: A switch that is on.
    """
    return 0


def test_a_page_is_its_usage_and_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    usage, tables = tyro_private.page_of(options_of(verb), "diffattn try")
    assert usage == "usage: diffattn try [-h] FOLDER [--steps INT] [--on] [--no-keep]"
    lines = [line.strip() for line in tables.splitlines() if line.strip(" -")]
    assert lines == [
        "arguments",
        "FOLDER       A word without a name. (required)",
        "options",
        "-h, --help   show this help message and exit",
        "--steps INT  Number of steps. (default: 3)",
        "--on         A switch that is off.",
        "--no-keep    A switch that is on.",
    ]


def test_words_become_values_in_the_order_of_the_options() -> None:
    assert tyro_private.values_of(options_of(verb), ["--on", "a", "--steps", "-4"]) == ["a", -4, True, True]


@pytest.mark.parametrize("words", [["a", "--steps", "many"], ["a", "--unknown"], []])
def test_a_mistake_is_one_line_without_its_box(words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        tyro_private.values_of(options_of(verb), words)
    said = str(refused.value)
    assert said.isascii()
    assert "\n" not in said
