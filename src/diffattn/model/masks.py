"""The mask of a pass, from the masks and positions that ``transformers`` and its users give a decoder.

A row may hold several sequences one after another. One begins where a position does not exceed that of the token before
it, or where ``cu_seq_lens_q`` says so, and its tokens see each other alone. Padding is no token: what
``attention_mask`` marks neither begins a sequence nor counts as the token before one, so a left-padded row, whose
positions repeat too, is one sequence.

    position_ids     0 1 2 0 1       1 1 0 1 2       0 1 0 1 1
    attention_mask   1 1 1 1 1       0 0 1 1 1       1 1 1 1 0
    sequences        a a a b b       · · a a a       a a b b ·

``transformers`` looks for packed rows only where there is neither a mask nor a cache; here they are found in every
call, and the library's mask of the implementation is asked for with that pattern. Two kinds of mask say more than
positions do: one of four dimensions says all, and one that ``generate`` has made beforehand is taken as it is.

Shape suffixes: B batch, T queries, S keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask

from diffattn.errors import ConfigError
from diffattn.model.configuration import DIFF_FUSED, DiffTransformerConfig
from diffattn.model.transformers_private import is_flash_attention_requested, is_tracing, makes_masks

# A mask that is added to scores hides a key by −inf or by the lowest number of any dtype, which are all at most this.
HIDDEN = torch.finfo(torch.float16).min


class PackedCausal:
    """A mask function of ``transformers``: causal from the first token of a query's sequence on.

    ``first`` (B, T) is the place of that token in the row, which never falls along it, and ``offset`` the place of the
    first query. What a cache holds before it belongs to the first sequence, which begins at 0.
    """

    def __init__(self, first: Tensor, offset: int | Tensor) -> None:
        self.first = first
        self.offset = offset

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= self.first[batch, query - self.offset])

    def queries(self, place: Tensor) -> Tensor:
        """int32 (2, B, S): the first query that sees the key at each place, and the first behind it that does not."""
        end = torch.searchsorted(self.first, place.expand(self.first.shape[0], -1).contiguous(), right=True)
        return torch.stack([(place - self.offset).clamp(min=0).expand_as(end), end]).to(torch.int32)


def is_compact(mask: Tensor) -> bool:
    """Tells whether a mask is the fused kernel's own, int32 (2, B, 1, 1, S): no other one has five dimensions."""
    return mask.dim() == 5


def positions_of_sequences(cu_seq_lens: Tensor, batch: int, length: int) -> Tensor:
    """Returns (B, T) positions that restart where a sequence of a flattened batch begins.

    >>> positions_of_sequences(torch.tensor([0, 2, 5]), 1, 5).tolist()
    [[0, 1, 0, 1, 2]]
    """
    token = torch.arange(batch * length, device=cu_seq_lens.device)
    return (token - cu_seq_lens[_sequence_of(cu_seq_lens, token)]).view(batch, length)


def model_mask(
    config: DiffTransformerConfig,
    x: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    options: dict[str, Any],
) -> Any:
    """Returns the mask for the layers' attention function: None for causal, else of the kind that it is made for.

    Args:
        config: names the implementation.
        x: (B, T, ...), of which shape, dtype and device count.
        attention_mask: None; (B, S), 1 or True for a token and 0 for padding; (B or 1, heads or 1, T or 1, S), True, 1
            or 0.0 where a query sees a key; or what this function returned to ``generate``.
        position_ids: (B or 1, T), None where the model counts them itself.
        past_key_values: the cache, before this pass.
        options: keyword arguments of the pass: ``cu_seq_lens_q``, and ``cache`` of an engine.
    """
    implementation = config._attn_implementation
    engine = not makes_masks(implementation) or options.get("cache") is not None
    if engine or not getattr(config, "is_causal", True):
        # An engine keeps the keys itself and says who sees them.
        return create_causal_mask(config, x, attention_mask, past_key_values, position_ids)
    if attention_mask is not None:
        if _is_made(attention_mask, implementation):
            return attention_mask
        _check_kind(attention_mask)
        if attention_mask.dim() == 4:
            return _whole_mask(config, x, attention_mask, past_key_values)
    first = _first_places(x, attention_mask, position_ids, past_key_values, options.get("cu_seq_lens_q"))
    if first is not None and is_flash_attention_requested(config):
        _check_flash(x, attention_mask)
        first = None
    if first is None:
        return create_causal_mask(config, x, attention_mask, past_key_values, position_ids=None)
    B, T = x.shape[:2]
    keys, first_key = (T, 0) if past_key_values is None else past_key_values.get_mask_sizes(T, 0)
    offset = _offset(past_key_values)
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=B,
        q_length=T,
        kv_length=keys,
        q_offset=offset,
        kv_offset=first_key,
        mask_function=PackedCausal(first, offset),
        attention_mask=None if attention_mask is None else attention_mask.to(device=x.device, dtype=torch.bool),
        allow_is_causal_skip=False,
        dtype=x.dtype,
        config=config,
        use_vmap=False,
        device=x.device,
    )


def _offset(past_key_values: Cache | None) -> int | Tensor:
    """The place of the first query in its row; a tensor where a static cache counts and a graph is traced."""
    offset = 0 if past_key_values is None else past_key_values.get_query_offset(0)
    return offset if not isinstance(offset, Tensor) or is_tracing(offset) else int(offset)


def _sequence_of(cu_seq_lens: Tensor, token: Tensor) -> Tensor:
    return torch.searchsorted(cu_seq_lens, token.to(cu_seq_lens.dtype), right=True) - 1


