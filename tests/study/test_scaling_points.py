"""Reading points: both formats, and one line for each way in which a file can be wrong."""

import json
from pathlib import Path

import pytest

from diffattn.cli.main import main
from diffattn.errors import ConfigError, DataError
from diffattn.study.scaling_points import Point, read_points

GOOD = "attention,parameters,val_loss,seed\nsoftmax,1e6,3.5,0\ndiff_v1,1e6,3.4,0\n"


def write(folder: Path, text: str, name: str = "points.csv") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_csv_and_json_lines_give_the_same_points(tmp_path: Path) -> None:
    from_csv = read_points(write(tmp_path, "# a comment\n" + GOOD + "\n"))
    losses = {"softmax": 3.5, "diff_v1": 3.4}
    others = {"parameters": 1e6, "non_embedding_parameters": 5e5, "seed": 0, "other": None}
    rows = [{"attention": name, "val_loss": loss} | others for name, loss in losses.items()]
    lines = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "points.jsonl")
    assert read_points(lines) == from_csv == [Point("softmax", 1e6, None, 3.5, 0), Point("diff_v1", 1e6, None, 3.4, 0)]
    assert read_points(lines, size="non_embedding_parameters")[0].size == 5e5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("attention,parameters\nsoftmax,1e6\n", "line 2 has no val_loss"),
        ("parameters,val_loss\n1e6,3\n", "line 2 has no attention"),
        ("attention,val_loss\nsoftmax,3\n", "line 2 has neither parameters nor tokens"),
        (GOOD.replace("3.5", "nan"), "line 2: val_loss is nan; a finite number above 0"),
        (GOOD.replace("3.5", "-1"), "line 2: val_loss is -1; a finite number above 0"),
        (GOOD.replace("3.4", "0"), "line 3: val_loss is 0"),
        (GOOD.replace("3.5", "inf"), "line 2: val_loss is inf"),
        (GOOD.replace("1e6,3.4", "many,3.4"), "line 3: parameters is 'many'; a number is wanted"),
        (GOOD.replace("3.5,0", "3.5,0,7"), "line 2 has 5 cells; 4 are wanted"),
        ("", "at least one row"),
        ("attention,parameters,val_loss\n", "at least one row"),
        (GOOD.replace("softmax", '"softmax'), "line 2 is no CSV"),
        (GOOD.replace("softmax", "s" * 200_000), "line 2 is no CSV"),
        (GOOD.replace("seed", "parameters"), "line 1 names parameters twice"),
        (GOOD.replace("3.5,0", "3.5,0.5"), "line 2: seed is '0.5'; a whole number"),
    ],
)
def test_a_bad_file_is_one_line_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_points(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_spreadsheets_mark_and_separators_inside_a_text_are_no_mistakes(tmp_path: Path) -> None:
    assert read_points(write(tmp_path, "\ufeff" + GOOD))[0].attention == "softmax"
    row = {"attention": "softmax", "val_loss": 3.5, "parameters": 1e6, "data": "one\u2028two"}
    assert len(read_points(write(tmp_path, json.dumps(row, ensure_ascii=False), "points.jsonl"))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"attention": "softmax", "val_loss": 3, "tokens": 1' + "0" * 400 + "}",
        '{"attention": ["softmax"], "val_loss": 3, "tokens": 3}',
    ],
    ids=["deep", "huge", "list"],
)
def test_json_that_python_cannot_hold_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"points.jsonl line 1") as caught:
        read_points(write(tmp_path, text, "points.jsonl"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]\n", '{"attention": "softmax", "val_loss": true, "tokens": 3}'])
def test_bad_json_lines(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"points.jsonl line 1"):
        read_points(write(tmp_path, text, "points.jsonl"))


def test_a_file_that_is_not_there_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="check the path, or give figure3a"):
        read_points(tmp_path / "absent.csv")


def test_the_verb_prints_writes_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new"
    arguments = ["scale", "fit", "figure3a", "--at", "6.8B", "--bootstrap", "100", "--json"]
    assert main([*arguments, "--png", str(target / "a.png"), "--html", str(target / "a.html")]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["forms"]["floor"]["equivalences"][0]["given"] == "diff_v1"
    assert "softmax 10.9" in printed.err
    assert (target / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "E + A·N^−α" in (target / "a.html").read_text()
    file = write(tmp_path, GOOD)
    assert main(["scale", "fit", str(file), "--html", str(tmp_path / "no.html")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("diffattn: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "no.html").exists()
