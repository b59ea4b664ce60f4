"""The parts of which blocks are put together: attention, networks of two and three matrices, experts, norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffattn.plan.blocks.block import Block, BlockShape
from diffattn.plan.blocks.fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Attention:
    """Attention with a key/value head for each group of query heads: n query heads, G groups, heads of width d.

    ``bias``: the biases of all its projections; ``gated``: whether the result is multiplied by a gate as wide.
    """

    D: int
    n: int
    G: int
    d: int
    bias: int = 0
    gated: bool = False

    @property
    def fields(self) -> dict[str, int]:
        """The fields of its block."""
        queries, keys = self.n * self.d, self.G * self.d
        return {
            "matrices": (2 + self.gated) * self.D * queries + 2 * self.D * keys,
            "small": self.bias,
            "pairs": 2 * queries,
            "kept": 2 * keys,
            "wide": (2 + self.gated) * queries + 2 * keys,
        }


def biases(fields: Fields, attention: Attention, *, default: bool = False, key: str = "attention_bias") -> int:
    """Returns the biases of all four projections, where the file's switch is on."""
    return (attention.n + 2 * attention.G) * attention.d + attention.D if fields.flag(key, default) else 0


def block(what: str, layers: int, mixer: dict[str, int], feed_forward: dict[str, int], **more: Any) -> Block:
    """Returns a kind of layer that has these two parts; its widest place is the wider one's."""
    wide = max(mixer.get("wide", 0), feed_forward.get("wide", 0))
    return Block(what=what, layers=layers, **{**mixer, **feed_forward, **more, "wide": wide})


def gated(D: int, F: int, bias: int = 0) -> dict[str, int]:
    """Returns a feed-forward network of three matrices: gate, up, down."""
    return {"feed_forward": 3 * D * F, "feed_forward_small": bias, "wide": D + 3 * F}


def plain(D: int, F: int, *, bias: bool) -> dict[str, int]:
    """Returns a feed-forward network of two matrices."""
    return {"feed_forward": 2 * D * F, "feed_forward_small": (D + F) * bias, "wide": D + 2 * F}


def routed(D: int, F: int, *, experts: int, chosen: int, shared: int = 0, small: int = 0) -> dict[str, int]:
    """Returns experts of three matrices and the router that chooses among them.

    ``shared`` are parameters that every token passes beside them, ``small`` those of the router that are no matrix.
    """
    return {
        "feed_forward": D * experts + shared,
        "feed_forward_small": small,
        "expert": 3 * D * F,
        "experts": experts,
        "chosen": min(chosen, experts),
        "wide": D + 3 * F * min(chosen, experts) + shared // D,
    }


def shape(
    fields: Fields, blocks: Sequence[Block], *, tied: bool = False, final: int, heads: tuple[int, int, int],
    intermediate: int, extras: tuple[tuple[str, str, int], ...] = (), unplanned: tuple[str, ...] = (),
    unread: int = 0, hidden: str = "hidden_size", layers: str = "num_hidden_layers",
    positions: str = "max_position_embeddings",
) -> BlockShape:  # fmt: skip
    """Returns the shape of these blocks; ``final`` are the parameters of the last norm, ``heads`` n, G and d."""
    n, G, d = heads
    fields.read |= {"rope_theta", "rope_parameters", "rope_scaling"}
    return BlockShape(
        hidden_size=fields.size(hidden),
        num_layers=fields.size(layers),
        num_heads=n,
        num_kv_heads=G,
        head_dim=d,
        intermediate_size=intermediate,
        vocab_size=fields.size("vocab_size"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", tied),
        max_position_embeddings=fields.size(positions, 2048),
        source="config.json",
        extras=extras,
        final_norm=final,
        unread=unread,
        blocks=tuple(each for each in blocks if each.layers),
        unplanned=unplanned,
    )
