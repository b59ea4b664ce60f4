"""Activation outliers: the largest magnitudes of attention logits and hidden states over a long text, streamed.

Attention logits are the scaled scores ahead of the softmax, of every visible query-key pair and of both maps; hidden
states are what the layers pass on. The largest are exact. The median comes from a histogram of the magnitudes' leading
bits, whose bins are 0.8% wide, over every ``median_rows``-th row of the logits (the layer's number says which).

Source: arXiv 2410.05258v2, section 3.7 and Table 5 (top 1, 2, 3, 10, 100 and the median of the magnitudes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from diffattn.errors import DataError
from diffattn.probes.attention_calls import LayerCall, served_by

RANKS = (1, 2, 3, 10, 100)
# The 8 bits of the exponent and the first 7 of the fraction of a float32, its sign being gone: those of a bfloat16.
_BINS = 1 << 15


class Magnitudes:
    """The largest magnitudes of all that was added, and their median; finite numbers only."""

    def __init__(self, keep: int = max(RANKS)) -> None:
        self._keep = keep
        self._largest = torch.zeros(0)
        self._least = 0.0
        self._bins = torch.zeros(_BINS, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Take the values into account for the largest."""
        if not values.numel():
            return
        # Nearly every block has none that are large enough, which one pass at the speed of memory tells.
        least, greatest = (bound.item() for bound in values.aminmax())
        full = len(self._largest) == self._keep
        if full and max(-least, greatest) <= self._least:
            return
        magnitudes = values.abs().flatten().float()
        large = magnitudes[magnitudes > self._least] if full else magnitudes
        large = large.topk(min(self._keep, large.numel())).values.cpu()
        self._largest = torch.cat([self._largest, large]).sort(descending=True).values[: self._keep]
        self._least = self._largest[-1].item()

    def add_to_median(self, values: Tensor) -> None:
        """Take the values into account for the median."""
        bins = values.abs().float().flatten().view(torch.int32) >> 16
        self._bins += torch.bincount(bins, minlength=_BINS).cpu()

    def summary(self) -> dict[str, float]:
        """``top_1`` … ``top_100`` (as many as there are) and ``median``."""
        found = {f"top_{rank}": self._largest[rank - 1].item() for rank in RANKS if rank <= len(self._largest)}
        half = (int(self._bins.sum()) + 1) // 2
        middle = int((self._bins.cumsum(0) >= half).nonzero()[0])
        # The middle of the bin.
        bits = torch.tensor((middle << 16) + (1 << 15), dtype=torch.int32)
        return found | {"median": bits.view(torch.float32).item()}


@torch.no_grad()
def measure_outliers(
    model: PreTrainedModel,
    blocks: Iterable[Tensor],
    *,
    tokens: int,
    median_rows: int = 16,
    on_progress: Callable[[int, int], None] = lambda done, all_: None,
) -> dict[str, Any]:
    """Stream a text through a model.

    Args:
        model: any whose attention can be read.
        blocks: token ids (B, T), as many as it takes.
        tokens: read at least so many.
        median_rows: every so many-th row of the logits counts towards their median.
        on_progress: called with tokens done and tokens in all.

    Returns:
        ``tokens``, and ``attention_logits`` and ``hidden_states``, each as ``Magnitudes.summary``.

    Raises:
        DataError: fewer tokens than asked for.
        UnsupportedError: a model whose attention cannot be read.
    """
    logits, hidden, done = Magnitudes(), Magnitudes(), 0
    device = model.device

    def read(call: LayerCall) -> None:
        for which in range(len(call.queries)):
            for scores in call.seen_scores(which):
                logits.add(scores)
            some = range(call.layer % median_rows, call.queries[0].shape[1], median_rows)
            scores = call.logits(which, some)
            logits.add_to_median(scores[scores > -torch.inf])

    def pass_on(_: Any, __: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        hidden.add(states)
        hidden.add_to_median(states)

    hooks = [layer.register_forward_hook(pass_on) for layer in model.get_decoder().layers]
    try:
        with served_by(model, read):
            for ids in blocks:
                model(input_ids=ids.to(device), use_cache=False, logits_to_keep=1)
                done += ids.numel()
                on_progress(min(done, tokens), tokens)
                if done >= tokens:
                    break
    finally:
        for hook in hooks:
            hook.remove()
    if done < tokens:
        raise DataError(f"the text has {done} tokens in whole blocks; wanted {tokens}: give more text or ask for fewer")
    return {"tokens": done, "attention_logits": logits.summary(), "hidden_states": hidden.summary()}
