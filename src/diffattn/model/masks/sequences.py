"""Rows that hold several sequences: where each begins, from positions, masks and lengths.

A sequence begins where a position does not exceed that of the token before it, or where ``cu_seq_lens_q`` says so, and
its tokens see each other alone. Padding is no token: what ``attention_mask`` marks neither begins a sequence nor counts
as the token before one, so a left-padded row, whose positions repeat too, is one sequence.

    position_ids     0 1 2 0 1       1 1 0 1 2       0 1 0 1 1
    attention_mask   1 1 1 1 1       0 0 1 1 1       1 1 1 1 0
    sequences        a a a b b       · · a a a       a a b b ·

``transformers`` looks for packed rows only where there is neither a mask nor a cache; here they are found in every
call.

Shape suffixes: B batch, T queries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from diffattn.errors import ConfigError
from diffattn.model.transformers_private import is_tracing


def positions_of_sequences(cu_seq_lens: Tensor, batch: int, length: int) -> Tensor:
    """Returns (B, T) positions that restart where a sequence of a flattened batch begins.

    >>> positions_of_sequences(torch.tensor([0, 2, 5]), 1, 5).tolist()
    [[0, 1, 0, 1, 2]]
    """
    token = torch.arange(batch * length, device=cu_seq_lens.device)
    return (token - cu_seq_lens[_sequence_of(cu_seq_lens, token)]).view(batch, length)


def first_places(
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    cu_seq_lens: Tensor | None,
) -> Tensor | None:
    """Returns (B, T), the place in its row where each token's sequence begins; None if every row is one sequence."""
    B, T = x.shape[:2]
    if position_ids is None:
        # Counted on from what the cache holds.
        return None
    position_ids = position_ids.to(x.device).expand(B, -1)
    offset = offset_of(past_key_values)
    tracing = is_tracing(position_ids)
    real = None
    if attention_mask is not None:
        real = attention_mask.to(device=x.device, dtype=torch.bool)
        if not tracing and real.shape[1] < offset + T:
            raise ConfigError(
                f"attention_mask is {tuple(real.shape)} for {offset} cached and {T} new tokens",
                "a column for each of them",
                "pass the mask of the cached tokens too",
            )
    if not tracing and offset > 0:
        _check_continued(position_ids, real, int(offset))
    if T == 1:
        return None
    place = torch.arange(T, device=x.device) + offset
    starts = starts_of(position_ids, None if real is None else real[:, place])
    if cu_seq_lens is not None:
        cu_seq_lens = cu_seq_lens.to(x.device)
        if not tracing and (offset > 0 or int(cu_seq_lens[0]) != 0 or int(cu_seq_lens[-1]) != B * T):
            raise ConfigError(
                f"cu_seq_lens_q runs from {int(cu_seq_lens[0])} to {int(cu_seq_lens[-1])} for {B * T} tokens behind "
                f"{offset} cached",
                f"0 to {B * T} and no cached tokens",
                "correct it, or pass an empty cache",
            )
        number = _sequence_of(cu_seq_lens, torch.arange(B * T, device=x.device)).view(B, T)
        starts = starts | ((place > offset) & (number != number.roll(1, -1)))
    if not tracing and not starts.any():
        return None
    return torch.where(starts, place, 0).cummax(-1).values


def starts_of(position_ids: Tensor, real: Tensor | None) -> Tensor:
    """Bool (B, T): whether a sequence begins at a token, behind another one of its row."""
    # Rolled, not sliced: an exported graph would not serve two tokens, one of which has one before it.
    place = torch.arange(position_ids.shape[1], device=position_ids.device)
    if real is None:
        return (place > 0) & (position_ids <= position_ids.roll(1, -1))
    # The last token up to each place that is not padding, then the last one before it; −1 where there is none.
    last = torch.where(real, place, -1).cummax(-1).values.roll(1, -1).masked_fill(place == 0, -1)
    return real & (last >= 0) & (position_ids <= position_ids.gather(1, last.clamp(min=0)))


def _sequence_of(cu_seq_lens: Tensor, token: Tensor) -> Tensor:
    return torch.searchsorted(cu_seq_lens, token.to(cu_seq_lens.dtype), right=True) - 1


def _check_continued(position_ids: Tensor, real: Tensor | None, offset: int) -> None:
    """Refuses tokens whose positions say that they do not continue all of what the cache holds."""
    # This one number settles it for all rows that are not left-padded; the next line settles it for those in decoding.
    if int(position_ids.min()) >= offset:
        return
    if real is not None and position_ids.shape[1] == 1 and (position_ids[:, 0] + 1 >= real.sum(-1)).all():
        return
    first, held = position_ids[:, 0], torch.full_like(position_ids[:, 0], offset)
    wrong = first < held
    if real is not None:
        new, held = real[:, offset : offset + position_ids.shape[1]], real[:, :offset].sum(-1)
        first = position_ids.gather(1, new.int().argmax(-1, keepdim=True))[:, 0]
        # A row whose new tokens are all padding has no first one.
        wrong = (first < held) & new.any(-1)
    if wrong.any():
        row = int(wrong.int().argmax())
        raise ConfigError(
            f"position_ids begin at {int(first[row])} behind {int(held[row])} cached tokens of row {row}, and a cache "
            "does not keep where its sequences begin",
            "positions that count on",
            "give each sequence a row of its own, or pass a 4-D attention_mask",
        )


def offset_of(past_key_values: Cache | None) -> int | Tensor:
    """The place of the first query in its row; a tensor where a static cache counts and a graph is traced."""
    offset = 0 if past_key_values is None else past_key_values.get_query_offset(0)
    return offset if not isinstance(offset, Tensor) or is_tracing(offset) else int(offset)
