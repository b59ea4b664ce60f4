"""Needle blocks among blocks of text: whole documents, the same ones again, and none in what is held out."""

import re

import numpy as np
import pytest
import torch
from data.test_needles import TEXT

from diffattn.data.mixture import JoinedBlocks, with_needles
from diffattn.data.packing import TrainingOrder, prepare_data
from diffattn.data.text import Corpus, Document
from diffattn.errors import ConfigError, DataError

CORPUS = Corpus.of("text", [Document(str(number), f"{TEXT} Number {number} ends.") for number in range(30)])
CONTEXT = 300


@pytest.fixture
def plain(tmp_path):
    return prepare_data(CORPUS, vocab_size=400, context=CONTEXT, cache_dir=tmp_path)


def mixed(plain, tmp_path, **options):
    return with_needles(plain, CORPUS, **{"share": 0.25, "cache_dir": tmp_path, "most_needles": 4} | options)


def test_blocks_of_needles_stand_behind_the_text_in_the_share_that_was_asked_for(plain, tmp_path):
    data = mixed(plain, tmp_path)
    text, needles = len(plain.train), len(data.train) - len(plain.train)
    assert needles == round(text / 3)
    assert data.train.context == CONTEXT
    assert all(np.array_equal(data.train[index], plain.train[index]) for index in (0, text - 1))
    documents = []
    for index in range(text, text + needles):
        block = data.train[index]
        assert block.dtype == np.int64
        assert block.shape == (CONTEXT,)
        decoded = data.tokenizer.decode(block)
        parts = [part for part in decoded.split("<|endoftext|>") if part]
        # Each begins and ends with its mark, so that no question is parted from its text.
        assert decoded.count("<|endoftext|>") == 2 * len(parts)
        documents.append(len(parts))
        for part in parts:
            context, *questions = part.split("\n\n")
            hidden = re.findall(r"The magic number of \w+ is (\d{5})\.", context)
            assert hidden
            assert sorted(hidden) == sorted(re.findall(r"\d{5}", " ".join(questions)))
    assert set(documents) >= {1, 2}
    with pytest.raises(IndexError):
        data.train[len(data.train)]


def test_the_same_blocks_come_from_the_cache_and_others_from_another_seed(plain, tmp_path, monkeypatch):
    data, other = mixed(plain, tmp_path), mixed(plain, tmp_path, seed=1)
    assert data.facts["digest"] != other.facts["digest"] != plain.facts["digest"]
    last = len(data.train) - 1
    assert not np.array_equal(data.train[last], other.train[last])
    monkeypatch.setattr("diffattn.data.mixture.Haystack", lambda *_: pytest.fail("made again"))
    again = mixed(plain, tmp_path)
    assert again.facts == data.facts
    assert np.array_equal(again.train[last], data.train[last])


def test_a_damaged_file_is_made_again(plain, tmp_path):
    data = mixed(plain, tmp_path)
    wanted = data.train[len(data.train) - 1]
    (file,) = tmp_path.glob("*.needles.bin")
    file.write_bytes(file.read_bytes()[:-7])
    again = mixed(plain, tmp_path)
    assert np.array_equal(again.train[len(again.train) - 1], wanted)
    assert [path.name for path in tmp_path.iterdir() if ".tmp-" in path.name] == []


def test_a_run_draws_both_kinds_and_held_out_text_has_no_needles(plain, tmp_path):
    data = mixed(plain, tmp_path)
    order = TrainingOrder(data.train, seed=0, num_samples=len(data.train))
    found = ["magic number" in data.tokenizer.decode(order[index]["input_ids"]) for index in range(len(order))]
    assert sum(found) == len(data.train) - len(plain.train)
    assert any(found[: len(found) // 3])
    assert isinstance(order[0]["labels"], torch.Tensor)
    assert data.validation is plain.validation
    assert "magic number" not in data.tokenizer.decode(data.validation.tokens)


def test_no_share_is_the_text_alone_and_a_wrong_one_is_refused(plain, tmp_path):
    assert mixed(plain, tmp_path, share=0) is plain
    for share in (-0.1, 1.0, 1.5):
        with pytest.raises(ConfigError, match="needles is"):
            mixed(plain, tmp_path, share=share)


def test_what_cannot_hold_a_needle_is_refused(tmp_path):
    short = prepare_data(CORPUS, vocab_size=400, context=40, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="wanted a context of at least"):
        mixed(short, tmp_path)
    with pytest.raises(DataError, match="wanted text of several sentences"):
        with_needles(short, Corpus.of("a", [Document("a", "none here")]), share=0.5, cache_dir=tmp_path)
    assert not list(tmp_path.glob("*.needles.bin*"))


def test_joined_blocks_have_no_negative_numbers(plain, tmp_path):
    joined = mixed(plain, tmp_path).train
    assert isinstance(joined, JoinedBlocks)
    with pytest.raises(IndexError):
        joined[-1]
