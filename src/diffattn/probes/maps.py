"""The attention maps of one head, as a model itself computes them on a short text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffattn.model.attention import DiffV1Attention
from diffattn.probes.attention_calls import LayerCall, served_by


@torch.no_grad()
def attention_maps(model: PreTrainedModel, input_ids: Tensor, *, layer: int, head: int) -> dict[str, Any]:
    """``map_pos``, ``lam_map_neg`` and ``map_diff`` of one output head, ``T × T`` lists, and its λ.

    For a model with one map only ``map_pos``. ``lam`` is a number under V1 and one per query token under V2.

    Args:
        model: any whose attention can be read (``layer_calls.py``); its implementation and mode are left as they were.
        input_ids: ``(1, T)`` token ids; short, since the maps of all heads of a layer exist at once.
        layer: from 0.
        head: output head, from 0.
    """
    found: dict[str, Any] = {}

    def read(call: LayerCall) -> None:
        if call.layer != layer:
            return
        rows = range(input_ids.shape[1])
        maps, lam = [weights[0, head] for weights in call.maps(rows)], call.lam_of(rows)
        found["map_pos"] = maps[0].tolist()
        if lam is not None:
            lam_T1 = lam[0, head]
            found["lam_map_neg"] = (lam_T1 * maps[1]).tolist()
            found["map_diff"] = (maps[0] - lam_T1 * maps[1]).tolist()
            # One number for all tokens where the layer has one.
            attention = model.get_decoder().layers[layer].self_attn
            found["lam"] = lam_T1[0, 0].item() if isinstance(attention, DiffV1Attention) else lam_T1[:, 0].tolist()

    training = model.training
    try:
        with served_by(model.eval(), read):
            model(input_ids=input_ids, use_cache=False)
    finally:
        model.train(training)
    return found


def token_labels(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Tokens as they are to be read: a leading space as ``·``, a line break as ``↵``."""
    return [tokenizer.decode([token]).replace(" ", "·").replace("\n", "↵") for token in ids]
