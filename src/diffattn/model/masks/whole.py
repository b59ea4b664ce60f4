"""Masks of four dimensions, which say for each query and key whether it is seen, as each implementation takes them.

Shape suffixes: B batch, T queries, S keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.cache_utils import Cache

from diffattn.errors import ConfigError
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.masks.pattern import Pattern
from diffattn.model.transformers_private import is_flash_attention_requested, is_tracing

# A mask that is added to scores hides a key by −inf or by the lowest number of any dtype, which are all at most this.
HIDDEN = torch.finfo(torch.float16).min


def columns(x: Tensor, past_key_values: Cache | None, layers: Iterable[int]) -> int:
    """Returns how many keys a mask has to speak of: all tokens so far, and those that a static cache has room for."""
    T = x.shape[1]
    if past_key_values is None:
        return T
    sizes = (past_key_values.get_mask_sizes(T, layer) for layer in layers)
    held = max(length + before for length, before in sizes)
    seen = past_key_values.get_query_offset(0)
    # Counted by a tensor, the layers have room for all that was seen.
    return held if isinstance(seen, Tensor) else max(held, seen + T)


def whole_mask(
    config: DiffTransformerConfig,
    x: Tensor,
    mask: Tensor,
    past_key_values: Cache | None,
    layer: int,
    pattern: Pattern,
    keys: int,
) -> Any:
    """Returns a mask of four dimensions as the implementation takes it: bool, added in the model's dtype, or blocks.

    A layer with a window sees of what the mask shows what lies within its window.

    Args:
        config: names the implementation.
        x: (B, T, ...), of which shape, dtype and device count.
        mask: (B or 1, heads or 1, T or 1, keys).
        past_key_values: the cache, before this pass.
        layer: the layer whose keys the cache is asked for.
        pattern: of which the window counts.
        keys: the columns that the mask has to have (see ``columns``).
    """
    implementation = config._attn_implementation
    B, T = x.shape[:2]
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
    if pattern.window is not None:
        length, before, seen = T, 0, 0
        if past_key_values is not None:
            (length, before), seen = past_key_values.get_mask_sizes(T, layer), past_key_values.get_query_offset(layer)
        place = torch.arange(before, before + length, device=x.device)
        near = pattern.near(torch.arange(T, device=x.device)[:, None] + seen, place)
        mask = mask[..., before : before + length]
        hidden = False if mask.dtype == torch.bool else -torch.inf
        mask = torch.where(near, mask, hidden)
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
