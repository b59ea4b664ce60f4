"""The keys that a query sees, in two forms: a boolean for each pair, and a range of queries for each key.

The ranges are what the kernels take, two numbers a key: query t sees key s of sequence b where
``queries[0, b, s] <= t < queries[1, b, s]``. They express causal attention, windows, padding, caches that are not full
and packed sequences, without a tensor of T × S. Causal is bottom-right aligned: query t sees keys up to S − T + t, so
that the last query sees every key. T = 3 queries, S = 5 keys of which the first is padding:

    0 1 1 0 0          queries[0] = 3 0 0 1 2
    0 1 1 1 0
    0 1 1 1 1    are   queries[1] = 0 3 3 3 3        (any empty range does for a key that no query sees)

Shape letters: B batch, T queries, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible_keys(queries: int, keys: int, causal: bool, key_padding: Tensor | None, device: torch.device) -> Tensor:
    """Returns which keys each query sees, as booleans that broadcast to (B, 1, T, S).

    `key_padding`, bool (B, S), is True where a key is padding; its column becomes 0 for every query of that sequence.

    >>> visible_keys(3, 5, True, None, torch.device("cpu"))[0, 0].int().tolist()
    [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    """
    visible = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=device)
    if causal:
        query_t = torch.arange(queries, device=device)[:, None]
        key_s = torch.arange(keys, device=device)[None, :]
        visible = (key_s <= keys - queries + query_t)[None, None]
    if key_padding is not None:
        visible = visible & ~key_padding[:, None, None, :]
    return visible


def visible_in_ranges(ranges: Tensor, queries: int) -> Tensor:
    """Returns which keys each of so many queries sees, bool (B, 1, T, S), from ranges of queries, int32 (2, B, S).

    >>> visible_in_ranges(torch.tensor([[[0, 1, 0]], [[2, 2, 0]]]), 2)[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0]]
    """
    first, end = ranges[:, :, None, None, :]
    t = torch.arange(queries, dtype=torch.int32, device=ranges.device)[:, None]
    return (first <= t) & (t < end)


def seeing_queries(queries: int, keys: int, causal: bool, key_padding: Tensor, window: int | None = None) -> Tensor:
    """Returns the queries that see each key, int32 (2, B, S), where some keys are padding; no query sees those.

    A `window` leaves of the keys that a causal query sees the last ones, its own among them, so many in all; else those
    at most so far away from its own place, before and behind it. Its own place is that of a causal query.

    >>> seeing_queries(2, 4, True, torch.tensor([[True, False, False, False]])).tolist()
    [[[0, 0, 0, 1]], [[0, 2, 2, 2]]]
    >>> seeing_queries(2, 4, True, torch.tensor([[False, False, False, False]]), window=2).tolist()
    [[[0, 0, 0, 1]], [[0, 1, 2, 2]]]
    """
    position = torch.arange(keys, dtype=torch.int32, device=key_padding.device)
    own = position - (keys - queries)
    first = own.clamp(min=0) if causal else torch.zeros_like(position)
    end = torch.full_like(position, queries)
    if window is not None:
        first, end = _within(first, end, own, causal, window)
    return torch.stack([first.expand_as(key_padding), (~key_padding).to(torch.int32) * end.clamp(min=0)])


def ranges_of(q: Tensor, k: Tensor, causal: bool, key_padding: Tensor | None, window: int | None) -> Tensor:
    """Returns the queries that see each key, int32 (2, B, S), of queries (B, T, …) and keys (B, S, …)."""
    if key_padding is None:
        key_padding = torch.zeros(k.shape[:2], dtype=torch.bool, device=k.device)
    return seeing_queries(q.shape[1], k.shape[1], causal, key_padding, window)


def _within(first: Tensor, end: Tensor, own: Tensor, causal: bool, window: int) -> tuple[Tensor, Tensor]:
    """Returns, of the queries from first to before end, those whose window holds a key; `own` is that at its place."""
    if causal:
        return first, torch.minimum(end, own + window)
    return torch.maximum(first, own - window), torch.minimum(end, own + window + 1)


def packed_queries(
    cu_seqlens: Tensor, length: int, causal: bool, key_padding: Tensor | None, window: int | None = None
) -> Tensor:
    """Returns the queries that see each key, int32 (2, 1, S), of sequences that lie one behind another in one row.

    Args:
        cu_seqlens: integers (N + 1,): where each of N sequences begins, and the row's length.
        length: the row's length, T = S.
        causal: whether a token sees only those before it in its sequence, and itself; else all of its sequence.
        key_padding: bool (1, S), True where a token is padding, or None.
        window: as of `seeing_queries`, within a sequence.

    >>> packed_queries(torch.tensor([0, 2, 5]), 5, True, None).tolist()
    [[[0, 1, 2, 3, 4]], [[2, 2, 5, 5, 5]]]
    """
    token = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    following = torch.searchsorted(cu_seqlens, token, right=True)
    first = token if causal else cu_seqlens[following - 1]
    end = cu_seqlens[following.clamp(max=cu_seqlens.shape[0] - 1)]
    if window is not None:
        first, end = _within(first, end, token, causal, window)
    if key_padding is not None:
        end = torch.where(key_padding[0], 0, end)
    return torch.stack([first, end]).to(torch.int32)[:, None]
