import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffattn.data import tokenizer as tokenizer_module
from diffattn.data.documents import SEPARATOR
from diffattn.data.encoding import encode_documents
from diffattn.data.tokenizer import byte_lengths, parted, pieces, train_tokenizer
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


@given(mixed_text, st.integers(1, 30), st.integers(1, 9), st.integers(5, 40))
@settings(max_examples=150, deadline=None)
def test_a_text_that_comes_in_parts_is_cut_as_the_whole(text, size, step, longest):
    whole = [piece[at : at + longest] for piece in pieces(text, size) for at in range(0, len(piece), longest)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "LONG", longest)
        parts = list(parted((text[start : start + step] for start in range(0, len(text), step)), size))
    assert [part for part in parts if part] == [part for part in whole if part]


@pytest.mark.parametrize("batch", [1, 5, 1 << 22])
def test_documents_are_joined_by_separators_whatever_the_batch(tokenizer, monkeypatch, batch):
    monkeypatch.setattr("diffattn.data.encoding.UNIT", batch)
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
