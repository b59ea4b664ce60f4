"""The verb ``diffattn demo``: what it writes, what the page is told, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
from support.needle_model import haystack, reader

from diffattn.cli.main import main
from diffattn.demo import build
from diffattn.demo.panel import panel
from diffattn.demo.runtime import Runtime
from diffattn.errors import ConfigError, UnsupportedError

GRAPH = b"a graph", {"bits": 8, "weight_bytes": 5, "file_bytes": 7}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for attention in ("diff_v1", "softmax"):
        reader(attention).save_pretrained(root / attention)
        haystack().tokenizer.save_pretrained(root / attention)
    return root


@pytest.fixture(autouse=True)
def _apart(folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither traces a graph nor fetches a package: tests/demo/test_whole_page.py does."""
    licences = {package.name: f"licence of {package.name}" for package in build.PACKAGES}
    monkeypatch.setattr(build, "graph", lambda folder, bits, on_stage: GRAPH)
    monkeypatch.setattr(build, "runtime", lambda folder, on_stage: Runtime({"ort": b"run()"}, licences))
    monkeypatch.setattr(build, "panel", lambda: {"rows": []})
    monkeypatch.chdir(tmp_path)


def told(file: str) -> dict:
    page = Path(file).read_bytes().decode("utf-16")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_a_page_of_two_models(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(folders / "diff_v1"), str(folders / "softmax"), "--out", "a/demo.html", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "a/demo.html is " in err
    assert "holds diff_v1 and softmax; open it in a browser" in err
    printed = json.loads(out)
    assert printed["bytes"] == Path("a/demo.html").stat().st_size
    data = told("a/demo.html")
    assert printed["models"] == data["models"]
    assert [(model["name"], model["blob"]) for model in data["models"]] == [
        ("diff_v1", "model-0"),
        ("softmax", "model-1"),
    ]
    for prompt in data["prompts"]:
        for model, shown in zip(data["models"], prompt["heads"], strict=True):
            assert 0 <= shown["head"] < model["heads"]
            assert shown["layer"] in model["layers"]
    tokenizer = haystack().tokenizer
    assert data["check"]["ids"] == tokenizer(data["check"]["text"])["input_ids"]
    assert data["context"] == 8192
    page = Path("a/demo.html").read_bytes().decode("utf-16")
    for package in data["packages"]:
        assert f'id="blob-{package["blob"]}"' in page
    # Pages of ours are written again, whatever their encoding.
    assert main(["demo", str(folders / "softmax"), "--out", "a/demo.html", "--text", "Lima is warm. It is"]) == 0
    data = told("a/demo.html")
    assert data["command"].endswith("--text 'Lima is warm. It is'")
    assert data["prompts"][0]["text"] == "Lima is warm. It is"
    assert len(data["prompts"][0]["heads"]) == 1


def test_the_page_forbids_every_request(folders: Path) -> None:
    page = build.build_demo([folders / "softmax"]).page.decode("utf-16")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["connect-src"] == rules["form-action"] == "'none'"
    assert not re.search(r"https?:|\*|unsafe-eval'", policy.replace("'wasm-unsafe-eval'", ""))
    assert "unsafe-inline" not in rules["script-src"]
    assert not re.search(r"<(?:link|img|iframe|script[^>]* src)", page)


def test_no_script_ends_early(folders: Path) -> None:
    page = build.build_demo([folders / "softmax"]).page.decode("utf-16")
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    assert not [script[:40] for script in scripts if "<!--" in script or "<script" in script]
    assert page.count("<script") == page.count("</script>") == len(scripts)


def test_panel_is_in_the_page(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "panel", panel)
    Path("demo.html").write_bytes(build.build_demo([folders / "softmax"]).page)
    assert told("demo.html")["plan"] == panel()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["MODEL", "MODEL", "MODEL"], "3 models given; wanted one, or two"),
        (["MODEL", "--answer", "x"], "the answer 'x' without a text; wanted the text that it is in: give --text too"),
        (["MODEL", "--bits", "3"], "--bits"),
        (["MODEL", "--text", "a", "--answer", "b"], "the answer 'b' is not in the text"),
    ],
)
def test_mistakes_are_one_line(words: list[str], says: str, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *[str(folders / "softmax") if word == "MODEL" else word for word in words]]) == 2
    err = capsys.readouterr().err
    assert says in err.splitlines()[-1]
    assert not Path("demo.html").exists()


def test_a_model_that_reads_too_little_for_the_hidden_number_begins_with_another_text(
    folders: Path, tmp_path: Path
) -> None:
    model = reader("softmax")
    model.config.max_position_embeddings = 20
    model.save_pretrained(tmp_path / "model")
    haystack().tokenizer.save_pretrained(tmp_path / "model")
    Path("demo.html").write_bytes(build.build_demo([tmp_path / "model"]).page)
    (prompt,) = told("demo.html")["prompts"]
    assert (prompt["answer"], prompt["heads"]) == (None, [{"layer": 0, "head": 0}])


def test_other_bits_are_refused_in_python(folders: Path) -> None:
    with pytest.raises(ConfigError, match=r"bits is 3; wanted one of 8, 4, 32"):
        build.build_demo([folders / "softmax"], bits=3)


def test_without_the_extra_a_line_says_what_to_install(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"onnxruntime are not installed; .* pip install 'diffattn\[onnx\]'"):
        build.build_demo([folders / "softmax"])
