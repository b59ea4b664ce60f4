"""Reading points: both formats, and one line for each way in which a file can be wrong."""

import json
from pathlib import Path

import pytest

from diffattn.cli.main import main
from diffattn.errors import ConfigError, DataError
from diffattn.results.scaling import ScalingPoint
from diffattn.scaling.points import read_points

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
    assert (
        read_points(lines)
        == from_csv
        == [ScalingPoint("softmax", 1e6, None, 3.5, 0), ScalingPoint("diff_v1", 1e6, None, 3.4, 0)]
    )
    assert read_points(lines, size="non_embedding_parameters")[0].size == 5e5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("attention,parameters\nsoftmax,1e6\n", "line 2 has no val_loss"),
        ("parameters,val_loss\n1e6,3\n", "line 2 has no attention"),
        ("attention,val_loss\nsoftmax,3\n", "line 2 has neither parameters nor tokens"),
        (GOOD.replace("3.5", "nan"), "line 2: val_loss is nan; wanted a finite number above 0"),
        (GOOD.replace("3.5", "-1"), "line 2: val_loss is -1; wanted a finite number above 0"),
        (GOOD.replace("3.4", "0"), "line 3: val_loss is 0"),
        (GOOD.replace("3.5", "inf"), "line 2: val_loss is inf"),
        (GOOD.replace("1e6,3.4", "many,3.4"), "line 3: parameters is 'many'; wanted a number"),
        (GOOD.replace("3.5,0", "3.5,0,7"), "line 2 has 5 cells .softmax,1e6,3.5,0,7.; wanted 4"),
        ("", "at least one row"),
        ("attention,parameters,val_loss\n", "at least one row"),
        (GOOD.replace("softmax", '"softmax'), "line 2 is no CSV"),
        (GOOD.replace("softmax", "s" * 200_000), "line 2 is no CSV"),
        (GOOD.replace("seed", "parameters"), "line 1 names parameters twice"),
        (GOOD.replace("3.5,0", "3.5,0.5"), "line 2: seed is '0.5'; wanted a whole number"),
    ],
)
def test_a_bad_file_is_one_line_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_points(write(tmp_path, text))
    assert "\n" not in str(caught.value)


POINTS = [ScalingPoint("softmax", 6.8e9, None, 3.5, 0), ScalingPoint("diff_v1", 6.837e9, None, 3.412, 0)]
PEOPLE = {
    "semicolons and decimal commas": "attention;parameters;val_loss;seed\nsoftmax;6,8B;3,5;0\ndiff_v1;6,837B;3,412;0\n",
    "semicolons and three decimals": (
        "attention;parameters;val_loss;seed\nsoftmax;6800000000;3,500;0\ndiff_v1;6837000000;3,412;0\n"
    ),
    "semicolons and points": "attention;parameters;val_loss;seed\nsoftmax;6.8B;3.500;0\ndiff_v1;6.837B;3.412;0\n",
    "points between thousands": (
        "attention;parameters;val_loss;seed\nsoftmax;6.800.000.000;3,5;0\ndiff_v1;6.837.000.000;3,412;0\n"
    ),
    "columns in capitals": "Attention,Parameters,VAL_LOSS,Seed\nsoftmax,6.8B,3.5,0\ndiff_v1,6.837B,3.412,0\n",
    "columns with spaces": " attention , Parameters ,Val Loss,seed\nSoftmax, 6.8b ,3.5,0\nDIFF_V1, 6837M ,3.412,0\n",
    "quoted commas": (
        'attention,parameters,val_loss,seed\nsoftmax,"6,800,000,000",3.5,0\n"diff_v1","6,837,000,000","3.412","0"\n'
    ),
    "spaces between thousands": (
        "attention\tparameters\tval_loss\tseed\nsoftmax\t6 800 000 000\t3.5\t0\n"
        "diff_v1\t6\u202f837\u00a0000 000\t3.412\t0\n"
    ),
    "tabs": "attention\tparameters\tval_loss\tseed\nsoftmax\t6.8e9\t3.5\t0\ndiff_v1\t6.837E+09\t3.412\t0\n",
    "bars": "attention|parameters|val_loss|seed\nsoftmax|6.8B|3.5|0\ndiff_v1|6.837B|3.412|0\n",
    "the delimiter said": "sep=;\nattention;parameters;val_loss;seed\nsoftmax;6,8B;3,5;0\ndiff_v1;6,837B;3,412;0\n",
    "comments": (
        '# mine\n"# of 2026, by me"\nattention,parameters,val_loss,seed\n\nsoftmax,6.8B,3.5,0\n # more\n'
        "diff_v1,6.837B,3.412,0\n"
    ),
    "further columns": (
        "run,attention,note,parameters,val_loss,note,seed,,\n1,softmax,x,6.8B,3.5,,0,,\n"
        '2,diff_v1,"a, b",6.837B,3.412,,0,,\n,,,,,,,,\n'
    ),
    "line ends of Windows": GOOD.replace("\n", "\r\n"),
    "line ends of old Macs": GOOD.replace("\n", "\r"),
    "json lines": (
        '{"Attention": "softmax", "parameters": "6.8B", "val_loss": 3.5, "seed": 0}\n'
        '{"attention": "diff_v1", "Parameters": 6837000000, "val_loss": "3.412", "seed": 0}\n'
    ),
    "a json array": (
        '[{"attention": "softmax", "parameters": 6.8e9, "val_loss": 3.5, "seed": 0},\n'
        ' {"attention": "diff_v1", "parameters": 6837000000, "val_loss": 3.412, "seed": 0}]'
    ),
    "what scale run prints": json.dumps(
        {"rows": [{"attention": p.attention, "parameters": p.size, "val_loss": p.val_loss, "seed": 0} for p in POINTS]},
        indent=1,
    ),
}


