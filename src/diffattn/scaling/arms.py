"""What a ladder trains at every size: the variants, and the variants with one thing changed.

An arm is named after its variant, a plus and what is changed, and is a configuration of the same model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from diffattn.errors import ConfigError
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.pairing import Pair, build_pair, pair_config
from diffattn.plan.shape import ModelShape


@dataclass(frozen=True)
class Arm:
    """One thing that is trained: ``attention`` with ``fields`` of its configuration, compared with the arm ``base``."""

    attention: str
    changed: str
    base: str | None = "softmax"
    fields: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    wide_heads: bool = False

    def shape(self, shape: ModelShape) -> ModelShape:
        """The softmax Transformer that this arm replaces, of the ladder's: with half the heads, twice as wide, or it.

        Raises:
            ConfigError: heads that cannot be halved.
        """
        if not self.wide_heads:
            return shape
        if shape.num_heads % 2 or shape.num_kv_heads % 2:
            raise ConfigError(
                f"num_heads={shape.num_heads} with num_kv_heads={shape.num_kv_heads} given; heads of double width want "
                "both even, because there are half as many: change the size"
            )
        return replace(
            shape, num_heads=shape.num_heads // 2, num_kv_heads=shape.num_kv_heads // 2, head_dim=2 * shape.head_dim
        )

    def config(self, shape: ModelShape, match: str) -> DiffTransformerConfig:
        """The configuration of this arm of a shape; errors as of ``pair_config``."""
        return pair_config(self.shape(shape), self.attention, match=match, **self.fields)

    def build(self, shape: ModelShape, *, seed: int, match: str) -> Pair:
        """The model of this arm, and its softmax twin; errors as of ``build_pair``."""
        return build_pair(self.shape(shape), self.attention, seed=seed, match=match, **self.fields)


ARMS: dict[str, Arm] = {
    "softmax": Arm("softmax", "the Transformer that is replaced", None),
    "softmax+wide_heads": Arm(
        "softmax", "half the heads, twice as wide: as many as V1's output heads", wide_heads=True
    ),
    "softmax+head_norm": Arm("softmax", "an RMSNorm of each head's output", fields={"head_norm": True}),
    "gated": Arm("gated", "sigmoid(x W_g) ⊙ attention, a narrower feed-forward network"),
    "diff_v1": Arm("diff_v1", "differential attention V1"),
    "diff_v1+no_norm": Arm("diff_v1", "no RMSNorm of each head, nor its scale", "diff_v1", {"head_norm": False}),
    "diff_v1+lambda_init_0.8": Arm("diff_v1", "λ_init 0.8 in every layer", "diff_v1", {"lambda_init": 0.8}),
    "diff_v1+lambda_init_0.5": Arm("diff_v1", "λ_init 0.5 in every layer", "diff_v1", {"lambda_init": 0.5}),
    "diff_v2": Arm("diff_v2", "differential attention V2, a narrower feed-forward network"),
    "diff_v2+no_sigmoid": Arm("diff_v2", "λ = x W_λ, without the sigmoid", "diff_v2", {"lambda_form": "linear"}),
    "diff_v2+no_lambda": Arm("diff_v2", "λ = 1, no W_λ", "diff_v2", {"lambda_form": "one"}),
    "diff_v2+other_groups": Arm(
        "diff_v2", "the noise map of the next key/value group's head", "diff_v2", {"pairs_share_group": False}
    ),
}
