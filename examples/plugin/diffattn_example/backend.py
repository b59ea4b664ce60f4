"""A backend of `diff_attention`: the definition on one block of queries after another, so that no whole map is held."""

from __future__ import annotations

import torch
from torch import Tensor

from diffattn.ops.backend import Backend
from diffattn.ops.reference import Call, diff_attention_reference

BLOCK = 64


def supports(call: Call) -> str | None:
    """Returns None for a call that this backend serves, else one sentence that begins with its name."""
    if call.key_padding is not None:
        return "example_blocks: key_padding is not supported"
    return None


def run(call: Call) -> Tensor:
    """Returns the output (B, T, H, Dv); the largest map that it holds is BLOCK × S for each head."""
    queries, keys = call.q1.shape[1], call.k1.shape[1]
    lam = torch.as_tensor(call.lam).expand(call.q1.shape[:3])
    blocks = []
    for start in range(0, queries, BLOCK):
        rows = slice(start, min(start + BLOCK, queries))
        # Keys behind the last query of the block are hidden from all of it, so that the block is causal in itself.
        seen = slice(0, keys - queries + rows.stop) if call.causal else slice(None)
        blocks.append(
            diff_attention_reference(
                call.q1[:, rows],
                call.k1[:, seen],
                call.q2[:, rows],
                call.k2[:, seen],
                call.v[:, seen],
                lam[:, rows],
                causal=call.causal,
                scale=call.scale,
            )
        )
    return torch.cat(blocks, dim=1)


BACKEND = Backend("example_blocks", "every device of PyTorch", supports, run)