@pytest.mark.parametrize("kind", PEOPLE)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_points_as_people_have_them(tmp_path: Path, kind: str, encoding: str) -> None:
    file = tmp_path / ("points.jsonl" if "json" in kind else "points.csv")
    file.write_bytes(PEOPLE[kind].encode(encoding))
    expected = POINTS
    if "line ends" in kind:
        expected = [ScalingPoint("softmax", 1e6, None, 3.5, 0), ScalingPoint("diff_v1", 1e6, None, 3.4, 0)]
    assert read_points(file) == expected


def test_a_comma_is_what_the_other_cells_say(tmp_path: Path) -> None:
    text = 'attention,parameters,val_loss\nsoftmax,"{}","{}"\ngated,"{}","{}"\n'
    for cells, sizes in (
        (("1,234", "3.5", "2,000", "3.412"), (1234, 2000)),
        (("1,234M", "3,5", "2.000", "3,412"), (1.234e6, 2000)),
        (("1,234", "3.5", "2,345,678", "3.412"), (1234, 2345678)),
    ):
        points = read_points(write(tmp_path, text.format(*cells)))
        assert [point.size for point in points] == list(sizes)
        assert [point.val_loss for point in points] == [3.5, 3.412]


def test_the_name_of_a_file_does_not_say_its_format(tmp_path: Path) -> None:
    assert read_points(write(tmp_path, PEOPLE["a json array"], "points.csv")) == POINTS
    assert read_points(write(tmp_path, PEOPLE["semicolons and decimal commas"], "points.jsonl")) == POINTS
    assert read_points(write(tmp_path, PEOPLE["tabs"], "POINTS.TXT")) == POINTS
    assert read_points("Figure3A") == read_points("figure3a")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('attention,val_loss,tokens\nsoftmax,"3,412",10\n', "which may mean two things; wanted .*: write 3.412 or"),
        ("attention;tokens;val_loss\nsoftmax;8,5M;3.412\n", "line 2: val_loss is '3.412', which may mean two things"),
        (GOOD.replace("1e6,3.5", "1x6,3.5"), "line 2: parameters is '1x6'; wanted a number"),
        (GOOD.replace("3.5", "3.5B"), "line 2: val_loss is '3.5B'; wanted a number"),
        (GOOD.replace("1e6,3.5", ",3.5"), "line 2 has neither parameters nor tokens"),
        ("attention,parameters,tokens,val_loss\nsoftmax,1,1,3\ngated,,1,3\n", "line 3 has no parameters and other"),
        (GOOD.replace("1e6,3.4", "-1e6,3.4"), "line 3: parameters is -1e\\+06; wanted a finite number above 0"),
        (GOOD.replace("1e6,3.4", "0,3.4"), "line 3: parameters is 0; wanted a finite number above 0"),
        (GOOD.replace("1e6,3.4", "1e400,3.4"), "line 3: parameters is inf"),
        (GOOD.replace("1e6,3.4", "1" * 400 + ",3.4"), "line 3: parameters is inf"),
        (GOOD.replace("1e6,3.4", "NaN,3.4"), "line 3: parameters is nan"),
        (GOOD.replace("diff_v1,1e6,3.4", "diff_v1,1e6,"), "line 3 has no val_loss"),
        (GOOD.replace("diff_v1,1e6,3.4", ",1e6,3.4"), "line 3 has no attention"),
        (GOOD.replace("1e6,3.4,0", "1e6,3,4,0"), "line 3 has 5 cells .diff_v1,1e6,3,4,0.; wanted 4, as in its header"),
        (GOOD.replace("1e6,3.4,0", "1e6"), "line 3 has 2 cells"),
        (GOOD.replace("seed", "Parameters"), "line 1 names parameters twice"),
        (GOOD.replace(",0\n", ",x\n"), "line 2: seed is 'x'"),
        ('[{"attention": "softmax", "val_loss": "?", "tokens": 3}]', "row 1: val_loss is '\\?'"),
        ('[{"attention": "softmax", "val_loss": 3, "tokens": {}}]', "row 1: tokens is '{}'; wanted a number"),
        ('[{"attention": "softmax", "val_loss": 3, "tokens": 3, "Tokens": 4}]', "row 1 names tokens twice"),
        ("[]", "line 1 is no JSON object"),
        ("sep=;\n", "at least one row"),
        ("# only this\n", "at least one row"),
    ],
)  # fmt: skip
def test_the_cell_that_cannot_be_read_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_points(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert "points.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"PK\x03\x04rest", "a spreadsheet or another zip archive: save it as .csv"),
        (b"\x1f\x8brest", "it is gzip"),
        ("attention,val_loss\n".encode("utf-16-le"), "UTF-16 without its mark"),
        (b"attention,val_loss\nsoftm\xe4x,3\n", "it is not UTF-8, nor UTF-16 with its mark"),
        (b"\xff\xfea", "it is not UTF-8, nor UTF-16 with its mark"),
    ],
)
def test_what_is_no_text_is_one_line(tmp_path: Path, raw: bytes, words: str) -> None:
    file = tmp_path / "points.csv"
    file.write_bytes(raw)
    with pytest.raises(ConfigError, match=words) as caught:
        read_points(file)
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


