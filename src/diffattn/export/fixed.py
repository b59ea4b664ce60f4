"""One of our models as a module whose cache has a fixed length, for compilers that want tensors of fixed sizes.

``torch.export`` takes it as it is, and with that AOTInductor and ExecuTorch: keys and values are buffers that each pass
writes into, and a program keeps them from one pass to the next.

Shape suffixes: B batch, T new tokens, S places of the cache, G key/value heads, W their width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffattn.errors import ConfigError
from diffattn.model.modeling import DiffTransformerForCausalLM


class FixedDecoder(nn.Module):
    """A decoder with a cache of ``length`` places: ``(input_ids, positions)`` to the logits of the last token.

    ``input_ids`` (B, T) are written at ``positions`` (T,), both int64, and see what was written up to their own
    position. A new text begins at position 0 again; what an earlier one left behind is then hidden.

    Args:
        model: any variant; it is set to the standard call, ``sdpa``, since no compiler knows a kernel of ours.
        length: S, the places of the cache.
        batch: B, the rows of every pass. Default: 1.

    Raises:
        ConfigError: a length or batch below 1, or a length beyond ``max_position_embeddings``.

    >>> from diffattn import DiffTransformerConfig, ModelShape
    >>> config = DiffTransformerConfig.from_shape(ModelShape.preset("300K"), "diff_v2")
    >>> decoder = FixedDecoder(DiffTransformerForCausalLM(config).eval(), 8)
    >>> program = torch.export.export(decoder, (torch.tensor([[3]]), torch.tensor([0])))
    >>> program.module()(torch.tensor([[3]]), torch.tensor([0])).shape == (1, config.vocab_size)
    True
    """

    def __init__(self, model: DiffTransformerForCausalLM, length: int, *, batch: int = 1) -> None:
        super().__init__()
        most = model.config.max_position_embeddings
        if not 1 <= length <= most:
            raise ConfigError(f"length is {length}", f"1 to {most}, the positions of the model", "change it")
        if batch < 1:
            raise ConfigError(f"batch is {batch}", "a whole number from 1", "change it")
        model.set_attn_implementation("sdpa")
        self.model = model
        heads, width = model.config.num_key_value_heads, model.config.head_dim
        for layer in range(model.config.num_hidden_layers):
            for kind in ("key", "value"):
                empty = torch.zeros(batch, heads, length, width, dtype=model.dtype)
                self.register_buffer(f"{kind}_{layer}", empty, persistent=False)
        self.length = length

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Returns the logits (B, V) of the last of the new tokens."""
        visible_TS = torch.arange(self.length, device=positions.device) <= positions[:, None]
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=visible_TS[None, None],
            position_ids=positions[None],
            past_key_values=_Places(self, positions),
            use_cache=True,
            logits_to_keep=1,
        )
        return outputs.logits[:, -1]


class _Places:
    """The cache as the layers see it: they write at the new positions and read all places."""

    def __init__(self, decoder: FixedDecoder, positions: Tensor) -> None:
        self.decoder = decoder
        self.positions = positions

    def get_query_offset(self, layer: int) -> Tensor:
        return self.positions[0]

    def get_mask_sizes(self, new: int, layer: int) -> tuple[int, int]:
        return self.decoder.length, 0

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        held = []
        for kind, new in (("key", key), ("value", value)):
            places = getattr(self.decoder, f"{kind}_{layer}")
            places.index_copy_(2, self.positions, new)
            held.append(places)
        return held[0], held[1]
