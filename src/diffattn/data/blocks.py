"""Token files seen as blocks, and the order in which a run reads them, which resumes exactly at any sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from diffattn.data.token_files import Tokens
from diffattn.errors import ConfigError, DataError

# Up to so many blocks a permutation is sorted and held; that of more is computed block by block.
_SORTED = 1 << 22
# The samples whose sources are drawn together.
_DRAWN = 1 << 14
_MASK = (1 << 64) - 1


class TokenBlocks:
    """The tokens of one source, or of several, seen as blocks of ``context`` tokens; ragged ends are left out.

    Args:
        sources: the tokens of each source.
        context: tokens per block, at least 2.
        parts: the name of each source in an error.
        weights: the share of the samples that each source has, in any unit; None for one source.

    ``blocks[i]`` is int64 of shape ``(context,)``; the blocks of one source follow those of the one before it.

    Raises:
        ConfigError: a context below 2.
        DataError: a source with fewer tokens than one block has.
    """

    def __init__(
        self, sources: Sequence[Tokens], *, context: int, parts: Sequence[str], weights: Sequence[float] | None = None
    ) -> None:
        if context < 2:
            raise ConfigError(
                f"context is {context}", "at least 2, so that a block has a token to predict", "pass a longer context"
            )
        for tokens, part in zip(sources, parts, strict=True):
            if len(tokens) < context:
                raise DataError(
                    f"{part}: {len(tokens)} tokens",
                    f"at least {context}, for one block",
                    "give more text or a shorter context",
                )
        self.sources, self.context, self.parts = tuple(sources), context, tuple(parts)
        self.weights = None if weights is None else tuple(weights)
        self.counts = tuple(len(tokens) // context for tokens in sources)
        """The blocks of each source."""
        self._ends = np.cumsum(self.counts, dtype=np.int64)

    @property
    def tokens(self) -> Tokens:
        """The tokens of all sources, with the ragged ends."""
        return self.sources[0] if len(self.sources) == 1 else Tokens.joined(self.sources)

    @property
    def folder(self) -> Path:
        """The folder of the token files, of the first source if there are several."""
        return self.sources[0].paths[0].parent

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        source = int(np.searchsorted(self._ends, index, side="right"))
        start = (index - int(self._ends[source]) + self.counts[source]) * self.context
        return self.sources[source][start : start + self.context].astype(np.int64)


class TrainingOrder(Dataset[dict[str, torch.Tensor]]):
    """The samples of a run. Sample i of one source is block ``p[i % n]`` of n, with p the permutation of its epoch
    ``i // n``.

    A permutation sorts n raw numbers of Philox seeded by (seed, epoch), which NumPy keeps the same in every version; of
    more than four million blocks, numbers are mixed one by one instead. Of several sources with weights, the source of
    sample i is drawn by Philox from the seed, and gives the next block of its own permutation.

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
        self._schedule = None if blocks.weights is None else _Schedule(blocks.weights, seed)
        self._epochs = [_Epochs(count, seed, source) for source, count in enumerate(blocks.counts)]

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return _sample(self.blocks[self.block_index(index)])

    def block_index(self, index: int) -> int:
        """Returns the number of the block that is sample ``index`` of the run."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        source, place = (0, index) if self._schedule is None else self._schedule.place(index)
        return sum(self.blocks.counts[:source]) + self._epochs[source].block(place)


class _Schedule:
    """The source of each sample, drawn by weight, and how many samples before it had the same source."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        shares = np.cumsum(np.asarray(weights, np.float64) / np.sum(weights))
        # The last one is 1 but for rounding.
        self._limits, self._seed, self._count = shares[:-1], seed, len(weights)
        self._chunk, self._sources = -1, np.empty(0, np.int64)
        # The samples of each source before each chunk, as far as they were counted.
        self._before = [np.zeros(self._count, np.int64)]

    def place(self, index: int) -> tuple[int, int]:
        chunk, within = divmod(index, _DRAWN)
        while len(self._before) <= chunk:
            drawn = self._draw(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(drawn, minlength=self._count))
        if chunk != self._chunk:
            self._chunk, self._sources = chunk, self._draw(chunk)
        source = int(self._sources[within])
        return source, int(self._before[chunk][source]) + int(np.count_nonzero(self._sources[:within] == source))

    def _draw(self, chunk: int) -> npt.NDArray[np.int64]:
        numbers = np.random.Philox(np.random.SeedSequence((self._seed, chunk, self._count))).random_raw(_DRAWN)
        return np.searchsorted(self._limits, numbers / 2.0**64, side="right")


class _Epochs:
    """The blocks of one source in the order of each epoch."""

    def __init__(self, count: int, seed: int, source: int) -> None:
        self._count, self._seed, self._source = count, seed, source
        self._epoch = -1
        self._permutation: npt.NDArray[np.int64] | _Mixed = np.empty(0, np.int64)

    def block(self, place: int) -> int:
        epoch, within = divmod(place, self._count)
        if epoch != self._epoch:
            # The order of a single source is as old as its runs.
            key = (self._seed, epoch, self._source) if self._source else (self._seed, epoch)
            philox = np.random.Philox(np.random.SeedSequence(key))
            if self._count > _SORTED:
                self._permutation = _Mixed(self._count, philox.random_raw(_Mixed.ROUNDS).tolist())
            else:
                self._permutation = np.argsort(philox.random_raw(self._count), kind="stable")
            self._epoch = epoch
        return int(self._permutation[within])


class _Mixed:
    """A permutation of many numbers that holds none of them.

    A Feistel network permutes the numbers of an even number of bits; one that is mapped to too large a number is mapped
    again until it is not. Source: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, section 3.
    """

    ROUNDS = 8

    def __init__(self, count: int, keys: Sequence[int]) -> None:
        self._count, self._keys = count, keys
        self._bits = max(1, ((count - 1).bit_length() + 1) // 2)

    def __getitem__(self, index: int) -> int:
        half = (1 << self._bits) - 1
        while True:
            left, right = index >> self._bits, index & half
            for key in self._keys:
                # Two multiplications of MurmurHash3 spread each bit over all.
                mixed = ((right ^ key) * 0xFF51AFD7ED558CCD) & _MASK
                mixed = ((mixed ^ mixed >> 33) * 0xC4CEB9FE1A85EC53) & _MASK
                left, right = right, left ^ (mixed >> 33) & half
            index = left << self._bits | right
            if index < self._count:
                return index


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
