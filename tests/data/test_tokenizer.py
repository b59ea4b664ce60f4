import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from diffattn.data.text import SEPARATOR, Document, Split
from diffattn.data.token_files import check_token_files, write_token_files
from diffattn.data.tokenizer import byte_lengths, encode_documents, pieces, train_tokenizer
from diffattn.errors import ConfigError

TEXTS = ["The people of the United States, the people's house.\n\n" * 9, "漢字かな交じり文 🦁👩‍👩‍👧 naïve\r\n\t" * 7]

# Words, runs of spaces, line ends, scripts without spaces, emoji and spelled separators, in any order.
mixed_text = st.lists(
    st.one_of(st.text(max_size=9), st.sampled_from([" ", "  ", "\n", "\r\n", "people", "漢字", "🦁", SEPARATOR, "'s"]))
).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 313)


def joined(runs):
    return [index for run in runs for index in run]


def test_the_vocabulary_has_the_bytes_and_one_special_token(tokenizer):
    assert len(tokenizer) == 313
    assert tokenizer.all_special_tokens == [SEPARATOR]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.encode("people")[0] != tokenizer.encode(" people")[0]


@given(mixed_text)
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert byte_lengths(tokenizer)[ids].sum() == len(text.encode()) - ids.count(0) * len(SEPARATOR)
    documents = joined(encode_documents(tokenizer, [text]))
    assert documents.count(0) == 1
    assert documents[-1] == 0
    assert tokenizer.decode(documents[:-1]) == text


@given(mixed_text, st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_pieces_do_not_change_tokens(tokenizer, text, size):
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    backend = tokenizer.backend_tokenizer
    assert joined(backend.encode(part).ids for part in parts) == backend.encode(text).ids


def test_pieces_cut_long_text_and_leave_text_without_spaces():
    assert len(list(pieces("word " * 50, size=20))) > 9
    assert list(pieces("漢" * 50, size=20)) == ["漢" * 50]


@pytest.mark.parametrize("batch", [1, 5, 1 << 22])
def test_documents_are_joined_by_separators_whatever_the_batch(tokenizer, monkeypatch, batch):
    monkeypatch.setattr("diffattn.data.tokenizer.BATCH_CHARACTERS", batch)
    texts = ["one two", f"spelled {SEPARATOR} inside", "🦁", "three\n"]
    separate = [tokenizer.encode(text, split_special_tokens=True) for text in texts]
    assert joined(encode_documents(tokenizer, texts)) == joined([*ids, 0] for ids in separate)
    # The tokenizer is left as it was.
    assert tokenizer.encode(SEPARATOR) == [0]


def test_training_is_deterministic_also_across_processes(tokenizer):
    code = (
        "import sys, json; from diffattn.data.tokenizer import train_tokenizer; "
        "print(train_tokenizer(json.loads(sys.argv[1]), 313).backend_tokenizer.to_str())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code, json.dumps(TEXTS)]
    other = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()
    assert other == tokenizer.backend_tokenizer.to_str() == train_tokenizer(TEXTS, 313).backend_tokenizer.to_str()


def test_too_little_text_gives_fewer_tokens():
    assert len(train_tokenizer(["ab"], 300)) == 258
    assert len(train_tokenizer([], 300)) == 257


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ConfigError, match="vocab_size is 256; wanted at least 257"):
        train_tokenizer(TEXTS, 256)
    assert len(train_tokenizer(TEXTS, 257)) == 257


def test_byte_lengths_counts_bytes_not_characters(tokenizer):
    lengths = byte_lengths(tokenizer)
    assert lengths.dtype == np.int64
    assert lengths.shape == (313,)
    assert lengths[0] == 0
    assert sorted(lengths)[1] == 1
    ids = tokenizer.encode("漢字🦁")
    assert lengths[ids].sum() == 3 + 3 + 4


def test_a_tokenizer_that_is_not_byte_level_is_refused():
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a b": 0}, unk_token="a b"))
    with pytest.raises(ConfigError, match="byte-level"):
        byte_lengths(PreTrainedTokenizerFast(tokenizer_object=words))


def test_token_files_hold_both_parts_and_their_tokenizer(tmp_path):
    train, held_out = tuple(Document(str(i), text) for i, text in enumerate(TEXTS)), (Document("v", "the house"),)
    write_token_files(tmp_path / "new", Split(train, held_out), "digest", 313)
    manifest = check_token_files(tmp_path / "new")
    assert manifest["digest"] == "digest"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new" / "tokenizer")
    for name, texts in (("train.bin", TEXTS), ("validation.bin", ["the house"])):
        ids = np.fromfile(tmp_path / "new" / name, "<u2").tolist()
        assert ids == joined(encode_documents(tokenizer, texts))
        assert manifest["files"][name] | {"sha256": ""} == {
            "dtype": "<u2",
            "count": len(ids),
            "bytes": 2 * len(ids),
            "sha256": "",
        }
    assert (tokenizer.padding_side, tokenizer.model_input_names) == ("left", ["input_ids", "attention_mask"])


def test_a_large_vocabulary_takes_four_bytes(tmp_path, monkeypatch):
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    def large(texts, vocab_size):
        symbols = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        words = {SEPARATOR: 0} | {symbol: 70_000 - i for i, symbol in enumerate(sorted(symbols))}
        filler = {f"x{i}": i for i in range(1, 70_001) if i not in words.values()}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(words | filler, []))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SEPARATOR)

    monkeypatch.setattr("diffattn.data.token_files.train_tokenizer", large)
    write_token_files(tmp_path / "new", Split((Document("t", "ab"),), (Document("v", "c"),)), "digest", 70_001)
    assert check_token_files(tmp_path / "new")["files"]["train.bin"]["dtype"] == "<u4"
    assert np.fromfile(tmp_path / "new" / "train.bin", "<u4").max() > 65_536
