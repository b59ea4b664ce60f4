"""A byte-level BPE tokenizer of any size, trained here, that gives every UTF-8 text back exactly; and token files.

A token file is document, separator, document, separator, ... as little-endian uint16 (uint32 above 65,536 tokens). The
training and the held-out documents are two files, in a folder with their tokenizer and a manifest of sizes and hashes.
The tokens can also be those of a tokenizer that is given, such as a pretrained model's.
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
from diffattn.progress import OnStage, Stage, unseen

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Of the files below; part of the name of a cache folder.
FORMAT = 1
# The 256 byte values and the separator.
SMALLEST_VOCABULARY = 257
# Bounds the memory of encoding, whatever the length of a document.
BATCH_CHARACTERS = 1 << 22

# Byte-level BPE as it is trained here never joins a word to the space or line end after it.
WORD_BOUNDARY = re.compile(r"(?<=\S)[ \n]")
# Others join punctuation to a line end, but start a new word at a space between letters.
BETWEEN_LETTERS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
# Spaces and bytes as tokenizers after SentencePiece spell them.
_METASPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def pieces(text: str, size: int = 1 << 20, boundary: re.Pattern[str] | None = WORD_BOUNDARY) -> Iterator[str]:
    """Cut text where its tokens do not change, into pieces of about `size` characters, to bound memory.

    Arguments:
        text: a document.
        size: a piece is cut at the first boundary after so many characters.
        boundary: matches one space or line end to cut before; None for one piece.

    >>> list(pieces("one two three", size=2))
    ['one', ' two', ' three']
    """
    start = 0
    while boundary is not None and len(text) - start > size:
        found = boundary.search(text, start + size)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
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


def document_marks(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], int]:
    """Give the ids that stand before a document and the one behind it, as the tokenizer's models were trained.

    Before it: the first token of a text, where the tokenizer sets one (Llama's). Behind it: `<|endoftext|>` where the
    tokenizer has it, since chat models end a turn, not a document, with their `eos_token`; else the `eos_token`.

    Raises: `ConfigError` for a tokenizer with neither.

    >>> document_marks(train_tokenizer([], 257))
    ([], 0)
    """
    empty = _plain(tokenizer).encode("").ids
    before = empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []
    behind = tokenizer.backend_tokenizer.token_to_id(SEPARATOR)
    behind = tokenizer.eos_token_id if behind is None else behind
    if behind is None:
        raise ConfigError(
            f"the tokenizer has neither {SEPARATOR} nor an eos_token; wanted one, to stand between documents: set its "
            "eos_token and save it again"
        )
    return before, behind


def encode_documents(tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str]) -> Iterator[list[int]]:
    """Encode documents between their marks; `<|endoftext|>` spelled inside a document stays plain text.

    Arguments:
        tokenizer: one from `train_tokenizer`, or any other.
        texts: the documents.
    Returns: token ids in runs of any length, to be strung together.
    Raises: `ConfigError` as `document_marks`.

    >>> list(encode_documents(train_tokenizer([], 257), ["", "!"]))
    [[0, 1, 0]]
    """
    before, behind = document_marks(tokenizer)
    backend = _plain(tokenizer)
    boundary = _boundary(backend)
    # Text, or the ids of a mark.
    batch: list[str | list[int]] = []
    waiting = 0
    for text in texts:
        batch.append(before)
        for piece in pieces(text, boundary=boundary):
            batch.append(piece)
            waiting += len(piece)
            if waiting >= BATCH_CHARACTERS:
                yield _encode(backend, batch)
                batch, waiting = [], 0
        batch.append([behind])
    yield _encode(backend, batch)


def _plain(tokenizer: "PreTrainedTokenizerFast") -> "Tokenizer":
    """A copy of the backend that neither cuts nor fills a text, and takes spelled special tokens for text."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _boundary(backend: "Tokenizer") -> re.Pattern[str] | None:
    """Where a text can be cut without changing its tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    if isinstance(backend.pre_tokenizer, ByteLevel) and backend.pre_tokenizer.use_regex and backend.normalizer is None:
        return WORD_BOUNDARY
    # One that is not byte-level may set a sign at the start of every piece.
    return BETWEEN_LETTERS if set(ByteLevel.alphabet()) <= backend.get_vocab(False).keys() else None


def _encode(backend: "Tokenizer", batch: list[str | list[int]]) -> list[int]:
    texts = [piece for piece in batch if isinstance(piece, str)]
    encodings = iter(backend.encode_batch_fast(texts, add_special_tokens=False))
    return [index for piece in batch for index in (next(encodings).ids if isinstance(piece, str) else piece)]


def vocabulary_rows(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Count the rows of an embedding that the tokenizer's ids need: the highest one, and one more.

    >>> vocabulary_rows(train_tokenizer([], 257))
    257
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Give a SHA-256 of what decides the tokens of a document."""
    content = json.dumps([tokenizer.backend_tokenizer.to_str(), document_marks(tokenizer)])
    return hashlib.sha256(content.encode()).hexdigest()


def byte_lengths(tokenizer: "PreTrainedTokenizerFast") -> npt.NDArray[np.int64]:
    """Count the bytes of text behind every token id; special tokens have none.

    Arguments:
        tokenizer: one from `train_tokenizer`, any other byte-level BPE, or one after SentencePiece with bytes
            (Llama 2's), which counts one byte too many per document for the space that it sets at the start.
    Returns: int64 of shape `(vocabulary_rows(tokenizer),)`.
    Raises: `ConfigError` for a tokenizer of another kind.

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
                f"token {token!r} (id {index}) is not made of byte symbols: wanted a byte-level tokenizer"
            )
    return lengths


def write_token_files(
    folder: Path,
    split: Split,
    digest: str,
    vocabulary: "int | PreTrainedTokenizerFast",
    on_stage: OnStage = unseen,
) -> None:
    """Train a tokenizer on the training part and write it, both parts and their manifest into a new folder.

    Arguments:
        folder: does not exist yet; gets `tokenizer/`, `train.bin`, `validation.bin` and `manifest.json`.
        split: what `split_by_document` gave.
        digest: of the corpus, for the manifest.
        vocabulary: the size of the vocabulary, as for `train_tokenizer`; or a tokenizer, which is not written.
        on_stage: called with what is being done.
    Raises: `ConfigError` for a vocabulary below 257, `OSError` where the folder cannot be written.
    """
    folder.mkdir()
    if isinstance(vocabulary, int):
        on_stage(Stage("training the tokenizer"))
        tokenizer = train_tokenizer((document.text for document in split.train), vocabulary)
        tokenizer.save_pretrained(folder / "tokenizer")
    else:
        tokenizer = vocabulary
    on_stage(Stage("turning the text into tokens"))
    dtype = "<u2" if vocabulary_rows(tokenizer) <= 1 << 16 else "<u4"
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
