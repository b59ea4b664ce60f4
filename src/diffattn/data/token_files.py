"""Writes the tokens of a text into files, and tells whether they are still whole.

A token file is document, separator, document, separator, ... as little-endian uint16 (uint32 above 65,536 tokens). The
training and the held-out documents are two files, in a folder with their tokenizer and a manifest of sizes and hashes.
"""

import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import numpy as np

from diffattn.data.text import Document, Split
from diffattn.data.tokenizer import encode_documents, pieces, train_tokenizer, vocabulary_rows
from diffattn.files import FileFacts, file_facts, parse_json
from diffattn.progress import OnStage, Stage, unseen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The version of these files; it is part of the name of a cache folder.
FORMAT = 2


class TokenFile(FileFacts):
    """The facts of one file in the manifest of token files; one of tokens also has their type and number."""

    dtype: NotRequired[str]
    count: NotRequired[int]


class Manifest(TypedDict):
    """The manifest of a folder of token files."""

    format: int
    digest: str
    """The digest of the corpus."""
    files: dict[str, TokenFile]


def write_token_files(
    folder: Path,
    split: Split,
    digest: str,
    vocabulary: "int | PreTrainedTokenizerFast",
    on_stage: OnStage = unseen,
) -> None:
    """Trains a tokenizer on the training part and writes it, both parts and their manifest into a new folder.

    Args:
        folder: a folder that does not exist; it gets ``tokenizer/``, ``train.bin``, ``validation.bin`` (the held-out
            part) and ``manifest.json``.
        split: the result of ``split_by_document``.
        digest: the digest of the corpus, for the manifest.
        vocabulary: the size of the vocabulary, as for ``train_tokenizer``; or a tokenizer, which is not written.
        on_stage: called with each stage of the work and the number of characters that are done.

    Raises:
        ConfigError: a vocabulary below 257.
        OSError: the folder cannot be written.
    """
    folder.mkdir()
    if isinstance(vocabulary, int):
        tokenizer = train_tokenizer(_read(split.train, on_stage), vocabulary)
        tokenizer.save_pretrained(folder / "tokenizer")
    else:
        tokenizer = vocabulary
    dtype = "<u2" if vocabulary_rows(tokenizer) <= 1 << 16 else "<u4"
    files: dict[str, TokenFile] = {}
    counts: dict[str, int] = {}
    total, before = sum(len(document.text) for document in (*split.train, *split.validation)), 0
    for side, documents in (("train", split.train), ("validation", split.validation)):
        count = 0
        with (folder / f"{side}.bin").open("wb") as file:
            encoded = functools.partial(_report, on_stage, "turning the text into tokens", total, before)
            for ids in encode_documents(tokenizer, documents, on_encoded=encoded):
                file.write(np.asarray(ids, dtype).tobytes())
                count += len(ids)
        before = sum(len(document.text) for document in documents)
        counts[f"{side}.bin"] = count
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, facts = path.relative_to(folder).as_posix(), file_facts(path)
        files[name] = {"dtype": dtype, "count": counts[name], **facts} if name in counts else {**facts}
    manifest: Manifest = {"format": FORMAT, "digest": digest, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _read(documents: Iterable[Document], on_stage: OnStage) -> Iterator[str]:
    """Yields the pieces that a tokenizer is trained on; after them it chooses its tokens, and reports no progress."""
    documents = tuple(documents)
    total, done = sum(len(document.text) for document in documents), 0
    for document in documents:
        for piece in pieces(document.text):
            yield piece
            done += len(piece)
            _report(on_stage, "training the tokenizer", total, 0, done)
    on_stage(Stage("choosing the tokens of the tokenizer"))


def _report(on_stage: OnStage, name: str, total: int, before: int, done: int) -> None:
    on_stage(Stage(name, before + done, total))


def check_token_files(folder: Path) -> Manifest | None:
    """Returns the manifest of a folder if every file is as ``write_token_files`` wrote it, else None."""
    try:
        manifest: Manifest = parse_json((folder / "manifest.json").read_bytes())
        marks = {
            name: {"bytes": facts["bytes"], "sha256": facts["sha256"]} for name, facts in manifest["files"].items()
        }
        whole = all(file_facts(folder / name) == mark for name, mark in marks.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None
