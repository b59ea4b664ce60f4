"""A byte-level BPE tokenizer of any size, trained here, that gives every UTF-8 text back exactly."""

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from diffattn.data.text import SEPARATOR
from diffattn.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The 256 byte values and the separator.
SMALLEST_VOCABULARY = 257

# Between a word and a single space or line end with a word after it, byte-level BPE always parts its input.
_WORD_BOUNDARY = re.compile(r"(?<=\S)[ \n](?=\S)")


def pieces(text: str, size: int = 1 << 20) -> Iterator[str]:
    """Cut text where its tokens do not change, into pieces of about `size` characters, to bound memory.

    >>> list(pieces("one two three", size=2))
    ['one', ' two', ' three']
    """
    start = 0
    while len(text) - start > size:
        boundary = _WORD_BOUNDARY.search(text, start + size)
        if boundary is None:
            break
        yield text[start : boundary.start()]
        start = boundary.start()
    yield text[start:]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer.

    Arguments:
        texts: any strings; decoding gives each of them back, to the byte, also those never seen in training.
        vocab_size: rows wanted, at least 257 (256 bytes and `<|endoftext|>`, id 0, which is also bos, eos and pad).
    Returns: a `PreTrainedTokenizerFast`. Too little text gives fewer tokens than `vocab_size`: `len(tokenizer)` is true.
    Raises: `ConfigError` for a vocabulary below 257.
    Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016, section 3.2; bytes
    as symbols as in GPT-2.

    >>> tokenizer = train_tokenizer(["low lower lowest"], 260)
    >>> tokenizer.decode(tokenizer.encode("löwe 🦁"))
    'löwe 🦁'
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocab_size={vocab_size}: wanted at least {SMALLEST_VOCABULARY}, one for each byte value and {SEPARATOR}"
        )
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        # A batch of prompts ends where generation goes on.
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def byte_lengths(tokenizer: "PreTrainedTokenizerFast") -> npt.NDArray[np.int64]:
    """Count the bytes of text behind every token id; special tokens have none.

    Arguments:
        tokenizer: one from `train_tokenizer`, or any other byte-level BPE.
    Returns: int64 of shape `(len(tokenizer),)`.
    Raises: `ConfigError` for a tokenizer that is not byte-level.

    >>> lengths = byte_lengths(train_tokenizer(["abab"], 258))
    >>> lengths.shape, lengths[0], lengths[1:257].max(), lengths[257]
    ((258,), np.int64(0), np.int64(1), np.int64(2))
    """
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = set(ByteLevel.alphabet())
    special = set(tokenizer.all_special_ids)
    lengths = np.zeros(len(tokenizer), np.int64)
    for token, index in tokenizer.get_vocab().items():
        if index in special:
            continue
        if not alphabet.issuperset(token):
            raise ConfigError(f"token {token!r} (id {index}) is not made of byte symbols: wanted a byte-level tokenizer")
        # One symbol of the alphabet stands for one byte.
        lengths[index] = len(token)
    return lengths
