"""Every verb and option that people write in their scripts is still there: ``options.txt`` lists them.

A new option is added to the list; none is taken from it without a word in the change log.
"""

from pathlib import Path

from diffattn.cli.main import VERBS, load
from diffattn.cli.options import options_of

LISTED = Path(__file__).with_name("options.txt")


def listed() -> dict[str, set[str]]:
    verbs: dict[str, set[str]] = {}
    verb = ""
    for line in LISTED.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            verbs[verb].add(line.strip())
        else:
            verb = line
            verbs[verb] = set()
    return verbs


def test_the_verbs_and_their_options_are_those_of_the_list() -> None:
    found = {
        verb: {name for option in options_of(load(verb)) for name in (option.name, *option.also) if name[:2] == "--"}
        for verb in VERBS
    }
    assert found == listed()
