"""The registry of studies: ours and those of plug-ins, the example's among them, and plug-ins that are broken."""

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.needle_model import TEXT, haystack, reader

from diffattn.cli.main import main
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.probes import registry
from diffattn.probes.attention_calls import served_by
from diffattn.probes.options import EvaluateOptions, StudyOptions
from diffattn.probes.run import evaluate
from diffattn.probes.study import Study

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin"
Install = Callable[[str, dict[str, str]], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes a package with these entry points visible, as pip would, without pip."""

    def made(package: str, studies: dict[str, str]) -> None:
        facts = tmp_path / f"{package}-1.2.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = [f"{name} = {value}\n" for name, value in studies.items()]
        (facts / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{''.join(lines)}")

    monkeypatch.syspath_prepend(tmp_path)
    return made


@pytest.fixture
def example(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example plug-in, installed as its pyproject.toml says."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    install(project["name"], project["entry-points"][registry.GROUP])
    monkeypatch.syspath_prepend(EXAMPLE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for attention in ("softmax", "diff_v1"):
        reader(attention).save_pretrained(root / attention)
        haystack().tokenizer.save_pretrained(root / attention)
    (root / "text.txt").write_text(f"{TEXT}\n<|endoftext|>\n{TEXT} The end.\n", encoding="utf-8")
    return root


@pytest.mark.parametrize("name", registry.OURS)
def test_a_line_of_the_registry_leads_to_a_whole_record(name: str) -> None:
    study = registry.load_study(name)
    assert study.name == name
    assert study.title
    assert study.sentence.endswith(".")
    assert study.source
    assert issubclass(study.options, StudyOptions)
    assert study.axes.x


def test_the_list_has_each_study_with_its_sentence_at_80_columns(example, capsys) -> None:
    assert main(["eval", "--list"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line[2] != " "] == [*registry.OURS, "first_token"]
    said = " ".join(out.split())
    for name in (*registry.OURS, "first_token"):
        assert f"{name} {registry.load_study(name).sentence}" in said


def test_the_example_measures_what_it_says(example, folder: Path) -> None:
    options = registry.load_study("first_token").options(context=40, samples=2)
    models = [str(folder / attention) for attention in ("softmax", "diff_v1")]
    result = evaluate("first_token", models, options, EvaluateOptions(text=str(folder / "text.txt")))
    ids = haystack().tokenizer(f"{TEXT} The end.")["input_ids"][:80]
    for attention in ("softmax", "diff_v1"):
        calls: list = []
        model = reader(attention)
        with torch.no_grad(), served_by(model, calls.append):
            for start in (0, 40):
                model(input_ids=torch.tensor([ids[start : start + 40]]))
        layers = len(calls) // 2
        assert len(result.points) == layers
        for layer, point in enumerate(result.points):
            maps = [calls[layer + text * layers].map_diff(range(40)).abs() for text in range(2)]
            wanted = [(weights[..., 0].sum() / weights.sum()).item() for weights in maps]
            assert point.x == layer
            assert point.models[attention].mean == pytest.approx(sum(wanted) / 2, abs=1e-5)
            assert 0 < point.models[attention].mean < 1


def test_the_verb_of_a_plug_in_has_help_options_and_json(example, folder: Path, capsys) -> None:
    assert main(["eval", "first_token", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "Measure how much of its attention each layer spends on the first token." in page
    assert "--samples INT Texts that are read. (default: 8)" in page
    words = ["eval", "first_token", str(folder / "diff_v1"), "--text", str(folder / "text.txt"), "--context", "30",
             "--samples", "2", "--json", "--png", str(folder / "chart.png")]  # fmt: skip
    assert main(words) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out)["options"] == {"context": 30, "samples": 2}
    assert (folder / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert main(["eval", "first_token", str(folder / "diff_v1"), "--samples", "0"]) == 2
    assert "samples is 0; wanted at least 1: change --samples" in capsys.readouterr().err


BROKEN = {
    "absent": ("no_such_module:STUDY", "cannot be imported (ModuleNotFoundError: No module named 'no_such_module')"),
    "raising": ("their_studies_raise:STUDY", "cannot be imported (RuntimeError: not today)"),
    "nothing": ("their_studies:NOTHING", "is a dict; wanted a diffattn.probes.study.Study named 'nothing'"),
    "misnamed": ("diffattn.probes.low_bit:STUDY", "is named 'low_bit'; wanted a diffattn.probes.study.Study named"),
    "noise": ("their_studies:NOTHING", "has the name of one of diffattn's own; wanted another name"),
}


@pytest.fixture
def broken(install: Install, tmp_path: Path) -> None:
    (tmp_path / "their_studies_raise.py").write_text("raise RuntimeError('not\\ntoday')\n")
    (tmp_path / "their_studies.py").write_text("NOTHING = {}\n")
    install("their-studies", {name: value for name, (value, _) in BROKEN.items()})


def test_a_broken_plug_in_is_one_line_and_the_others_are_listed(broken, example, capsys) -> None:
    assert main(["eval", "--list"]) == 0
    out, err = capsys.readouterr()
    assert all(f"  {name} " in out for name in (*registry.OURS, "first_token"))
    lines = err.splitlines()
    assert len(lines) == len(BROKEN)
    for name, (_, words) in BROKEN.items():
        (line,) = [line for line in lines if f"the study {name!r} of their-studies 1.2 " in line]
        assert line.startswith("diffattn: ")
        assert words in line
        assert line.endswith(": update or uninstall the plug-in")


@pytest.mark.parametrize("name", [name for name in BROKEN if name not in registry.OURS])
def test_a_broken_plug_in_that_is_asked_for_is_one_line(name: str, broken, capsys) -> None:
    with pytest.raises(UnsupportedError, match=f"the study '{name}' of their-studies 1.2 "):
        registry.load_study(name)
    assert main(["eval", name, "runs/first/model"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_a_plug_in_does_not_replace_a_study_of_ours(broken) -> None:
    assert isinstance(registry.load_study("noise"), Study)


def test_a_study_that_there_is_not_is_named(example) -> None:
    with pytest.raises(ConfigError, match=r"study is 'poetry'; wanted one of retrieval, .*, first_token: see"):
        registry.load_study("poetry")


def test_plug_ins_are_found_and_not_imported(example) -> None:
    sys.modules.pop("diffattn_example.study", None)
    assert list(registry.plug_ins()) == ["first_token"]
    assert "diffattn_example.study" not in sys.modules
