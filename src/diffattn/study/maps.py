"""The attention maps of one head, as a model itself computes them on a short text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from diffattn.model.attention import DiffV1Attention, DiffV2Attention, SoftmaxAttention
from diffattn.model.modeling import DiffTransformerForCausalLM


@torch.no_grad()
def attention_maps(model: DiffTransformerForCausalLM, input_ids: Tensor, *, layer: int, head: int) -> dict[str, Any]:
    """``map_pos``, ``lam_map_neg`` and ``map_diff`` of one output head, ``T × T`` lists, and its λ.

    For softmax only ``map_pos``. ``lam`` is a number under V1 and one per query token under V2.

    Args:
        model: any variant; its attention implementation and mode are left as they were.
        input_ids: ``(1, T)`` token ids; short, since the maps of all heads exist at once.
        layer: from 0.
        head: output head, from 0.
    """
    attention = model.model.layers[layer].self_attn
    assert isinstance(attention, SoftmaxAttention)
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    implementation, training = model.config._attn_implementation, model.training
    try:
        model.set_attn_implementation("eager")
        weights = model.eval()(input_ids, output_attentions=True).attentions[layer][0].float()
    finally:
        hook.remove()
        model.set_attn_implementation(implementation)
        model.train(training)
    if isinstance(attention, DiffV1Attention):
        lam = attention.lam().expand(weights.shape[-1])
    elif isinstance(attention, DiffV2Attention):
        lam = attention.lam(seen[0])[0, :, head]
    else:
        return {"map_pos": weights[head].tolist()}
    map_pos, lam_map_neg = weights[2 * head], lam[:, None] * weights[2 * head + 1]
    return {
        "map_pos": map_pos.tolist(),
        "lam_map_neg": lam_map_neg.tolist(),
        "map_diff": (map_pos - lam_map_neg).tolist(),
        "lam": lam[0].item() if isinstance(attention, DiffV1Attention) else lam.tolist(),
    }


def token_labels(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Tokens as they are to be read: a leading space as ``·``, a line break as ``↵``."""
    return [tokenizer.decode([token]).replace(" ", "·").replace("\n", "↵") for token in ids]
