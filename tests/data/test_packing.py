import json
import math
import os
import pickle
import random
import threading
import time

import numpy as np
import pytest
import torch

from diffattn.cache import cache_root
from diffattn.data import packing
from diffattn.data.blocks import TokenBlocks, TrainingOrder, ValidationBlocks
from diffattn.data.packing import prepare_data
from diffattn.data.text import Corpus, Document, split_by_document
from diffattn.data.token_files import Tokens, write_shard
from diffattn.data.tokenizer import byte_lengths
from diffattn.errors import ConfigError, DataError

CONTEXT = 13


def corpus_of(count=37, seed=5):
    rng = random.Random(seed)
    words = ["people", "house", "漢字", "🦁", "states", "naïve", "law."]
    texts = [f"Speech {i}. " + " ".join(rng.choices(words, k=rng.randint(11, 47))) for i in range(count)]
    return Corpus.of("speeches", [Document(f"{i}.txt", text) for i, text in enumerate(texts)])


@pytest.fixture(scope="module")
def corpus():
    return corpus_of()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(corpus, cache):
    return prepare_data(corpus, vocab_size=307, context=CONTEXT, validation_fraction=0.2, cache_dir=cache)


def tokens_of(folder, ids, *counts):
    """Writes tokens as shards of these numbers of tokens."""
    paths, start = [], 0
    for count in counts:
        paths.append(folder / f"{len(list(folder.iterdir()))}.arrow")
        write_shard(paths[-1], ids[start : start + count])
        start += count
    return Tokens(paths, counts)


@pytest.fixture(params=[(38,), (13, 1, 24)], ids=["one shard", "several"])
def blocks(request, tmp_path):
    return TokenBlocks([tokens_of(tmp_path, np.arange(38, dtype=np.uint16), *request.param)], context=5, parts=["t"])


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(packing, "write_shards", lambda *a: pytest.fail("built again"))


def error_line(call, error=DataError):
    with pytest.raises(error) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    return line


def documents_in(data, blocks):
    """The documents of a token file, read back through its separators."""
    ids = blocks.tokens[:].tolist()
    assert ids[-1] == 0
    texts, start = [], 0
    for place, index in enumerate(ids):
        if index == 0:
            texts.append(data.tokenizer.decode(ids[start:place]))
            start = place + 1
    return texts


def test_blocks_are_the_file_without_its_ragged_end(blocks):
    assert len(blocks) == 7
    assert blocks[6].dtype == np.int64
    assert np.concatenate(list(blocks)).tolist() == list(range(35))
    for index in (-1, 7):
        with pytest.raises(IndexError):
            blocks[index]


def test_blocks_travel_to_a_worker_by_name(blocks):
    message = pickle.dumps(TrainingOrder(blocks, seed=3, num_samples=11))
    assert len(message) < 2000
    assert torch.equal(
        pickle.loads(message)[10]["input_ids"], TrainingOrder(blocks, seed=3, num_samples=11)[10]["labels"]
    )


def test_less_than_one_block_is_refused(tmp_path):
    tokens = tokens_of(tmp_path, np.arange(4, dtype=np.uint16), 4)
    line = error_line(lambda: TokenBlocks([tokens], context=5, parts=["c, held-out part"]))
    assert line == "c, held-out part: 4 tokens; wanted at least 5, for one block: give more text or a shorter context"
    assert "0 tokens" in error_line(lambda: TokenBlocks([Tokens([], [])], context=5, parts=["t"]))
    assert "context is 1" in error_line(lambda: TokenBlocks([tokens], context=1, parts=["t"]), ConfigError)


