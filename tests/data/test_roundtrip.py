"""A tokenizer that loses text is noticed, named with its share, and refused above one in a hundred bytes."""

import functools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from diffattn.data.packing import prepare_data
from diffattn.data.roundtrip import MOST_LOST, check_round_trip, round_trip
from diffattn.data.text import SEPARATOR, Corpus, Document
from diffattn.data.tokenizer import train_tokenizer
from diffattn.errors import ConfigError

TEXT = "The People of the United States, the people's House.\n\n  Nai\u0308ve text: \ufb01ve 漢字 🦁\tand 1234!\r\n" * 9
CORPUS = Corpus.of("c", [Document(str(number), f"{number} {TEXT}") for number in range(12)])
SPECIAL = [SEPARATOR, "<unk>"]


def byte_level(*, without: str = "", space: bool = False, normalizer=None) -> PreTrainedTokenizerFast:
    """``without``: letters whose bytes are not in the alphabet."""
    alphabet = [symbol for symbol in pre_tokenizers.ByteLevel.alphabet() if symbol not in without]
    words = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=True)
    backend = tokenizers.Tokenizer(
        models.BPE({symbol: index for index, symbol in enumerate([*SPECIAL, *alphabet])}, [])
    )
    backend.pre_tokenizer, backend.decoder = words, decoders.ByteLevel()
    backend.add_special_tokens([SEPARATOR])
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SEPARATOR)


def trained(model, trainer: type, words, *, decoder=None, normalizer=None, **options) -> PreTrainedTokenizerFast:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = words
    if decoder is not None:
        backend.decoder = decoder
    if normalizer is not None:
        backend.normalizer = normalizer
    texts = [document.text for document in CORPUS.documents]
    backend.train_from_iterator(texts, trainer(special_tokens=SPECIAL, show_progress=False, **options))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SEPARATOR, unk_token="<unk>")


LOSSY = {
    "without its whole alphabet": lambda: byte_level(without="etaoinETAOIN"),
    "without one letter": lambda: byte_level(without="z1"),
    "lower case": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "NFKC": lambda: byte_level(normalizer=normalizers.NFKC()),
    "accents stripped": lambda: byte_level(
        normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    "white space made one": lambda: byte_level(
        normalizer=normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    ),
    "words, unknown ones": lambda: trained(
        models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer, pre_tokenizers.WhitespaceSplit(), vocab_size=9
    ),
    "WordPiece": lambda: trained(
        models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer, pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(), normalizer=normalizers.BertNormalizer(), vocab_size=200,
    ),
    "characters that were not seen": lambda: trained(
        models.BPE(unk_token="<unk>"), trainers.BpeTrainer, pre_tokenizers.Metaspace(), decoder=decoders.Metaspace(),
        vocab_size=60, limit_alphabet=20,
    ),
}  # fmt: skip
LOSSLESS = {
    "ours": lambda: train_tokenizer([TEXT], 300),
    "byte-level": byte_level,
    "a space before the text": lambda: byte_level(space=True),
    "Metaspace": lambda: trained(
        models.BPE(unk_token="<unk>"), trainers.BpeTrainer, pre_tokenizers.Metaspace(), decoder=decoders.Metaspace(),
        vocab_size=200,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSLESS)
def test_nothing_is_said_of_a_tokenizer_that_gives_text_back(name: str) -> None:
    found = round_trip(LOSSLESS[name](), CORPUS.documents)
    assert found.tried == sum(len(document.text.encode()) for document in CORPUS.documents)
    assert found == (found.tried, 0, "", "")
    notes: list[str] = []
    assert check_round_trip(LOSSLESS[name](), CORPUS.documents, on_note=notes.append) == 0
    assert notes == []


@functools.cache
def _bytes_alone() -> PreTrainedTokenizerFast:
    return train_tokenizer([TEXT], 320)


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_a_tokenizer_that_is_trained_here_loses_nothing_of_any_text(text: str) -> None:
    assert round_trip(_bytes_alone(), [Document("a", text)]).lost == 0


@pytest.mark.parametrize("name", LOSSY)
def test_a_loss_is_said_with_its_share_and_refused_above_one_in_a_hundred(name: str) -> None:
    tokenizer = LOSSY[name]()
    found = round_trip(tokenizer, CORPUS.documents)
    assert found.lost > 0
    notes: list[str] = []
    if found.share > MOST_LOST:
        with pytest.raises(ConfigError, match="--lossy-tokenizer") as raised:
            check_round_trip(tokenizer, CORPUS.documents, on_note=notes.append)
        assert "\n" not in str(raised.value)
        assert f"{found.share:.1%}" in str(raised.value)
        assert notes == []
    check_round_trip(tokenizer, CORPUS.documents, lossy=True, on_note=notes.append)
    (line,) = notes
    assert "do not come back" in line
    assert "\n" not in line


def test_the_share_is_that_of_the_bytes_that_are_lost() -> None:
    text = "abcde" * 100
    lost = {letter: text.count(letter) / len(text) for letter in "ab"}
    tokenizer = byte_level(without="ab")
    assert round_trip(tokenizer, [Document("a", text)]).share == pytest.approx(sum(lost.values()))
    capitals = "Abcd" * 100
    assert round_trip(byte_level(normalizer=normalizers.Lowercase()), [Document("a", capitals)]).share == 0.25
    assert round_trip(byte_level(normalizer=normalizers.Lowercase()), [Document("a", "abcd" * 100)]).share == 0
    # Spaces that were not there are lost to nobody, but do not let the text be told.
    apart = trained(
        models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer, pre_tokenizers.Whitespace(), vocab_size=99
    )
    assert round_trip(apart, [Document("a", "The People, the People, the People.")]).share == pytest.approx(3 / 35)


def test_text_is_tried_all_over_in_a_second() -> None:
    """64 places of 5 million characters; a part of the text that is lost shows wherever it lies."""
    tokenizer = byte_level(without="z")
    for place in (0.2, 0.5, 0.9):
        plain = 5_000_000
        before = int(plain * place)
        text = ["x" * before, "z" * 500_000, "x" * (plain - before - 500_000)]
        found = round_trip(tokenizer, [Document(str(number), part) for number, part in enumerate(text)])
        assert found.tried <= 64 * 4096
        assert found.share == pytest.approx(0.1, abs=0.02)
        assert found == round_trip(tokenizer, [Document(str(number), part) for number, part in enumerate(text)])


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
def test_bits_per_byte_are_of_the_texts_own_bytes(name: str, tmp_path) -> None:
    tokenizer = (LOSSLESS | LOSSY)[name]()
    data = prepare_data(
        CORPUS, tokenizer=tokenizer, context=8, validation_fraction=0.2, lossy_tokenizer=True, cache_dir=tmp_path
    )
    tokens = data.validation.tokens
    # The predicted tokens of the blocks are a fair part of all.
    expected = data.facts["bytes"]["validation"] / len(tokens)
    assert data.validation_bytes_per_token == pytest.approx(expected, rel=0.1)
    assert ("text_lost" in data.facts) == (name in LOSSY)


def test_prepare_data_refuses_a_tokenizer_that_loses_text(tmp_path) -> None:
    with pytest.raises(ConfigError, match="loses text"):
        prepare_data(CORPUS, tokenizer=byte_level(without="e"), context=8, cache_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".locks"]
    notes: list[str] = []
    prepare_data(
        CORPUS, tokenizer=byte_level(without="1"), context=8, cache_dir=tmp_path, lossy_tokenizer=True,
        on_note=notes.append,
    )  # fmt: skip
    assert len(notes) == 1
