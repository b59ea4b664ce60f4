"""Real text mixed with blocks that hide needles and ask for them, for models that are to be studied.

A needle block is a sequence of whole documents, one, two or four of equal length, so no question is parted from its
text:

    <|endoftext|> … text. The magic number of Lima is 48219. More text …

    What is the magic number of Lima? The magic number of Lima is 48219.<|endoftext|>

Blocks of text and of needles are drawn by one permutation; held-out text stays as it is, without needles.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from diffattn.data.needles import Haystack
from diffattn.data.packing import PreparedData, TokenBlocks, cache_explained, cache_root
from diffattn.data.text import split_by_document
from diffattn.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from diffattn.data.text import Corpus

# Part of the name of what is cached: changes when the blocks do.
_FORMAT = 1
# Documents in a block.
_PARTS = (1, 1, 2, 4)


class JoinedBlocks:
    """Blocks of one part behind those of another; both have the same context."""

    def __init__(self, first: TokenBlocks, second: TokenBlocks) -> None:
        self.first, self.second, self.context = first, second, first.context

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        return self.first[index] if index < len(self.first) else self.second[index - len(self.first)]


def check_share(share: float) -> None:
    """Raise a `ConfigError` unless this can be a share of the training blocks: 0 to below 1."""
    if not 0 <= share < 1:
        raise ConfigError(f"needles is {share}; wanted the share of the training blocks, 0 to below 1")


def with_needles(
    data: PreparedData,
    corpus: Corpus,
    *,
    share: float,
    seed: int = 0,
    most_needles: int = 12,
    most_queries: int = 2,
    cache_dir: str | Path | None = None,
) -> PreparedData:
    """The data with needle blocks among its training blocks; they are made once and kept in the cache.

    Args:
        data: of ``prepare_data``.
        corpus: what ``data`` was prepared from; the text around the needles is of the documents that it trains on.
        share: of the training blocks that are needle blocks, 0 to below 1; 0 leaves the data as they are.
        seed: of all that is drawn.
        most_needles: a document hides 1 to so many, fewer where it is short.
        most_queries: and asks for 1 to so many at once, until all are asked for.
        cache_dir: as in ``prepare_data``.

    Raises:
        ConfigError: a share out of range, or a context too short for a needle and its question.
        DataError: text without the end of a sentence.

    Source: the prompts are those of ``diffattn.data.needles``, the mixture is ours.
    """
    check_share(share)
    if share == 0:
        return data
    assert isinstance(data.train, TokenBlocks)
    count, context = round(len(data.train) * share / (1 - share)), data.train.context
    made = [_FORMAT, data.facts["digest"], data.facts["vocab_size"], context, count, seed, most_needles, most_queries]
    key = hashlib.sha256(json.dumps(made).encode()).hexdigest()
    path = cache_root(cache_dir) / f"{key[:32]}.needles.bin"
    size = count * context * np.dtype(data.train.dtype).itemsize
    if not path.exists() or path.stat().st_size != size:
        haystack = Haystack(split_by_document(corpus).train, data.tokenizer)
        blocks = np.empty((count, context), dtype=data.train.dtype)
        for index in range(count):
            random = np.random.default_rng((seed, index))
            blocks[index] = _block(haystack, random, context, most_needles, most_queries)
        _write(path, blocks)
    needles = TokenBlocks(path, dtype=data.train.dtype, context=context, part="needle blocks")
    train = JoinedBlocks(data.train, needles)
    facts = data.facts | {
        "digest": key,
        "blocks": data.facts["blocks"] | {"train": len(train), "needles": len(needles)},
        "needles": {"share": share, "seed": seed, "most_needles": most_needles, "most_queries": most_queries},
    }
    return dataclasses.replace(data, train=train, facts=facts)


def _block(
    haystack: Haystack, random: np.random.Generator, context: int, most_needles: int, most_queries: int
) -> list[int]:
    """Whole documents of ``context`` tokens together; one where several have no room for a needle."""
    parts = int(random.choice(_PARTS))
    for count in (parts, 1):
        share = context // count
        lengths = [share] * (count - 1) + [context - share * (count - 1)]
        try:
            documents = [
                haystack.document(random, length=length, most_needles=most_needles, most_queries=most_queries)
                for length in lengths
            ]
        except ConfigError:
            if count == 1:
                raise
            continue
        return [token for document in documents for token in document]
    raise AssertionError


def _write(path: Path, blocks: npt.NDArray[np.unsignedinteger]) -> None:
    """Under another name first: no one sees a half-written file, and of two that write it the last wins."""
    with cache_explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.tmp-", delete=False) as file:
            try:
                blocks.tofile(file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
