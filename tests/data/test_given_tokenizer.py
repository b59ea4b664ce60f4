"""Text in the tokens of a tokenizer that is given: its marks, its bytes, its place in the cache."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from diffattn.data import packing
from diffattn.data.encoding import encode_documents
from diffattn.data.packing import prepare_data
from diffattn.data.text import Corpus, Document
from diffattn.data.tokenizer import (
    byte_lengths,
    document_marks,
    fingerprint,
    train_tokenizer,
    vocabulary_rows,
)
from diffattn.errors import ConfigError

TEXT = "The people of the United States;\n\nthe people's house.  \n  Naïve 漢字 🦁 costs 1234 dollars!\r\n\r\n" * 7
# Words, numbers and punctuation that takes the line ends behind it, as the tokenizers of Llama 3 and Qwen 2 cut.
MODERN = r"'s| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def trained(backend: tokenizers.Tokenizer, special: list[str], alphabet: list[str]) -> tokenizers.Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend


def modern(*, start: bool = False, end: str = "<|eot|>", **names: str) -> PreTrainedTokenizerFast:
    """Byte-level, with a regular expression of its own, and where asked a first token of every text."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(MODERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trained(backend, ["<|begin|>", end], pre_tokenizers.ByteLevel.alphabet())
    if start:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **({"bos_token": "<|begin|>", "eos_token": "<|eot|>"} | names)
    )


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a sign for the space, one of them before the text, bytes for what is not in the vocabulary."""
    signs = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    small = tokenizers.Tokenizer(models.BPE())
    small.normalizer = signs
    content = json.loads(trained(small, ["<unk>", "<s>", "</s>"], []).to_str())["model"]
    # Rare characters have no token of their own.
    rare = {token for token in content["vocab"] if not token.isascii() and "▁" not in token}
    tokens = [*content["vocab"].keys() - rare, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = ["<unk>", "<s>", "</s>", *sorted(set(tokens) - {"<unk>", "<s>", "</s>"})]
    merges = [tuple(merge) for merge in content["merges"] if {*merge, "".join(merge)} <= set(tokens)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = signs
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "ours": lambda: train_tokenizer([TEXT], 313),
    "modern": modern,
    "modern with a start": lambda: modern(start=True),
    "sentencepiece": sentencepiece,
}
EVERY = pytest.mark.parametrize("name", TOKENIZERS)


def joined(runs) -> list[int]:
    return [index for run in runs for index in run]


@EVERY
def test_documents_are_what_the_tokenizer_makes_of_them(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    texts = [TEXT, "two words", ""]
    eos = tokenizer.eos_token_id
    expected = [index for text in texts for index in [*tokenizer(text)["input_ids"], eos]]
    assert joined(encode_documents(tokenizer, texts)) == expected
    starts = {"modern with a start": [0], "sentencepiece": [1]}.get(name, [])
    assert document_marks(tokenizer) == (starts, eos)


@EVERY
def test_bytes_behind_the_tokens(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    added = tokenizer.add_tokens(["<thought>"])
    assert added == 1
    text = TEXT + "<thought> \x00\x7fzq"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    lengths = byte_lengths(tokenizer)
    assert lengths.shape == (vocabulary_rows(tokenizer),) == (len(tokenizer),)
    # SentencePiece sets a space before the text.
    assert lengths[ids].sum() == len(text.encode()) + (name == "sentencepiece")
    assert lengths[tokenizer.all_special_ids].sum() == 0


def test_spelled_special_tokens_and_limits_of_the_tokenizer_do_not_reach_the_text() -> None:
    tokenizer = modern()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    ids = joined(encode_documents(tokenizer, ["<|eot|> " + TEXT]))
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[:-1]) == "<|eot|> " + TEXT
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 5


def test_the_sign_between_documents() -> None:
    """A chat model's end token ends its turn; the one between documents is the pretrained model's."""
    chat = modern(end="<|endoftext|>", eos_token="<|begin|>")
    assert document_marks(chat) == ([], chat.convert_tokens_to_ids("<|endoftext|>"))
    none = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(models.BPE()))
    with pytest.raises(ConfigError, match=r"neither <\|endoftext\|> nor an eos_token") as raised:
        document_marks(none)
    assert "\n" not in str(raised.value)


def test_prepared_once_for_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus.of("c", [Document(str(i), f"{i} {TEXT}") for i in range(9)])
    options = {"context": 8, "validation_fraction": 0.2, "cache_dir": tmp_path}
    first = prepare_data(corpus, tokenizer=modern(start=True), **options)
    assert first.facts["tokenizer"] == fingerprint(modern(start=True))
    others = [modern(), sentencepiece(), train_tokenizer([TEXT], 313)]
    folders = {prepare_data(corpus, tokenizer=other, **options).train.folder for other in others}
    folders |= {first.train.folder, prepare_data(corpus, vocab_size=313, **options).train.folder}
    # Of the last two, one was trained before and one is trained here, to the same.
    assert len(folders) == 4
    monkeypatch.setattr(packing, "write_shards", lambda *a: pytest.fail("built again"))
    again = prepare_data(corpus, tokenizer=modern(start=True), **options)
    assert np.array_equal(again.train.tokens, first.train.tokens)
    assert again.facts == first.facts
    assert again.sample_text(30) in " ".join(TEXT.split("\n")) or again.sample_text(30)[:2].strip().isdigit()
    text = sum(len(d.text.encode()) for d in corpus.documents)
    counted = byte_lengths(again.tokenizer)
    assert counted[again.train.tokens].sum() + counted[again.validation.tokens].sum() == text
    with pytest.raises(ConfigError, match="exactly one"):
        prepare_data(corpus, **options)
    with pytest.raises(ConfigError, match="exactly one"):
        prepare_data(corpus, vocab_size=300, tokenizer=modern(), **options)
