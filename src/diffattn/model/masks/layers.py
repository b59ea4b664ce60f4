"""The masks of a pass, one for each type of layer, from what ``transformers`` and its users give a model.

The library's mask of the implementation is asked for with the pattern of the layers (see ``pattern.py``), which knows
windows, encoders and rows of several sequences. Two kinds of mask say more than positions do: one of four dimensions
says all (see ``whole.py``), and masks by type of layer, which ``generate`` and engines make beforehand, are taken as
they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from diffattn.errors import ConfigError
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.masks.pattern import Pattern
from diffattn.model.masks.sequences import first_places, offset_of
from diffattn.model.masks.whole import columns, whole_mask
from diffattn.model.transformers_private import (
    causal_mask_function,
    is_flash_attention_requested,
    is_tracing,
    makes_masks,
)


def layer_masks(
    config: DiffTransformerConfig,
    x: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Returns the mask that the attention function takes, for each type of layer: None where it needs none.

    Args:
        config: names the implementation, the types of the layers and their window.
        x: (B, T, ...), of which shape, dtype and device count.
        attention_mask: None; (B, S), 1 or True for a token and 0 for padding; (B or 1, heads or 1, T or 1, S), True, 1
            or 0.0 where a query sees a key; or what this function returned to ``generate``.
        position_ids: (B or 1, T), None where the model counts them itself.
        past_key_values: the cache, before this pass.
        options: keyword arguments of the pass: ``cu_seq_lens_q``, and ``cache`` of an engine.
    """
    assert config.layer_types is not None
    # The first layer of each type, whose part of the cache is as long as that of the others.
    kinds = {kind: config.layer_types.index(kind) for kind in dict.fromkeys(config.layer_types)}
    if isinstance(attention_mask, dict):
        return attention_mask
    implementation = config._attn_implementation
    if not makes_masks(implementation) or options.get("cache") is not None:
        # An engine keeps the keys itself and says who sees them.
        whole = isinstance(attention_mask, Tensor) and attention_mask.dim() == 4
        return dict.fromkeys(kinds, attention_mask if whole else None)
    if implementation == "flex_attention" and isinstance(attention_mask, BlockMask):
        return dict.fromkeys(kinds, attention_mask)
    if attention_mask is not None:
        _check_kind(attention_mask)
    patterns = {kind: Pattern(config.is_causal, config.layer_window(layer)) for kind, layer in kinds.items()}
    if attention_mask is not None and attention_mask.dim() == 4:
        keys = columns(x, past_key_values, kinds.values())
        return {
            kind: whole_mask(config, x, attention_mask, past_key_values, layer, patterns[kind], keys)
            for kind, layer in kinds.items()
        }
    first = first_places(x, attention_mask, position_ids, past_key_values, options.get("cu_seq_lens_q"))
    if first is not None and is_flash_attention_requested(config):
        _check_flash(x, attention_mask)
        first = None
    if first is not None:
        patterns = {kind: pattern.within(first, offset_of(past_key_values)) for kind, pattern in patterns.items()}
    return {
        kind: _mask(config, x, attention_mask, past_key_values, layer, patterns[kind]) for kind, layer in kinds.items()
    }


def _mask(
    config: DiffTransformerConfig,
    x: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    layer: int,
    pattern: Pattern,
) -> Any:
    B, T = x.shape[:2]
    if past_key_values is None:
        keys, first_key, offset = T, 0, 0
    else:
        keys, first_key = past_key_values.get_mask_sizes(T, layer)
        offset = past_key_values.get_query_offset(layer)
    # Each token of a compiled loop has to find a mask of the same kind.
    compiled = T == 1 and getattr(past_key_values, "is_compileable", False)
    one_sequence = pattern.first is None
    plain = pattern.causal and pattern.window is None and one_sequence
    return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=B,
        q_length=T,
        kv_length=keys,
        q_offset=offset.to(x.device) if isinstance(offset, Tensor) else offset,
        kv_offset=first_key,
        mask_function=causal_mask_function if plain else pattern,
        attention_mask=None if attention_mask is None else attention_mask.to(device=x.device, dtype=torch.bool),
        allow_is_causal_skip=pattern.causal and one_sequence and not compiled,
        allow_is_bidirectional_skip=not pattern.causal and one_sequence,
        # With a window that no query sees the end of, the library leaves out the mask.
        local_size=pattern.window,
        dtype=x.dtype,
        config=config,
        use_vmap=False,
        device=x.device,
    )


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
