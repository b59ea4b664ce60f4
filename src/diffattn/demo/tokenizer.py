"""Checks that the tokenizer of the page, which is another program than the library's, can do that of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffattn.checkpoint_files import folder_name
from diffattn.demo.runtime import TOKENIZERS
from diffattn.errors import DataError, UnsupportedError
from diffattn.files import read_object

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# By part of tokenizer.json: the types that the page's program computes as the library does. It has "Precompiled" too,
# and rebuilds only some of its characters.
_KNOWN = {
    "normalizer": {
        "BertNormalizer", "Sequence", "Replace", "NFC", "NFD", "NFKC", "NFKD", "Strip", "StripAccents", "Lowercase",
        "Prepend",
    },
    "pre_tokenizer": {
        "BertPreTokenizer", "Sequence", "Whitespace", "WhitespaceSplit", "Metaspace", "ByteLevel", "Split",
        "Punctuation", "Digits", "FixedLength",
    },
    "model": {"BPE", "WordPiece", "Unigram"},
    "post_processor": {"TemplateProcessing", "ByteLevel", "BertProcessing", "RobertaProcessing", "Sequence"},
    "decoder": {
        "ByteLevel", "WordPiece", "Metaspace", "BPEDecoder", "CTC", "Sequence", "Replace", "Fuse", "Strip",
        "ByteFallback",
    },
}  # fmt: skip
# Under these names a part holds parts of its own.
_PARTS = ("normalizers", "pretokenizers", "processors", "decoders")
# Applied by the library's tokenizer object where it is asked for, which the page never does.
_NO_PART_OF_IT = ("truncation", "padding", "version")


def page_tokenizer(folder: str | Path) -> dict[str, bytes]:
    """Returns the two files of a tokenizer by which the page encodes text, as JSON without white space.

    Raises:
        UnsupportedError: a tokenizer that the page's program cannot do.
        CheckpointError: a damaged file.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise UnsupportedError(
            f"{folder_name(folder)!r} holds no {FILE}", "a tokenizer in that file, which the page can read",
            "load it with transformers and save it again with save_pretrained",
        )  # fmt: skip
    content = _object(file)
    for part, known in _KNOWN.items():
        for kind in _types(content.get(part)):
            if kind not in known:
                raise UnsupportedError(
                    f"the tokenizer of {folder_name(folder)!r} has the {part} {kind!r}",
                    f"one that {TOKENIZERS.name} {TOKENIZERS.version} has, the tokenizer of the page",
                    "take a model with another tokenizer, such as those that diffattn trains",
                )
    settings = Path(folder) / SETTINGS
    return {"tokenizer": _small(content), "tokenizer-config": _small(_object(settings) if settings.is_file() else {})}


def check_same(folders: Sequence[str | Path]) -> None:
    """Raises a ``DataError`` where two models have different tokenizers, whose texts cannot stand beside each other."""
    contents = [_object(Path(folder) / FILE) for folder in folders]
    for content in contents:
        for name in _NO_PART_OF_IT:
            content.pop(name, None)
    if any(content != contents[0] for content in contents):
        raise DataError(
            "the two models have different tokenizers", "models that read a text in the same tokens",
            "make a page of each by itself",
        )  # fmt: skip


def _types(part: Any) -> Iterator[str]:
    """Yields the type of a part and of the parts in it."""
    if not isinstance(part, dict):
        return
    yield str(part.get("type"))
    for name in _PARTS:
        for inner in part.get(name) or ():
            yield from _types(inner)


def _object(file: Path) -> dict[str, Any]:
    return read_object(file, way_out="copy or download it again")


def _small(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
