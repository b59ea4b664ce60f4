"""Long documents: their tokens are those of the whole text, and training on text without spaces ends."""

import functools
import json
import random
import time

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from diffattn.data import encoding
from diffattn.data.documents import SEPARATOR, Piece
from diffattn.data.encoding import DocumentParts, Place, encode_documents, long_ids
from diffattn.data.tokenizer import train_tokenizer

_RANDOM = random.Random(7)
_WORDS = ["people", "House", "naïve", "漢字", "I'm", "1234", "the", "the", ";", "\n\n", "\n", "constitution", "🦁"]
TEXTS = {
    "with spaces": " ".join(_RANDOM.choices(_WORDS, k=6000)),
    "lines": "\n".join(_RANDOM.choices(_WORDS, k=6000)),
    "letters": "".join(_RANDOM.choices("ACGT", k=30_000)),
    "repeated": "ACGT" * 7500,
    "one letter": "N" * 30_000,
    "spaces alone": " " * 30_000,
    "Chinese": "".join(_RANDOM.choices("漢字仮名交文日本語国会議員", k=30_000)),
}
SMALL = {"window": 4001, "overlap": 1200, "agreed": 600}
SAMPLE = [text[:4000] for text in TEXTS.values()]


def _byte_level(*, space: bool = False, normalizer: normalizers.Normalizer | None = None) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    backend.decoder = decoders.ByteLevel()
    return _trained(backend, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def _trained(backend: tokenizers.Tokenizer, trainer: type, **options: object) -> tokenizers.Tokenizer:
    special = [SEPARATOR, "<unk>"]
    backend.train_from_iterator(SAMPLE, trainer(vocab_size=420, special_tokens=special, show_progress=False, **options))
    return backend


def _metaspace(model: models.Model, trainer: type, **options: object) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return _trained(backend, trainer, **options)


def _word_piece() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return _trained(backend, trainers.WordPieceTrainer)


def _prepended() -> tokenizers.Tokenizer:
    """No word boundaries at all, and a sign before every text, as Llama 2's."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    sample = tokenizers.pre_tokenizers.FixedLength(60)
    backend.pre_tokenizer = sample
    _trained(backend, trainers.BpeTrainer)
    backend.pre_tokenizer = None
    return backend


BACKENDS = {
    "byte-level": _byte_level,
    "byte-level with a space before the text": lambda: _byte_level(space=True),
    "byte-level after NFC": lambda: _byte_level(normalizer=normalizers.NFC()),
    "Metaspace": lambda: _metaspace(models.BPE(unk_token="<unk>"), trainers.BpeTrainer),
    "Unigram": lambda: _metaspace(models.Unigram(), trainers.UnigramTrainer, unk_token="<unk>"),
    "WordPiece": _word_piece,
    "a sign before the text": _prepended,
}


def _joined(runs) -> list[int]:
    return [index for run in runs for index in run]


def _in_parts(text: str):
    """The text as it is read from a file: in parts that end anywhere."""
    return (text[start : start + 777] for start in range(0, len(text), 777))


@pytest.mark.parametrize("name", BACKENDS)
def test_windows_give_the_tokens_of_the_whole_text(name: str) -> None:
    backend = BACKENDS[name]()
    several = 0
    for text in TEXTS.values():
        runs = [run.ids for run in long_ids(backend, _in_parts(text), **SMALL)]
        assert _joined(runs) == backend.encode(text, add_special_tokens=False).ids
        several += len(runs) > 3
    # Where a text is one token, or one word of a Unigram model, there are no windows to join.
    assert several >= (1 if name == "Unigram" else 2)


def test_windows_that_were_just_strung_together_would_not_do() -> None:
    backend, text = BACKENDS["Metaspace"](), TEXTS["letters"]
    strung = _joined(backend.encode(text[start : start + 4001]).ids for start in range(0, len(text), 4001))
    assert strung != backend.encode(text).ids


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts are windows of a few thousand characters, and units end after fewer."""
    monkeypatch.setattr(encoding, "long_ids", functools.partial(long_ids, **SMALL))
    for name, size in (("WHOLE", 9000), ("PIECE", 12_000), ("UNIT", 2000), ("CUT", 300)):
        monkeypatch.setattr(encoding, name, size)


def _units(tokenizer: PreTrainedTokenizerFast, texts: list[str], begin: Place) -> list[tuple[list[int], Place]]:
    """The ids of documents from a place on, by unit; each document comes in pieces."""
    parts = DocumentParts(tokenizer)
    encode, found = parts.encoder(), []
    for number, text in enumerate(texts):
        if number >= begin.document:
            place = max(begin, Place(number, 0, 0))
            cut = [*_in_parts(text)]
            document = (Piece("", each, last=index == len(cut)) for index, each in enumerate(cut, 1))
            found += [(encode(unit.parts).tolist(), unit.end) for unit in parts.document(document, place)]
    return [*found, (encode(parts.rest(Place(len(texts), 0, 0)).parts).tolist(), Place(len(texts), 0, 0))]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_long_document_encodes_as_the_whole(name: str, small: None) -> None:
    backend = BACKENDS[name]()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SEPARATOR)
    for text in (TEXTS["with spaces"], TEXTS["lines"], TEXTS["letters"]):
        texts, done = ["before", text[:11_000], text, "behind"], []
        expected = _joined([*backend.encode(each, add_special_tokens=False).ids, 0] for each in texts)
        assert _joined(encode_documents(tokenizer, texts, on_encoded=done.append)) == expected
        assert done == sorted(done)
        assert done[-1] == sum(map(len, texts))
        assert _joined(ids for ids, _ in _units(tokenizer, texts, Place(0, 0, 0))) == expected


@pytest.mark.parametrize("name", BACKENDS)
def test_encoding_goes_on_at_the_end_of_any_unit(name: str, small: None) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BACKENDS[name](), eos_token=SEPARATOR)
    texts = [TEXTS["lines"], "one", TEXTS["letters"]]
    units = _units(tokenizer, texts, Place(0, 0, 0))
    # A word of a Unigram model stays whole.
    assert len(units) > (2 if name == "Unigram" else 5)
    for index in range(len(units) - 1):
        rest = _joined(ids for ids, _ in _units(tokenizer, texts, units[index][1]))
        assert rest == _joined(ids for ids, _ in units[index + 1 :])


def test_two_million_characters_are_one_text() -> None:
    """Also for a tokenizer that sets a space before a text, which stood before each part of one million once."""
    backend = BACKENDS["byte-level with a space before the text"]()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SEPARATOR)
    text = "the people\nof the house\n" * 90_000
    assert tokenizer.decode(_joined(encode_documents(tokenizer, [text]))[:-1]) == f" {text}"


def test_the_time_of_training_grows_with_the_text_and_not_with_its_square() -> None:
    """400,000 letters without a space took 71 s where a word was not cut, and this is less than a second."""
    text = "".join(_RANDOM.choices("ACGT", k=400_000))
    began = time.perf_counter()
    tokenizer = train_tokenizer([text], 1024)
    assert time.perf_counter() - began < 20
    assert len(tokenizer) == 1024
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_only_training_cuts_long_words() -> None:
    """What is saved is a byte-level tokenizer as any other, in which the place of a letter does not matter."""
    tokenizer = train_tokenizer(["ACGT" * 5000], 300)
    saved = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]
    assert saved == {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
