"""The attention call of a graph: with buffers that past and present share, or with standard operators alone.

onnxruntime's ``GroupQueryAttention`` writes the keys and values of new tokens into the cache that it was given, where
the caller binds one buffer to past and present; so a step copies nothing, and reads each cached key where it lies. The
buffer may be longer than what it holds: the length of ``attention_mask`` says how many tokens there are. Where past and
present are two buffers, it copies. Its width must be a multiple of 8; other models, graphs without a cache and engines
without that operator have ``Attention`` of opset 23, behind which the cache is joined anew at each step.

Shape suffixes as in ``diffattn.model.attention``; P tokens or places of the cache, S all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from diffattn.model.configuration import DiffTransformerConfig

GROUPED, REPEATED, SHARED = "onnx_grouped", "onnx_repeated", "onnx_shared"
# Added to the score of a key that a query does not see. With −∞ a row of padding, which sees none, would be NaN.
HIDDEN = -1e30
_OPERATOR = "com.microsoft::GroupQueryAttention"
_WIDTHS = 8


def can_share(config: DiffTransformerConfig) -> bool:
    """Returns whether onnxruntime has a kernel that shares the buffers of this model's cache."""
    assert config.head_dim is not None
    return config.head_dim % _WIDTHS == 0


@dataclass
class SharedCache:
    """The part of a cache that a pass over a graph sees: buffers before and after, and the number of all tokens.

    It has the methods that our models and their masks ask of a cache, and hands keys and values of new tokens through:
    :func:`shared_attention` puts them into the buffers.
    """

    past: list[tuple[Tensor, Tensor]]
    """Keys and values (B, G, P, W) of each layer; P may be more than what was written."""
    attention_mask: Tensor
    """(B, S), of which the length counts."""
    new: int
    """New tokens."""
    present: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The buffers of each layer with the new tokens."""

    def update(self, key: Tensor, value: Tensor, layer: int, *rest: Any) -> tuple[Tensor, Tensor]:
        """Returns keys and values of the new tokens as they are."""
        return key, value

    def get_mask_sizes(self, new: int, layer: int) -> tuple[int, int]:
        """Returns how many keys a query may see, and the place of the first."""
        return self.attention_mask.shape[1], 0

    def get_query_offset(self, layer: int) -> int:
        """Returns how many tokens stand before the new ones."""
        return self.attention_mask.shape[1] - self.new

    def lengths(self) -> tuple[Tensor, Tensor]:
        """Returns the place of the last token of each row (B,), and the number of all tokens (1,), both int32."""
        B, S = self.attention_mask.shape
        options: dict[str, Any] = {"dtype": torch.int32, "device": self.attention_mask.device}
        return torch.full((B,), S - 1, **options), torch.full((1,), S, **options)


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    buffers: SharedCache,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One ``GroupQueryAttention`` node; the mask is what is added to the scores, as :func:`added` makes it."""
    layer: Any = module.layer_idx
    B, N, T, W = query.shape
    past_key, past_value = buffers.past[layer]
    places = past_key.shape
    present = (places[0], places[1], places[2] + T, places[3])
    rows = (x.transpose(1, 2).reshape(B, T, -1) for x in (query, key, value))
    output, *after = torch.onnx.ops.symbolic_multi_out(
        _OPERATOR,
        (*rows, past_key, past_value, *buffers.lengths(), None, None, None, attention_mask),
        {"num_heads": N, "kv_num_heads": key.shape[1], "scale": float(scaling or W**-0.5)},
        dtypes=(query.dtype,) * 3,
        shapes=((B, T, N * W), present, present),
        version=1,
    )
    buffers.present[layer] = (after[0], after[1])
    return output.view(B, T, N, W), None


def added(mask: Tensor) -> Tensor:
    """Returns numbers that are added to scores: 0 for a key that is seen, far below all scores for another."""
    return torch.zeros((), dtype=torch.float32).masked_fill(~mask, HIDDEN)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The standard call whose key heads serve groups of query heads as they are: ``sdpa`` repeats them on the CPU."""
    assert attention_mask is not None
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2), None


def repeated_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The standard call with a key and a value head for each query head, for engines that cannot group them."""
    times = query.shape[1] // key.shape[1]
    # As an expansion, which engines know as the repetition of heads.
    key, value = (x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for x in (key, value))
    return grouped_attention(module, query, key, value, attention_mask, **kwargs)


for _name, _function in (
    (GROUPED, grouped_attention),
    (REPEATED, repeated_attention),
    (SHARED, shared_attention),
):
    ALL_ATTENTION_FUNCTIONS.register(_name, _function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, sdpa_mask)