def _first_places(
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
    offset = _offset(past_key_values)
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
    starts = _starts(position_ids, None if real is None else real[:, place])
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


def _starts(position_ids: Tensor, real: Tensor | None) -> Tensor:
    """Bool (B, T): whether a sequence begins at a token, behind another one of its row."""
    # Rolled, not sliced: an exported graph would not serve two tokens, one of which has one before it.
    place = torch.arange(position_ids.shape[1], device=position_ids.device)
    if real is None:
        return (place > 0) & (position_ids <= position_ids.roll(1, -1))
    # The last token up to each place that is not padding, then the last one before it; −1 where there is none.
    last = torch.where(real, place, -1).cummax(-1).values.roll(1, -1).masked_fill(place == 0, -1)
    return real & (last >= 0) & (position_ids <= position_ids.gather(1, last.clamp(min=0)))


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


def _is_made(attention_mask: Any, implementation: str) -> bool:
    """Tells whether this module or the library made a mask for the implementation; no mask of a user's has its type."""
    if isinstance(attention_mask, Tensor):
        return implementation == DIFF_FUSED and is_compact(attention_mask)
    return implementation == "flex_attention" and isinstance(attention_mask, BlockMask)


def _check_kind(attention_mask: Any) -> None:
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4):
        given = f"of {attention_mask.dim()} dimensions" if isinstance(attention_mask, Tensor) else type(attention_mask)
        raise ConfigError(
            f"attention_mask is {given}",
            "a tensor (batch, keys), or (batch, heads or 1, queries, keys)",
            "pass one of these, or none",
        )
    added = attention_mask.dim() == 2 and attention_mask.is_floating_point() and not is_tracing(attention_mask)
    if added and (attention_mask < 0).any():
        raise ConfigError(
            "attention_mask (batch, keys) holds numbers below 0",
            "1 for a token and 0 for padding",
            "give a mask that is added to the scores four dimensions",
        )


def _check_flash(x: Tensor, attention_mask: Tensor | None) -> None:
    """Raises unless the sequences lie in one row without padding, which is what flash attention separates itself."""
    if is_tracing(x) or (x.shape[0] == 1 and (attention_mask is None or bool(attention_mask.bool().all()))):
        return
    raise ConfigError(
        "packed sequences in several rows or with padding, which flash attention does not separate",
        "one row without padding",
        "pack them so, or take another attn_implementation",
    )


def _whole_mask(config: DiffTransformerConfig, x: Tensor, mask: Tensor, past_key_values: Cache | None) -> Any:
    """Returns a mask of four dimensions as the implementation takes it: bool, added in the model's dtype, or blocks."""
    implementation = config._attn_implementation
    B, T = x.shape[:2]
    keys = T if past_key_values is None else past_key_values.get_mask_sizes(T, 0)[0]
    wanted = ((1, B), (1, config.num_attention_heads), (1, T), (keys,))
    if not is_tracing(mask) and any(size not in sizes for size, sizes in zip(mask.shape, wanted, strict=True)):
        raise ConfigError(
            f"attention_mask is {tuple(mask.shape)}",
            f"({B} or 1, {config.num_attention_heads} or 1, {T} or 1, {keys})",
            "give it batch, heads of the one attention call, queries and keys",
        )
    if is_flash_attention_requested(config):
        raise ConfigError(
            "a 4-D attention_mask with flash attention, which takes none",
            "another attn_implementation",
            "take sdpa, for example",
        )
    mask = _visible(mask.to(x.device))
    if implementation == "flex_attention":
        return _block_mask(mask.expand(B, -1, T, -1))
    if mask.dtype == torch.bool and implementation == "eager":
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
    if mask.dtype != torch.bool:
        # Not −inf: a query that sees nothing would become NaN.
        mask = mask.to(x.dtype).clamp(min=torch.finfo(x.dtype).min)
    return mask.expand(B, -1, T, -1)


def _block_mask(visible: Tensor) -> BlockMask:
    if visible.dtype != torch.bool:
        raise ConfigError(
            "an attention_mask of numbers with flex_attention, which hides a key or does not and adds none",
            "a mask of bool",
            "pass one, or take another attn_implementation",
        )
    one = visible.shape[1] == 1

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[batch, 0 if one else head, query, key]

    B, heads, T, S = visible.shape
    return create_block_mask(sees, B, None if one else heads, T, S, device=visible.device)


def _visible(mask: Tensor) -> Tensor:
    """Bool, True where a query sees a key, for a mask that says no more than that; else the mask, which is added."""
    if mask.dtype == torch.bool:
        return mask
    traced = is_tracing(mask)
    if mask.is_floating_point():
        if traced or mask.requires_grad:
            return mask
        visible = mask == 0
        if not visible.all() and (visible | (mask == 1)).all():
            raise ConfigError(
                "attention_mask (batch, heads, queries, keys) holds 0.0 and 1.0, and floats are added to the scores",
                "bool or int, or 0.0 where a query sees a key and -inf where it does not",
                "convert it with .bool()",
            )
        return visible if (visible | (mask <= HIDDEN)).all() else mask
    if not traced and ((mask != 0) & (mask != 1)).any():
        raise ConfigError(
            "attention_mask (batch, heads, queries, keys) of integers holds others than 0 and 1",
            "1 where a query sees a key and 0 where it does not",
            "pass floats for a mask that is added to the scores",
        )
    return mask != 0
