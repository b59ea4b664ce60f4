"""Words that a verb does not take: one line, exit status 2, and a hint that the verb itself would accept."""

import re

import pytest

from diffattn.cli.arguments import check, chosen, nearest, parse
from diffattn.cli.main import VERBS, load, main
from diffattn.cli.options import options_of
from diffattn.errors import ConfigError

TABLES = {name: options_of(load(name)) for name in VERBS}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.startswith("diffattn: ")
    return printed.err


MISTAKES = {
    "no verb": ([], ["no verb; wanted one", "diffattn --help"]),
    "a study is missing": (["eval"], ["diffattn eval alone; wanted one of retrieval", "ablation"]),
    "run or fit is missing": (["scale"], ["diffattn scale alone; wanted one of run, fit"]),
    "a verb that is nearly one": (["evall"], ["'evall'; wanted a verb", "perhaps you meant diffattn eval;"]),
    "a study that is nearly one": (["eval", "retreival"], ["'retreival'", "perhaps you meant retrieval;"]),
    "a study without eval": (["outliers", "m"], ["'outliers'; wanted", "perhaps you meant diffattn eval outliers;"]),
    "no verb at all": (["zzz"], ["'zzz'; wanted a verb of diffattn: see diffattn --help"]),
    "an option before the verb": (["--steps", "3", "train"], ["--steps before the verb", "diffattn train --steps"]),
    "an option and no verb": (["--steps", "3"], ["--steps before the verb; wanted the verb first"]),
    "another verb's option": (["lens", "m", "--text", "a", "--out", "b"],
                              ["--out; wanted an option of diffattn lens: see"]),
    "nearly an option": (["train", "--stepz", "3"], ["--stepz; wanted an option", "perhaps you meant --steps;"]),
    "a switch that is off": (["export", "m", "--cache"], ["--cache; wanted an option", "perhaps you meant --no-cache"]),
    "no value": (["train", "--steps"], ["--steps without a value; wanted a value", "--steps 300"]),
    "an option for a value": (["train", "--steps", "--json"], ["--steps without a value; wanted"]),
    "words": (["train", "--steps", "many"], ["--steps 'many'; wanted a whole number: write --steps 300"]),
    "with =": (["train", "--steps=many"], ["--steps 'many'; wanted a whole number"]),
    "a fraction": (["train", "--steps", "1.5"], ["--steps '1.5'; wanted a whole number"]),
    "no number": (["train", "--learning-rate", "fast"], ["--learning-rate 'fast'; wanted a number"]),
    "one of several": (["scale", "run", "--seeds", "3", "--sizes"], ["--sizes without a value; wanted a value"]),
    "not a choice": (["train", "--dtype", "fp16"], ["--dtype 'fp16'; wanted one of auto, float32, bfloat16"]),
    "a number that is no choice": (["export", "m", "--bits", "5"], ["--bits '5'; wanted one of 8, 4"]),
    "half a pair": (["eval", "retrieval", "m", "--tasks", "1", "2", "3"], ["--tasks 1 2 3; wanted values in groups"]),
    "twice": (["train", "--steps", "3", "--steps=4"], ["--steps twice; wanted it once: leave one out"]),
    "a list twice": (["eval", "icl", "m", "--shots", "1", "--shots", "2"], ["--shots twice", "behind one"]),
    "a switch twice": (["train", "--json", "--json"], ["--json twice"]),
    "a switch with a value": (["train", "--json=yes"], ["--json=yes; wanted --json without a value"]),
    "a word too many": (["train", "my.txt"], ["the word 'my.txt' too many; wanted options behind diffattn train"]),
    "a text without quotes": (["generate", "m", "two", "words"], ["the word 'words' too", "FOLDER PROMPT", "quotes"]),
    "a word is missing": (["generate", "m"], ["no PROMPT; wanted diffattn generate FOLDER PROMPT"]),
    "no model": (["eval", "icl"], ["no MODEL; wanted diffattn eval icl MODEL ..."]),
    "a needed option": (["lens", "m"], ["no --text; wanted --text TEXT"]),
    "a letter": (["train", "-s", "3"], ["-s; wanted an option of diffattn train"]),
    "400 digits": (["train", "--batch-size", "9" * 400], ["--batch-size '999", "a number up to", "--batch-size 4"]),
    "5000 digits": (["train", "--seed", "9" * 5000], ["--seed '999", "wanted a whole number"]),
}  # fmt: skip


@pytest.mark.parametrize(("words", "said"), MISTAKES.values(), ids=list(MISTAKES))
def test_one_line_that_names_what_was_typed_and_what_is_wanted(
    words: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *words)
    assert [part for part in said if part not in line] == []
    assert len(line) < 300


@pytest.mark.parametrize("name", list(VERBS))
def test_a_hint_names_an_option_that_the_verb_takes(name: str) -> None:
    """Every option of every verb, also with a letter too few, given to this one."""
    own = {option.name for option in TABLES[name] if not option.positional}
    everyones = {option.name for table in TABLES.values() for option in table if not option.positional}
    for typed in sorted((everyones | {option[:-1] for option in everyones if len(option) > 4}) - own):
        with pytest.raises(ConfigError, match=f"^{typed}; wanted an option of diffattn {name}: ") as refusal:
            check(name, TABLES[name], [typed])
        hinted = re.search(r"perhaps you meant (\S+);", str(refusal.value))
        assert hinted is None or hinted[1] in own
    for option in own:
        assert nearest(f"{option}x", own) == option


def test_an_underscore_and_an_equals_sign_are_taken() -> None:
    taken: dict[str, object] = {}

    def verb(*, batch_size: int = 4, sizes: tuple[str, ...] = (), low: float = 0.0, on: bool = False) -> int:
        taken.update(batch_size=batch_size, sizes=sizes, low=low, on=on)
        return 0

    assert parse("verb", verb, ["--batch_size=3", "--sizes", "a", "b", "--low", "-1e-3", "--on"])() == 0
    assert taken == {"batch_size": 3, "sizes": ("a", "b"), "low": -1e-3, "on": True}


def test_an_older_name_of_an_option_is_taken_for_the_new_one() -> None:
    words = chosen(TABLES["plan"], ["--precision=bf16", "--context", "1k"])
    assert words == ["--dtype=bf16", "--context", "1k"]
    assert check("plan", TABLES["plan"], words) == {"precision", "context"}
    with pytest.raises(ConfigError, match="--dtype twice"):
        check("plan", TABLES["plan"], chosen(TABLES["plan"], ["--precision", "bf16", "--dtype", "bf16"]))


def test_a_minus_is_a_prompt_and_so_is_what_stands_behind_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'absent'" in refused(capsys, "generate", "absent", "--", "--steps")
    assert "'absent'" in refused(capsys, "generate", "--seed", "3", "absent", "a - b")
