"""Learning from hidden tokens: which tokens of a sample are asked for, and what stands in their place.

Of each block 15% of the tokens are asked for: of these 80% are hidden by the mask token, 10% are replaced by a token
drawn from all, and 10% stay as they are (BERT, arXiv 1810.04805, section 3.1). Tokens that stand between documents are
not asked for. What is drawn depends on the run's seed and the number of the sample alone, by a generator that NumPy
keeps the same in every version: so both models of a pair are asked the same, and so is a run that was interrupted.
Each block is asked for equally many tokens, so that the mean over a batch is that of its blocks, however many ranks
share it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from diffattn.data.packing import PreparedData
from diffattn.data.tokenizer import vocabulary_rows
from diffattn.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MASK = "<|mask|>"
SHARE = 0.15
HIDDEN, REPLACED = 0.8, 0.1
# A loss ignores tokens with this label.
_NOT_ASKED = -100
# The seed of held-out blocks, which no run has: the same tokens are asked for in every run.
HELD_OUT = 2**31
_UNIT = 2.0**64


class MaskedSamples(Dataset[dict[str, torch.Tensor]]):
    """Samples with hidden tokens, and labels for those that are asked for.

    Args:
        samples: what is read, with ``input_ids`` of any shape.
        tokenizer: it has a mask token.
        seed: of the run, or ``HELD_OUT``.

    ``masked[i]`` is ``{"input_ids": ids of the same shape, "labels": the ids where one is asked for, else -100}``.
    """

    def __init__(
        self, samples: Dataset[dict[str, torch.Tensor]], tokenizer: PreTrainedTokenizerFast, *, seed: int
    ) -> None:
        self.samples, self.seed = samples, seed
        self.mask = tokenizer.mask_token_id
        self.special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
        self.rows = vocabulary_rows(tokenizer)

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.samples[index]["input_ids"]
        drawn = zip(("input_ids", "labels"), self._drawn(ids.numpy().reshape(-1), index), strict=True)
        return {name: torch.from_numpy(each).view(ids.shape) for name, each in drawn}

    def _drawn(self, ids: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
        place, kind, token = (
            np.random.Philox(np.random.SeedSequence((self.seed, index))).random_raw(3 * len(ids)).reshape(3, -1)
        )
        # Special tokens come last, and are asked for only where a block has too few others.
        order = np.lexsort((place, np.isin(ids, self.special)))
        asked = order[: max(1, round(SHARE * len(ids)))]
        drawn = kind[asked] / _UNIT
        new = np.where(drawn < HIDDEN, self.mask, ids[asked])
        new = np.where(drawn >= 1 - REPLACED, (token[asked] % np.uint64(self.rows)).astype(np.int64), new)
        hidden, labels = ids.copy(), np.full_like(ids, _NOT_ASKED)
        hidden[asked], labels[asked] = new, ids[asked]
        return hidden, labels


def with_mask(data: PreparedData, rows: int) -> PreparedData:
    """Returns prepared data whose tokenizer has a mask token: its own, or a new one in the row behind the others.

    Args:
        data: the text in tokens.
        rows: the rows of the model's embedding.

    Raises:
        ConfigError: there is no row for it.
    """
    tokenizer = data.tokenizer
    if tokenizer.mask_token is None:
        if vocabulary_rows(tokenizer) >= rows:
            raise ConfigError(
                f"the tokenizer has no mask token, and a token for each of the {rows} rows of the model",
                "a row for the mask token",
                "write a shape with a vocab_size of one more, or take a tokenizer with a mask_token",
            )
        tokenizer.add_special_tokens({"mask_token": MASK})
    facts = data.facts.copy()
    facts["vocab_size"] = vocabulary_rows(tokenizer)
    return dataclasses.replace(data, facts=facts)
