"""The attention maps of one head, as the model itself computes them on a short text."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffattn.model.attention import DiffV1Attention
from diffattn.probes.attention_calls import LayerCall, served_by
from diffattn.results.maps import AttentionMaps


@torch.no_grad()
def attention_maps(model: PreTrainedModel, input_ids: Tensor, *, layer: int, head: int) -> AttentionMaps:
    """Returns the maps of one output head, and its λ.

    Args:
        model: a model whose attention can be read (``attention_calls.py``); its implementation and mode are left as
            they were.
        input_ids: ``(1, T)`` token ids; short, since the maps of all heads of a layer exist at once.
        layer: the layer, counted from 0.
        head: the output head, counted from 0.

    Raises:
        UnsupportedError: a model whose attention cannot be read.
    """
    found: list[AttentionMaps] = []

    def read(call: LayerCall) -> None:
        if call.layer != layer:
            return
        rows = range(input_ids.shape[1])
        maps, lam = [weights[0, head] for weights in call.maps(rows)], call.lam_of(rows)
        if lam is None:
            found.append(AttentionMaps(map_pos=maps[0].tolist()))
            return
        lam_T1 = lam[0, head]
        # One number for all tokens where the layer has one.
        one = isinstance(model.get_decoder().layers[layer].self_attn, DiffV1Attention)
        found.append(
            AttentionMaps(
                map_pos=maps[0].tolist(),
                lam_map_neg=(lam_T1 * maps[1]).tolist(),
                map_diff=(maps[0] - lam_T1 * maps[1]).tolist(),
                lam=lam_T1[0, 0].item() if one else lam_T1[:, 0].tolist(),
            )
        )

    training = model.training
    try:
        with served_by(model.eval(), read):
            model(input_ids=input_ids, use_cache=False)
    finally:
        model.train(training)
    return found[-1]


def token_labels(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Returns tokens as they are to be read: a leading space as ``·``, a line break as ``↵``."""
    return [tokenizer.decode([token]).replace(" ", "·").replace("\n", "↵") for token in ids]