@pytest.mark.parametrize(
    "header",
    [
        "Model;Params;Loss",
        "variant,Model Size,Held-out loss",
        "Architecture\tsize\tvalidation_loss",
        "ATTENTION|PARAMS|LOSS",
    ],
)
def test_columns_may_have_the_names_that_people_give_them(header: str, tmp_path: Path) -> None:
    mark = next(mark for mark in ";,\t|" if mark in header)
    file = tmp_path / "points.csv"
    file.write_text(f"{header}\n{mark.join(('softmax', '3B', '3.25'))}\n")
    (point,) = read_points(file)
    assert (point.attention, point.size, point.val_loss) == ("softmax", 3e9, 3.25)


def test_a_column_of_its_own_name_is_taken_before_one_that_people_call_so(tmp_path: Path) -> None:
    """A file may have the training loss beside the held-out one."""
    file = tmp_path / "points.csv"
    file.write_text("attention,parameters,loss,val_loss\nsoftmax,3B,2.5,3.25\n")
    assert read_points(file)[0].val_loss == 3.25
    file.write_text("attention,parameters,train loss,note\nsoftmax,3B,2.5,x\n")
    with pytest.raises(DataError, match=r"has no val_loss, only attention, parameters, train loss, note; wanted"):
        read_points(file)
