"""Which tokenizers a page takes, and what it says of the others."""

import json

import pytest
from support.needle_model import haystack

from diffattn.demo.tokenizer import check_same, page_tokenizer
from diffattn.errors import CheckpointError, DataError, UnsupportedError


@pytest.fixture(scope="module")
def tokenizer():
    return haystack().tokenizer


@pytest.fixture
def folders(tokenizer, tmp_path):
    for name in ("first", "second"):
        tokenizer.save_pretrained(tmp_path / name)
    return [tmp_path / "first", tmp_path / "second"]


def change(folder, part, value):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content[part] = value
    file.write_text(json.dumps(content))


def test_a_tokenizer_of_ours_is_taken_whole(folders):
    files = page_tokenizer(folders[0])
    assert json.loads(files["tokenizer"]) == json.loads((folders[0] / "tokenizer.json").read_text())
    assert json.loads(files["tokenizer-config"]) == json.loads((folders[0] / "tokenizer_config.json").read_text())
    check_same(folders)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("pre_tokenizer", {"type": "UnicodeScripts"}),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "CharDelimiterSplit", "delimiter": "a"}]}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Nmt"}]}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}),
        ("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
        ("decoder", {"type": "Mystery"}),
    ],
)
def test_a_part_that_the_page_cannot_do_is_named(part, value, folders):
    change(folders[0], part, value)
    with pytest.raises(UnsupportedError) as error:
        page_tokenizer(folders[0])
    inner = next((each for each in value.values() if isinstance(each, list)), [value])[-1]["type"]
    assert str(error.value) == (
        f"the tokenizer of 'first' has the {part} {inner!r}; wanted one that @huggingface/tokenizers 0.2.0 has, the "
        "tokenizer of the page: take a model with another tokenizer, such as those that diffattn trains"
    )


def test_a_tokenizer_without_its_file_is_refused(folders):
    (folders[0] / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedError, match=r"'first' holds no tokenizer\.json; wanted"):
        page_tokenizer(folders[0])


def test_a_damaged_file_is_refused(folders):
    (folders[0] / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        page_tokenizer(folders[0])


def test_settings_of_batches_make_no_other_tokenizer(folders):
    change(folders[1], "truncation", {"max_length": 9, "stride": 0, "strategy": "LongestFirst", "direction": "Right"})
    check_same(folders)


def test_different_tokenizers_are_refused(folders):
    change(folders[1], "normalizer", {"type": "NFC"})
    with pytest.raises(DataError, match="the two models have different tokenizers"):
        check_same(folders)
