"""Long context: the average loss up to each position of a long text, read in chunks with a cache.

Source: arXiv 2410.05258v2, section 3.3 and Figure 4 (cumulative average negative log-likelihood up to 64K tokens).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from diffattn.errors import ConfigError, UnsupportedError


@torch.no_grad()
def measure_long_context(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    *,
    length: int,
    chunk: int = 512,
    on_progress: Callable[[int, int], None] = lambda done, all_: None,
) -> dict[str, Any]:
    """Loss by position.

    Args:
        model: a causal model of ``transformers``.
        texts: token ids, each of at least ``length`` + 1.
        length: predicted tokens of each text; beyond the model's positions where its rotary base was extended.
        chunk: tokens that are read at once, which bounds memory.
        on_progress: called with tokens done and tokens in all.

    Returns:
        ``positions``, powers of two and ``length``; ``loss``, for each text the mean loss of its first so many
        predictions, in nats per token.

    Raises:
        ConfigError: a length or chunk below 1, no text, or a text that is too short.
    """
    if length < 1 or chunk < 1 or not texts or min(len(ids) for ids in texts) <= length:
        shortest = min((len(ids) for ids in texts), default=0)
        raise ConfigError(
            f"length is {length}, chunk {chunk}, and the shortest of {len(texts)} texts has {shortest} tokens; wanted "
            "texts of more tokens than length, and both at least 1"
        )
    device = model.device
    positions = sorted({*(2**power for power in range(length.bit_length())), length})
    losses = []
    for index, ids in enumerate(texts):
        cache, parts = DynamicCache(config=model.config), []
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            given = ids[None, start:stop].to(device)
            logits = model(input_ids=given, past_key_values=cache, use_cache=True).logits[0].float()
            parts.append(F.cross_entropy(logits, ids[start + 1 : stop + 1].to(device), reduction="none").cpu())
            on_progress(index * length + stop, len(texts) * length)
        total = torch.cat(parts).double().cumsum(0)
        losses.append([(total[position - 1] / position).item() for position in positions])
    return {"positions": positions, "loss": losses}


def with_rope_base(model: PreTrainedModel, base: float) -> PreTrainedModel:
    """The model with another base of its rotary frequencies; weights are shared with the one given.

    Raises:
        UnsupportedError: a model without rotary positions of the plain kind.
    """
    parameters = getattr(model.config, "rope_parameters", None)
    if not parameters or parameters.get("rope_type", "default") != "default":
        raise UnsupportedError(
            f"the positions of {type(model).__name__} are not plain rotary ones, so they have no base to extend; "
            "wanted rope_type 'default': leave the base out"
        )
    config = copy.deepcopy(model.config)
    config.rope_parameters["rope_theta"] = base
    with torch.device("meta"):
        extended = type(model)(config)
    extended.load_state_dict(model.state_dict(), assign=True)
    extended.tie_weights()
    extended.get_decoder().rotary_emb = type(model.get_decoder().rotary_emb)(config=config)
    return extended.to(model.device).eval()