def test_an_epoch_takes_every_block_once_and_epochs_differ(blocks):
    order = TrainingOrder(blocks, seed=3, num_samples=21)
    epochs = [[order.block_index(7 * epoch + i) for i in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != [TrainingOrder(blocks, seed=4, num_samples=7).block_index(i) for i in range(7)]


def test_the_order_is_fixed_for_good(blocks):
    order = TrainingOrder(blocks, seed=3, num_samples=14)
    assert [order.block_index(i) for i in range(14)] == [0, 1, 2, 5, 6, 4, 3, 5, 6, 3, 0, 1, 2, 4]


@pytest.mark.parametrize("stop", [1, 6, 7, 8, 16])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(blocks, stop):
    whole = [sample["input_ids"].tolist() for sample in TrainingOrder(blocks, seed=3, num_samples=17)]
    torch.manual_seed(1)
    np.random.seed(1)
    resumed = TrainingOrder(blocks, seed=3, num_samples=17)
    assert [resumed[i]["input_ids"].tolist() for i in range(stop, 17)] == whole[stop:]
    # A longer run begins with the same samples.
    longer = TrainingOrder(blocks, seed=3, num_samples=99)
    assert [longer[i]["input_ids"].tolist() for i in range(17)] == whole


def test_samples_are_int64_inputs_and_equal_labels(blocks):
    for dataset in (TrainingOrder(blocks, seed=0, num_samples=3), ValidationBlocks(blocks)):
        sample = dataset[2]
        assert sorted(sample) == ["input_ids", "labels"]
        assert sample["input_ids"].dtype == torch.int64
        assert sample["input_ids"].shape == (5,)
        assert torch.equal(sample["input_ids"], sample["labels"])
    assert [s["input_ids"][0].item() for s in ValidationBlocks(blocks)] == list(range(0, 35, 5))
    assert len(ValidationBlocks(blocks)) == 7


def test_an_order_out_of_range_is_refused(blocks):
    for seed, samples in ((-1, 5), (0, 0)):
        line = error_line(lambda s=seed, n=samples: TrainingOrder(blocks, seed=s, num_samples=n), ConfigError)
        assert f"seed is {seed} and num_samples is {samples}" in line
    with pytest.raises(IndexError):
        TrainingOrder(blocks, seed=0, num_samples=5)[5]


def test_token_files_are_the_documents_with_separators_and_parts_share_none(data, corpus):
    split = split_by_document(corpus, validation_fraction=0.2)
    assert documents_in(data, data.train) == [d.text for d in split.train]
    assert documents_in(data, data.validation) == [d.text for d in split.validation]
    assert not set(documents_in(data, data.train)) & set(documents_in(data, data.validation))


def test_facts_say_what_was_read(data, corpus):
    facts = json.loads(json.dumps(data.facts))
    assert facts["name"] == "speeches"
    assert facts["digest"] == corpus.digest
    assert facts["vocab_size"] == len(data.tokenizer) == 307
    assert sum(facts["documents"].values()) == 37
    assert sum(facts["bytes"].values()) == sum(len(d.text.encode()) for d in corpus.documents)
    assert facts["tokens"] == {"train": len(data.train.tokens), "validation": len(data.validation.tokens)}
    assert facts["blocks"] == {"train": len(data.train), "validation": len(data.validation)}
    assert (facts["context"], facts["note"]) == (CONTEXT, "")


def test_bytes_per_token_counts_predicted_tokens_only(data):
    lengths = byte_lengths(data.tokenizer)
    predicted = [int(index) for block in data.validation for index in block[1:]]
    assert len(predicted) == len(data.validation) * (CONTEXT - 1)
    assert 0 in predicted
    expected = sum(int(lengths[index]) for index in predicted) / len(predicted)
    assert math.isclose(data.validation_bytes_per_token, expected, rel_tol=1e-12)


def test_sample_text_is_the_start_of_a_held_out_document(data, corpus):
    held_out = split_by_document(corpus, validation_fraction=0.2).validation[0].text
    assert data.sample_text(9999) == held_out
    for length in range(12, 90):
        sample = data.sample_text(length)
        assert held_out.startswith(sample)
        assert 0 < len(sample) <= length
        assert sample.endswith(".") or ". " not in held_out[:length]


def test_what_is_being_done_is_said(corpus, tmp_path):
    stages = []
    options = {"vocab_size": 300, "context": CONTEXT, "cache_dir": tmp_path, "on_stage": stages.append}
    prepare_data(corpus, **options)
    characters = sum(len(document.text) for document in corpus.documents)
    names = list(dict.fromkeys(stage.name for stage in stages))
    assert names == [
        "reading the text", "training the tokenizer", "choosing the tokens of the tokenizer",
        "turning the text into tokens",
    ]  # fmt: skip
    for name in (names[1], names[3]):
        done = [stage.done for stage in stages if stage.name == name]
        assert done == sorted(done)
        assert done[-1] == next(stage.total for stage in stages if stage.name == name)
    assert stages[-1].total == characters
    stages.clear()
    prepare_data(corpus, **options)
    assert [stage.name for stage in stages] == ["reading the text"]


def test_the_cache_answers_the_second_time(data, corpus, cache, no_training):
    again = prepare_data(corpus, vocab_size=307, context=CONTEXT, validation_fraction=0.2, cache_dir=cache)
    assert again.facts == data.facts
    assert again.tokenizer.get_vocab() == data.tokenizer.get_vocab()
    assert np.array_equal(again.train.tokens, data.train.tokens)
    # The context is how the same files are viewed.
    longer = prepare_data(corpus, vocab_size=307, context=17, validation_fraction=0.2, cache_dir=cache)
    assert longer.train.folder == data.train.folder


def test_the_making_of_tokens_says_what_it_does(corpus, tmp_path):
    made, found = [], []
    for stages in (made, found):
        prepare_data(corpus, vocab_size=300, context=16, cache_dir=tmp_path, on_stage=stages.append)
    names = list(dict.fromkeys(stage.name for stage in made))
    assert names[0] == "reading the text"
    assert any("tokenizer" in name for name in names)
    assert names[-1] == "turning the text into tokens"
    # The second time all of it is there.
    assert [stage.name for stage in found] == ["reading the text"]


def test_any_change_of_text_or_size_is_another_cache_entry(data, corpus, tmp_path):
    text = tmp_path / "speeches.txt"
    body = "\n\f\n".join(d.text for d in corpus.documents)
    options = {"vocab_size": 300, "context": CONTEXT, "cache_dir": tmp_path / "cache"}
    folders = []
    for change in (body, body, body.replace("Speech 7.", "Speech 8."), body + "\n\f\nmore"):
        text.write_text(change)
        folders.append(prepare_data(text, **options).train.folder)
    folders.append(prepare_data(text, **options | {"vocab_size": 301}).train.folder)
    folders.append(prepare_data(text, **options, validation_fraction=0.1).train.folder)
    assert folders[0] == folders[1]
    assert len(set(folders)) == 5
    # Beside each there is its tokenizer.
    assert len(entries(tmp_path / "cache")) == 10
    assert {folder.name for folder in folders} <= set(entries(tmp_path / "cache"))


def entries(cache):
    """The names of what is in a cache, without its locks."""
    return sorted(path.name for path in cache.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("name", ["train-00000.arrow", "validation-00000.arrow", "manifest.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_what_is_damaged_in_the_cache_is_made_again(corpus, tmp_path, name, damage):
    options = {"vocab_size": 257, "context": CONTEXT, "cache_dir": tmp_path}
    first = prepare_data(corpus, **options)
    tokens, kept = first.train.tokens[:].tolist(), entries(tmp_path)
    path = next(tmp_path.rglob(name))
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        # Written aside and renamed: the mapped file of the first call stays as it is.
        bad = whole[:-3] if damage == "truncated" else bytes([whole[0] ^ 255]) + whole[1:]
        path.with_suffix(".bad").write_bytes(bad)
        path.with_suffix(".bad").rename(path)
    notes = []
    again = prepare_data(corpus, **options, on_note=notes.append)
    assert again.train.tokens[:].tolist() == tokens
    assert path.read_bytes() == whole
    assert entries(tmp_path) == kept
    # A shard is named.
    line = f"{path} is damaged: its content is not what was written; it is made anew"
    assert notes == [line] * name.endswith("arrow")


def test_a_crash_before_the_rename_is_not_read(corpus, tmp_path, monkeypatch):
    options = {"vocab_size": 257, "context": CONTEXT, "cache_dir": tmp_path}

    def crash(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash)
        with pytest.raises(KeyboardInterrupt):
            prepare_data(corpus, **options)
    assert len(prepare_data(corpus, **options).train) > 0
    assert not any("partial" in name for name in entries(tmp_path))


def test_what_a_killed_process_left_is_swept_after_a_month(corpus, tmp_path):
    for age, name in ((31, "old.partial"), (29, "young.partial"), (31, "old.survey"), (31, "tokens")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("something")
        os.utime(tmp_path / name, (time.time() - age * 86_400,) * 2)
    prepare_data(corpus, vocab_size=257, context=CONTEXT, cache_dir=tmp_path)
    assert {"young.partial", "tokens"} < set(entries(tmp_path))
    assert not any("old" in name for name in entries(tmp_path))


def test_a_second_process_waits_for_the_first_and_says_so(corpus, tmp_path, monkeypatch):
    """Here it is a second thread, for which the lock is the same."""
    options = {"vocab_size": 257, "context": CONTEXT, "cache_dir": tmp_path}
    write, begun, notes, found = packing.write_shards, threading.Event(), [], []

    def slow(*args):
        begun.set()
        while not notes:
            time.sleep(0.01)
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_shards", slow)
        thread = threading.Thread(target=lambda: found.append(prepare_data(corpus, **options)))
        thread.start()
        assert begun.wait(60)
        patch.setattr(packing, "write_shards", lambda *args: pytest.fail("the work was done twice"))
        data = prepare_data(corpus, **options, on_note=notes.append)
        thread.join()
    assert notes == ["another process prepares the same text; waiting until it is done"]
    assert data.train.folder == found[0].train.folder
    assert np.array_equal(data.train.tokens, found[0].train.tokens)


def test_without_locks_two_processes_at_once_give_one_whole_entry(corpus, tmp_path, monkeypatch):
    def no_locks(self, **options):
        raise NotImplementedError

    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
    options = {"vocab_size": 257, "context": CONTEXT, "cache_dir": tmp_path}
    data = prepare_data(corpus, **options)
    assert np.array_equal(data.train.tokens, prepare_data(corpus, **options).train.tokens)


def test_a_cache_folder_that_cannot_be_written_is_one_line(corpus, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    options = {"vocab_size": 257, "context": CONTEXT, "cache_dir": tmp_path / "file" / "cache"}
    line = error_line(lambda: prepare_data(corpus, **options), ConfigError)
    assert str(tmp_path / "file" / "cache") in line
    assert "DIFFATTN_CACHE=" in line


def test_a_full_disk_is_one_line_and_the_work_goes_on_later(corpus, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    options = {"vocab_size": 257, "context": CONTEXT, "cache_dir": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_shards", full)
        assert "No space left" in error_line(lambda: prepare_data(corpus, **options), ConfigError)
    assert len(prepare_data(corpus, **options).train) > 0


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    for name in ("DIFFATTN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "diffattn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "diffattn"
    monkeypatch.setenv("DIFFATTN_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    assert cache_root(tmp_path / "given") == tmp_path / "given"


def test_too_little_text_names_its_part(tmp_path):
    corpus = Corpus.of("tiny", [Document("a", "some words here"), Document("b", "few")])
    line = error_line(lambda: prepare_data(corpus, vocab_size=257, context=8, cache_dir=tmp_path))
    assert (
        line == "tiny, held-out part: 4 tokens; wanted at least 8, for one block: give more text or a shorter context"
    )


def test_the_default_corpus_is_packed_and_then_found_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFATTN_CACHE", str(tmp_path))
    cold = prepare_data(vocab_size=4096, context=256)
    monkeypatch.setattr(packing, "write_shards", lambda *a: pytest.fail("built again"))
    started = time.perf_counter()
    warm = prepare_data(vocab_size=4096, context=256)
    seconds = time.perf_counter() - started
    assert warm.facts == cold.facts
    assert cold.facts["documents"] == {"train": 244, "validation": 5}
    assert (len(cold.train), len(cold.validation)) == (10_941, 248)
    assert 4 < cold.validation_bytes_per_token < 4.5
    # About 0.6 s alone on a core; the margin is for a busy machine.
    assert seconds < 6
