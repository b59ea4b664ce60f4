"""Trains a byte-level BPE tokenizer of any size, which gives every UTF-8 text back exactly; facts of any tokenizer."""

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from diffattn.data.documents import SEPARATOR
from diffattn.errors import ConfigError, one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# The 256 byte values and the separator.
SMALLEST_VOCABULARY = 257
# Words of more characters are cut where so many end, but only in training.
LONG = 1 << 22
# The characters of text that training gets at once: it holds 256 such pieces.
_SMALL = 1 << 16
# The most bytes of a word in training, whose time grows with the square of a word's length. Text without spaces is one
# word; no word of a text with spaces is so long.
LONGEST_WORD = 1 << 12

# Byte-level BPE as it is trained here never joins a word to the space or line end after it.
WORD_BOUNDARY = re.compile(r"(?<=\S)[ \n]")
# A space and a byte as SentencePiece and its followers spell them.
_METASPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def pieces(text: str, size: int = 1 << 20) -> Iterator[str]:
    """Yields text in pieces, cut only where the tokens of a tokenizer from ``train_tokenizer`` stay the same.

    Args:
        text: a document.
        size: the characters after which a piece is cut, before the next space or line end that ends a word.

    >>> list(pieces("one two three", size=2))
    ['one', ' two', ' three']
    """
    start = 0
    while len(text) - start > size:
        found = WORD_BOUNDARY.search(text, start + size)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def parted(texts: Iterable[str], size: int = 1 << 20) -> Iterator[str]:
    """Yields a document that comes in parts as :func:`pieces` would yield the whole; cuts words of over ``LONG``.

    >>> list(parted(["one tw", "o three"], size=2))
    ['one', ' two', ' three']
    """
    held, start, least = "", 0, size
    for text in texts:
        # One character before the next piece tells whether a word ends there.
        held, start = held[max(0, start - 1) :] + text, min(start, 1)
        while True:
            found = WORD_BOUNDARY.search(held, start + least)
            end = len(held) if found is None else found.start()
            if end - start > LONG:
                yield held[start : start + LONG]
                start, least = start + LONG, max(0, least - LONG)
            elif found is not None:
                yield held[start:end]
                start, least = end, size
            else:
                break
    yield held[start:]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Trains a byte-level BPE tokenizer; the same texts give the same tokenizer. The time grows with the text.

    Words of more than 4,096 bytes (text without spaces) are cut, but only for training: encoding does not depend on it.

    Args:
        texts: any strings; decoding gives every text back to the byte, also one that was not in the training.
        vocab_size: the number of tokens, at least 257 (256 bytes and ``<|endoftext|>``, id 0, which is also bos, eos
            and pad).

    Returns:
        A ``PreTrainedTokenizerFast``; too little text gives fewer tokens than ``vocab_size``, see ``len(tokenizer)``.

    Raises:
        ConfigError: a vocabulary below 257.

    Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016, section 3.2; bytes
    as symbols as in GPT-2.

    >>> tokenizer = train_tokenizer(["low lower lowest"], 260)
    >>> tokenizer.decode(tokenizer.encode("löwe 🦁"))
    'löwe 🦁'
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocab_size is {vocab_size}",
            f"at least {SMALLEST_VOCABULARY}, one for each byte value and {SEPARATOR}",
            "take a larger vocabulary",
        )
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [words, tokenizers.pre_tokenizers.FixedLength(LONGEST_WORD)]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        (small for text in texts for part in parted([text]) for small in pieces(part, _SMALL)), trainer
    )
    backend.pre_tokenizer = words
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        # Generation continues at the end of each prompt, so the padding of a batch is on the left.
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def document_marks(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], int]:
    """Returns the ids before a document and the id after it, as the tokenizer's models were trained.

    Before a document: the first token of a text, if the tokenizer sets one (as Llama's does). After it:
    ``<|endoftext|>`` if the tokenizer has it, since chat models end a turn, not a document, with their ``eos_token``;
    else the ``eos_token``.

    Raises:
        ConfigError: a tokenizer that has neither of the two.

    >>> document_marks(train_tokenizer([], 257))
    ([], 0)
    """
    empty = plain_backend(tokenizer.backend_tokenizer.to_str()).encode("").ids
    before = empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []
    behind = tokenizer.backend_tokenizer.token_to_id(SEPARATOR)
    behind = tokenizer.eos_token_id if behind is None else behind
    if behind is None:
        raise ConfigError(
            f"the tokenizer has neither {SEPARATOR} nor an eos_token",
            "one of them, to stand between documents",
            "set its eos_token and save it again",
        )
    return before, behind


