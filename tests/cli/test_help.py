"""Every help page, as somebody reads it who has not seen the code: on 80 columns, in sentences, without riddles."""

import re
import subprocess
import sys

import pytest

import diffattn
from diffattn.cli.arguments import check
from diffattn.cli.main import GROUPS, VERBS, load, main
from diffattn.cli.options import description, options_of, summary

# Words of the code that say nothing to a person who runs it.
FRAGMENT = re.compile(
    r"(As|By|For|From|How|In|Its|Of|On|That|The same|To|What|When|Where|Whether|Which|With)\b", re.IGNORECASE
)
JARGON = (
    "None", "STR", "PATH", "False", "True", "ours", "twin", "kwarg", "callable", "dataclass", "Literal", "positional",
    "subcommand", "ranks", "pretokenizer", "autograd", "sealed", "DATA-ID",
)  # fmt: skip


def page(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("name", [*VERBS, *GROUPS, ""])
def test_a_page_fits_and_holds_no_riddle(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = page(capsys, *name.split(), "--help")
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert text.startswith(f"usage: diffattn {name}".rstrip())
    assert [word for word in JARGON if re.search(rf"(?<![\w-]){word}(?![\w-])", text)] == []
    assert "[" not in text.split("\n\n", 1)[1]  # no [INT [INT ...]]
    assert "{None" not in text


@pytest.mark.parametrize("name", list(VERBS))
def test_no_text_of_help_begins_with_a_fragment(name: str) -> None:
    verb = load(name)
    options = [option.help for option in options_of(verb)]
    begun = [*options, *description(verb).partition("For example:\n")[0].split("\n\n"), *GROUPS.values()]
    assert [text for text in begun if FRAGMENT.match(text.strip())] == []


@pytest.mark.parametrize("name", ["eval", "scale", ""])
def test_a_list_of_verbs_says_what_each_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(page(capsys, *name.split(), "--help").split())
    for verb in VERBS:
        if verb.startswith(name):
            assert f"{verb} {summary(load(verb))}" in text
            assert re.match(r"[A-Z][a-z]+ .*[.?]$", summary(load(verb)))


@pytest.mark.parametrize("name", list(VERBS))
def test_every_option_has_a_sentence_and_what_happens_without_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(page(capsys, *name.split(), "--help").split())
    for option in options_of(load(name)):
        assert option.help[:1].isupper() or option.help[:1].isdigit() or ":" in option.help.split()[0], option
        assert len(option.help.split()) >= 3, option
        assert option.help.endswith("."), option
        where = text.index(f" {option.metavar} " if option.positional else f" {option.name} ")
        said = text[where:]
        assert option.help in said
        behind = said[said.index(option.help) + len(option.help) :]
        if option.switch or "Default:" in option.help:
            assert not behind.startswith(" (")
        else:
            assert behind.startswith((" (required)", " (optional)", " (default: "))
        assert not behind.startswith((" (default: )", " (default: None)"))


@pytest.mark.parametrize("name", list(VERBS))
def test_the_example_is_of_the_verb_and_has_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = page(capsys, *name.split(), "--help")
    examples = [line.strip() for line in text.splitlines() if line.startswith("  diffattn ")]
    assert examples
    for example in examples:
        assert example.startswith(f"diffattn {name}")
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', example.removeprefix(f"diffattn {name}"))]
        check(name, options_of(load(name)), words)


def test_the_pages_of_a_group_list_its_verbs_with_a_sentence_each(capsys: pytest.CaptureFixture[str]) -> None:
    for group, others in (("eval", ["train", "scale run"]), ("scale", ["train", "eval noise"])):
        text = page(capsys, group, "--help")
        assert text == page(capsys, "help", group)
        for name in VERBS:
            if name.startswith(f"{group} "):
                assert re.search(rf"^  {name} +[A-Z]\w+ ", text, re.MULTILINE), name
        assert not [name for name in others if re.search(rf"^  {name} ", text, re.MULTILINE)]


def test_help_is_found_however_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    whole = page(capsys, "--help")
    assert all(f"  {name} " in whole for name in VERBS)
    assert page(capsys, "-h") == page(capsys, "help") == whole
    of_train = page(capsys, "train", "--help")
    assert of_train == page(capsys, "train", "-h") == page(capsys, "help", "train")
    assert of_train == page(capsys, "train", "--steps", "3", "--help")
    assert page(capsys, "eval", "icl", "--help") == page(capsys, "help", "eval", "icl")


def test_optional_values_read_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    train = page(capsys, "train", "--help")
    assert re.search(r"--learning-rate FLOAT\n +Highest learning rate of the run\. \(default: 0\.002\)", train)
    assert re.search(r"--resume  +Go on with the run ", train)
    assert "--from FOLDER " in train
    assert "--shots INT ...\n" in page(capsys, "eval", "icl", "--help")
    assert "[OPTIONS] MODEL ..." in page(capsys, "eval", "icl", "--help")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    said = page(capsys, "--version")
    assert re.fullmatch(rf"diffattn {re.escape(diffattn.__version__)} \(torch \d\S*, transformers \d\S*\)\n", said)
    assert page(capsys, "-V") == said


def test_help_and_version_import_neither_torch_nor_transformers() -> None:
    imported = imported_by(["--help"], ["--version"], ["eval", "--help"], ["train", "--help"])
    assert not imported & {"torch", "transformers", "numpy"}


def imported_by(*commands: list[str]) -> set[str]:
    """The modules that a new process has imported once it has run the commands."""
    program = (
        f"import sys; from diffattn.cli.main import main; [main(words) for words in {commands!r}]; print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


def test_the_list_of_verbs_is_shown_without_what_lays_out_a_page() -> None:
    assert not imported_by(["--help"], ["--version"]) & {
        "tyro",
        "rich",
        "jinja2",
        "altair",
        "vl_convert",
        "scipy",
        "datasets",
    }


@pytest.mark.parametrize("verb", ["train", "plan", "eval noise"])
def test_no_other_verbs_module_is_imported(verb: str) -> None:
    imported = imported_by([*verb.split(), "--help"])
    own = {VERBS[name].partition(":")[0] for name in VERBS} & imported
    assert own == {VERBS[verb].partition(":")[0]}
    assert "torch" not in imported


def test_a_reader_who_has_read_enough_of_the_help_ends_it_quietly() -> None:
    program = "import sys; from diffattn.cli.main import main; sys.exit(main(['--help']))"
    run = subprocess.run(
        f"{sys.executable} -c \"{program}\" | head -c 1", shell=True, capture_output=True, text=True
    )  # fmt: skip
    assert "Traceback" not in run.stderr
