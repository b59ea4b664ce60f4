"""A byte-level BPE tokenizer of any size, trained here, that gives every UTF-8 text back exactly; and token files.

A token file is document, separator, document, separator, ... as little-endian uint16 (uint32 above 65,536 tokens). The
training and the held-out documents are two files, in a folder with their tokenizer and a manifest of sizes and hashes.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from diffattn.data.text import SEPARATOR, Split
from diffattn.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Of the files below; part of the name of a cache folder.
FORMAT = 1
# The 256 byte values and the separator.
SMALLEST_VOCABULARY = 257
# Bounds the memory of encoding, whatever the length of a document.
BATCH_CHARACTERS = 1 << 22

# Byte-level BPE never joins a word to the space or line end after it.
_WORD_BOUNDARY = re.compile(r"(?<=\S)[ \n]")


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
    Returns: a `PreTrainedTokenizerFast`; too little text gives fewer tokens than `vocab_size`, see `len(tokenizer)`.
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


def encode_documents(tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str]) -> Iterator[list[int]]:
    """Encode documents, each followed by the separator; `<|endoftext|>` spelled inside a document stays plain text.

    Arguments:
        tokenizer: one from `train_tokenizer`.
        texts: the documents.
    Returns: token ids in runs of any length, to be strung together.

    >>> list(encode_documents(train_tokenizer([], 257), ["", "!"]))
    [[0, 1, 0]]
    """
    # None stands for the end of a document.
    batch: list[str | None] = []
    waiting = 0
    for text in texts:
        for piece in pieces(text):
            batch.append(piece)
            waiting += len(piece)
            if waiting >= BATCH_CHARACTERS:
                yield _encode(tokenizer, batch)
                batch, waiting = [], 0
        batch.append(None)
    yield _encode(tokenizer, batch)


def _encode(tokenizer: "PreTrainedTokenizerFast", batch: list[str | None]) -> list[int]:
    backend = tokenizer.backend_tokenizer
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        encodings = iter(backend.encode_batch_fast([piece for piece in batch if piece is not None]))
    finally:
        backend.encode_special_tokens = before
    separator = [tokenizer.eos_token_id]
    return [index for piece in batch for index in (separator if piece is None else next(encodings).ids)]


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
            raise ConfigError(
                f"token {token!r} (id {index}) is not made of byte symbols: wanted a byte-level tokenizer"
            )
        # One symbol of the alphabet stands for one byte.
        lengths[index] = len(token)
    return lengths


def write_token_files(folder: Path, split: Split, digest: str, vocab_size: int) -> None:
    """Train a tokenizer on the training part and write it, both parts and their manifest into a new folder.

    Arguments:
        folder: does not exist yet; gets `tokenizer/`, `train.bin`, `validation.bin` and `manifest.json`.
        split: what `split_by_document` gave.
        digest: of the corpus, for the manifest.
        vocab_size: as for `train_tokenizer`.
    Raises: `ConfigError` for a vocabulary below 257, `OSError` where the folder cannot be written.
    """
    folder.mkdir()
    tokenizer = train_tokenizer((document.text for document in split.train), vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    dtype = "<u2" if len(tokenizer) <= 1 << 16 else "<u4"
    files: dict[str, dict[str, Any]] = {}
    for side, documents in (("train", split.train), ("validation", split.validation)):
        count = 0
        with (folder / f"{side}.bin").open("wb") as file:
            for ids in encode_documents(tokenizer, (document.text for document in documents)):
                file.write(np.asarray(ids, dtype).tobytes())
                count += len(ids)
        files[f"{side}.bin"] = {"dtype": dtype, "count": count}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        facts = files.setdefault(path.relative_to(folder).as_posix(), {})
        facts |= {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {"format": FORMAT, "digest": digest, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def check_token_files(folder: Path) -> dict[str, Any] | None:
    """Give the manifest of a folder whose every file is as `write_token_files` wrote it, else None."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        marks = {name: (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
        whole = all((os.path.getsize(folder / name), _sha256(folder / name)) == mark for name, mark in marks.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