def plain_backend(content: str) -> "Tokenizer":
    """Returns a backend from its JSON; it neither truncates nor pads, and reads spelled special tokens as text."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(content)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def read_chat_template(file: str | Path) -> str:
    """Reads a chat template, the Jinja text that writes a conversation as one text, and tries it.

    Raises:
        ConfigError: a file that cannot be read, or a template that cannot write a question and its answer.

    >>> read_chat_template("absent.jinja")
    Traceback (most recent call last):
    diffattn.errors.ConfigError: 'absent.jinja' cannot be read (No such file or directory); wanted a chat template, \
the Jinja text of one model: check the path
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    wanted = "a chat template, the Jinja text of one model"
    try:
        template = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise ConfigError(f"{str(file)!r} cannot be read ({reason})", wanted, "check the path") from None
    said = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        written = render_jinja_template([said], chat_template=template, bos_token="", eos_token="")[0][0]
    # A template is a program, so it can raise anything.
    except Exception as error:
        raise ConfigError(f"{str(file)!r} fails ({one_line(error)})", wanted, "correct it") from None
    if "question" not in written or "answer" not in written:
        raise ConfigError(f"{str(file)!r} writes no question, or no answer", wanted, "correct it")
    return template


def with_chat_template(tokenizer: "PreTrainedTokenizerFast", template: str) -> "PreTrainedTokenizerFast":
    """Returns a copy of a tokenizer that has this chat template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def vocabulary_rows(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Counts the rows of an embedding that the tokenizer's ids need: the highest id, and one more.

    >>> vocabulary_rows(train_tokenizer([], 257))
    257
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Returns a SHA-256 of everything that decides the tokens of a document, or of a conversation."""
    content = json.dumps([tokenizer.backend_tokenizer.to_str(), document_marks(tokenizer), tokenizer.chat_template])
    return hashlib.sha256(content.encode()).hexdigest()


def byte_lengths(tokenizer: "PreTrainedTokenizerFast") -> npt.NDArray[np.int64]:
    """Counts the bytes of text that each token id stands for; special tokens have none.

    Args:
        tokenizer: one from ``train_tokenizer``, any other byte-level BPE, or one after SentencePiece with bytes
            (Llama 2's), which counts one byte too many per document for the space that it puts at the start.

    Returns:
        An int64 array of shape ``(vocabulary_rows(tokenizer),)``.

    Raises:
        ConfigError: a tokenizer of another kind.

    >>> lengths = byte_lengths(train_tokenizer(["abab"], 258))
    >>> lengths.shape, lengths[0], lengths[1:257].max(), lengths[257]
    ((258,), np.int64(0), np.int64(1), np.int64(2))
    """
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet, vocabulary = set(ByteLevel.alphabet()), tokenizer.get_vocab()
    special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
    sentencepiece = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    lengths = np.zeros(vocabulary_rows(tokenizer), np.int64)
    for token, index in vocabulary.items():
        if index in special or (index in added and added[index].special):
            continue
        if index in added:
            lengths[index] = len(token.encode())
        elif sentencepiece:
            lengths[index] = 1 if _BYTE.fullmatch(token) else len(token.replace(_METASPACE, " ").encode())
        elif alphabet.issuperset(token):
            # One symbol of the alphabet stands for one byte.
            lengths[index] = len(token)
        else:
            raise ConfigError(
                f"token {token!r} (id {index}) is not made of bytes", "a byte-level tokenizer", "take another tokenizer"
            )
    return lengths
