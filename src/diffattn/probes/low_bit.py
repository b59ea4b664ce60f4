"""Low-bit attention: the loss where attention logits are quantised, to see what their outliers cost.

Absmax, dynamically: the logits of each head and query are rounded to ``2^(bits − 1) − 1`` steps on either side of zero
of the largest magnitude among its visible keys; 16 bits leave them as the model's numbers. What is behind the softmax
stays as it is.

Source: arXiv 2410.05258v2, section 3.7 and Figure 8 (16, 8, 6 and 4 bits), which does not say how wide a group shares
one scale; ours is one row of one head's map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from diffattn.errors import ConfigError
from diffattn.probes.attention_calls import LayerCall, served_by
from diffattn.probes.options import BITS


def quantise_rows(logits: Tensor, bits: int) -> Tensor:
    """Each row rounded to ``2^(bits − 1) − 1`` steps of its largest magnitude; −∞ stays.

    >>> quantise_rows(torch.tensor([7.0, -3.4, 0.4]), 4)
    tensor([ 7., -3.,  0.])
    """
    seen = logits > -torch.inf
    largest = logits.abs().masked_fill(~seen, 0.0).amax(dim=-1, keepdim=True)
    step = largest / (2 ** (bits - 1) - 1)
    # A row of zeros has no step.
    rounded = torch.where(step > 0, (logits / step).round() * step, logits)
    return torch.where(seen, rounded, logits)


def low_bit_attention(call: LayerCall, bits: int) -> Tensor:
    """Output heads (B, T, H, V) of a layer whose attention logits are quantised, in float32, rows by blocks."""
    parts, value = [], call.value.float().permute(0, 2, 1, 3)
    groups = value.shape[1]
    for rows in call.row_blocks():
        maps = tuple(
            quantise_rows(call.logits(which, rows), bits).softmax(dim=-1).nan_to_num_(0.0)
            for which in range(len(call.queries))
        )
        grouped = call.difference(maps, rows).unflatten(1, (groups, -1)).flatten(2, 3) @ value
        parts.append(grouped.unflatten(2, (-1, len(rows))).flatten(1, 2))
    return torch.cat(parts, dim=2).transpose(1, 2)


@torch.no_grad()
def measure_low_bit(
    model: PreTrainedModel,
    blocks: Sequence[Tensor],
    *,
    bits: Sequence[int] = BITS,
    on_progress: Callable[[int, int], None] = lambda done, all_: None,
) -> dict[str, Any]:
    """Held-out loss and next-token accuracy at each number of bits, block by block, so that models can be paired.

    Args:
        model: any whose attention can be read.
        blocks: token ids (B, T).
        bits: 2 to 15 are quantised; 16 is the model as it is.
        on_progress: called with passes done and passes in all.

    Returns:
        For each number of bits the ``loss`` in nats per token and the ``accuracy`` of each block.

    Raises:
        ConfigError: a number of bits out of range.
        UnsupportedError: a model whose attention cannot be read.
    """
    for number in bits:
        if not 2 <= number <= 16:
            raise ConfigError(f"bits is {number}; wanted 2 to 16, of which 16 leaves the logits as they are")
    device = model.device
    found: dict[str, Any] = {str(number): {"loss": [], "accuracy": []} for number in bits}
    for index, number in enumerate(bits):

        def serve(call: LayerCall, number: int = number) -> Tensor | None:
            return None if number == 16 else low_bit_attention(call, number)

        with served_by(model, serve):
            for done, block in enumerate(blocks, 1):
                ids = block.to(device)
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                wanted = ids[:, 1:]
                found[str(number)]["loss"].append(F.cross_entropy(logits.flatten(0, 1), wanted.flatten()).item())
                found[str(number)]["accuracy"].append((logits.argmax(dim=-1) == wanted).float().mean().item())
                on_progress(index * len(blocks) + done, len(bits) * len(blocks))
    return found
