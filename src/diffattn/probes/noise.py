"""Attention to the answer and to noise: where the last token of a prompt looks, for a needle at several depths.

The maps' last row is summed over five spans of the prompt (the first token, the text before the needle, the needle,
the text behind it, the question), averaged over heads and layers and divided by its sum: shares, of which ``noise`` is
that of the two texts. For a differential model of map_diff, and of map_pos and map_neg apart. Shares of map_diff can be
negative where noise is over-cancelled.

Source: arXiv 2410.05258v2, section 3.4 and Table 3, which does not say how the spans are normalised; this is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from diffattn.data.needles import Haystack, NeedlePrompt
from diffattn.model.loading import positions_of
from diffattn.probes.attention_calls import LayerCall, served_by
from diffattn.probes.options import NoiseOptions, fitted

SPANS = ("bos", "before", "answer", "behind", "query")
NOISE = ("before", "behind")


def measure_noise(
    model: PreTrainedModel,
    haystack: Haystack,
    options: NoiseOptions,
    *,
    on_progress: Callable[[int, int], None] = lambda done, all_: None,
) -> dict[str, Any]:
    """Read a model on prompts with one needle.

    Args:
        model: any whose attention can be read (``probes/attention_calls.py``).
        haystack: the text, in the model's tokens.
        options: see :class:`NoiseOptions`.
        on_progress: called with prompts done and prompts in all.

    Returns:
        ``maps``: for ``map_pos`` (and ``map_neg``, ``map_diff``) the ``shares``, one entry per depth and sample,
        each a number per span; and ``by_head``, the mean share of ``answer`` and ``noise`` per layer and head.

    Raises:
        ConfigError: a length beyond the model's, or too short for a needle.
        UnsupportedError: a model whose attention cannot be read.
    """
    length = fitted(options, positions_of(model.config)).length
    # Each sample is its own stream, so that a depth more or less does not change the others.
    prompts = [
        (
            depth,
            haystack.prompt(np.random.default_rng((options.seed, index, sample)), length=length, depth=depth),
        )
        for index, depth in enumerate(options.depths)
        for sample in range(options.samples)
    ]
    rows: dict[str, list[Tensor]] = {}
    for start in range(0, len(prompts), options.batch_size):
        batch = [prompt for _, prompt in prompts[start : start + options.batch_size]]
        for name, sums in span_sums(model, batch).items():
            rows.setdefault(name, []).append(sums)
        on_progress(start + len(batch), len(prompts))
    return {"maps": {name: _summary(torch.cat(sums), len(options.depths)) for name, sums in rows.items()}}


@torch.no_grad()
def span_sums(model: PreTrainedModel, prompts: Sequence[NeedlePrompt]) -> dict[str, Tensor]:
    """What the last token of each prompt attends to, per map: (prompts, layers, heads, spans) in float64.

    Prompts have one length. Only the last row of a map is ever made.
    """
    device = model.device
    ids = torch.tensor([prompt.ids for prompt in prompts], device=device)
    ends = torch.tensor([[prompt.spans[name][1] for name in SPANS] for prompt in prompts], device=device)
    found: dict[str, list[Tensor]] = {}

    def read(call: LayerCall) -> None:
        last = range(call.queries[0].shape[1] - 1, call.queries[0].shape[1])
        maps, lam = call.maps(last), call.lam_of(last)
        named = {"map_pos": maps[0]}
        if lam is not None:
            named |= {"map_neg": maps[1], "map_diff": maps[0] - lam * maps[1]}
        for name, weights in named.items():
            # Spans join, so that their sums are differences of what lies before their ends.
            total = weights[:, :, 0].double().cumsum(-1)
            total = torch.cat([torch.zeros_like(total[..., :1]), total], dim=-1)
            upto = total.gather(-1, ends[:, None].expand(-1, total.shape[1], -1))
            found.setdefault(name, []).append(upto.diff(dim=-1, prepend=torch.zeros_like(upto[..., :1])))

    with served_by(model, read):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return {name: torch.stack(layers, dim=1).cpu() for name, layers in found.items()}


def _summary(sums: Tensor, depths: int) -> dict[str, Any]:
    """Shares per depth and sample, and per layer and head the mean shares of the answer and of noise."""
    answer, noise = SPANS.index("answer"), [SPANS.index(name) for name in NOISE]
    shares = sums.mean(dim=(1, 2))
    shares = shares / shares.sum(dim=-1, keepdim=True)
    # Means before the quotient: a head whose maps nearly cancel has sums near zero in some prompts.
    by_head = sums.mean(dim=0)
    by_head = by_head / by_head.sum(dim=-1, keepdim=True)
    return {
        "shares": shares.unflatten(0, (depths, -1)).tolist(),
        "by_head": {
            "answer": by_head[..., answer].tolist(),
            "noise": by_head[..., noise].sum(dim=-1).tolist(),
        },
    }
