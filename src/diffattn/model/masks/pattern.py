"""Says which keys each query of a layer sees, but for padding: as a mask function of ``transformers``, and as ranges.

A query sees keys up to its own place, or of the whole row in an encoder; of these the ones within its window, and of
these the ones of its own sequence, where a row holds several. Places are counted along the row, padding too. Five
tokens in sequences of 3 and 2, with a window of 2:

    causal   1 0 0 0 0      queries[0] = 0 1 2 3 4      encoder   1 1 1 0 0      queries[0] = 0 0 0 3 3
             1 1 0 0 0      queries[1] = 2 3 3 5 5                1 1 1 0 0      queries[1] = 3 3 3 5 5
             0 1 1 0 0                                            1 1 1 0 0
             0 0 0 1 0                                            0 0 0 1 1
             0 0 0 1 1                                            0 0 0 1 1

The window of a causal layer counts the token itself, and that of an encoder is a distance to both sides, as the masks
of ``transformers`` have them.

Shape suffixes: B batch, T queries, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Pattern:
    """A mask function of ``transformers``, which also answers with the queries that see each key.

    Args:
        causal: whether a query sees no keys behind its own place.
        window: of a layer; None where it sees the whole row.
    """

    def __init__(self, causal: bool = True, window: int | None = None) -> None:
        self.causal = causal
        self.window = window
        self.first: Tensor | None = None
        self.offset: int | Tensor = 0

    def within(self, first: Tensor, offset: int | Tensor) -> Pattern:
        """Returns this pattern within the sequences of rows that hold several.

        Args:
            first: (B, T), the place where each token's sequence begins, which never falls along a row. What a cache
                holds before it belongs to the first sequence, which begins at 0.
            offset: the place of the first query.
        """
        packed = Pattern(self.causal, self.window)
        packed.first, packed.offset = first, offset
        return packed

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query if self.causal else (query >= 0) & (key >= 0)
        if self.window is not None:
            seen = seen & self.near(query, key)
        if self.first is not None:
            begins = self.first[batch, query - self.offset]
            # Without causality there is no cache, so that each key is one of the tokens.
            seen = seen & (key >= begins if self.causal else self.first[batch, key] == begins)
        return seen

    def near(self, query: Tensor, key: Tensor) -> Tensor:
        """Bool: whether a key lies within the window of a query, or behind it."""
        assert self.window is not None
        return key > query - self.window if self.causal else (query - key).abs() <= self.window

    def queries(self, place: Tensor, count: int, offset: int | Tensor) -> Tensor:
        """Returns int32 (2, B or 1, S): the first query that sees the key at each place, and the first behind the last.

        Args:
            place: (S,), the places of the keys.
            count: the number of queries T.
            offset: the place of the first query.
        """
        keys = place[None]
        first = (keys - offset).clamp(min=0) if self.causal else torch.zeros_like(keys)
        end = torch.full_like(keys, count)
        if self.first is not None:
            # Those whose sequence begins at the key or before it.
            end = torch.searchsorted(self.first, keys.expand(self.first.shape[0], -1).contiguous(), right=True)
            first = first.expand_as(end) if self.causal else self.first[:, place]
        if self.window is not None:
            first = first if self.causal else torch.maximum(first, keys - offset - self.window)
            reach = self.window if self.causal else self.window + 1
            end = torch.minimum(end, (keys - offset + reach).clamp(min=0))
        return torch.stack([first, end]).to(torch.int32)
