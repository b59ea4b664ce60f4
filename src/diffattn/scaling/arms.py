"""The arms of an ablation: the variants, and the variants with one thing changed; a ladder trains any of them.

An arm is named after its variant, a plus and what is changed, and is a configuration of the same model. The file
imports torch only where a model is built, because the options of the command line read its names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from diffattn.errors import ConfigError
from diffattn.plan.shape import ModelShape
from diffattn.variants import BASELINE, VARIANTS

if TYPE_CHECKING:
    from diffattn.model.configuration import DiffTransformerConfig
    from diffattn.model.pairing import Pair

Switch = bool | float | str


@dataclass(frozen=True)
class Arm:
    """One thing that is trained: a variant with some fields of its configuration, and what it is compared with."""

    attention: str
    """The variant."""
    changed: str
    """The thing that is changed, in words."""
    base: str | None = BASELINE
    """The arm that it is compared with; None for softmax."""
    fields: Mapping[str, Switch] = field(default_factory=lambda: MappingProxyType({}))
    """The fields of the configuration that differ from the variant's own."""
    wide_heads: bool = False
    """True for half as many heads, each twice as wide."""

    def shape(self, shape: ModelShape) -> ModelShape:
        """Returns the softmax Transformer that this arm replaces: the ladder's, or it with half the heads.

        Raises:
            ConfigError: heads that cannot be halved.
        """
        if not self.wide_heads:
            return shape
        if shape.num_heads % 2 or shape.num_kv_heads % 2:
            raise ConfigError(
                f"num_heads={shape.num_heads} with num_kv_heads={shape.num_kv_heads} given",
                "both even, because this arm has half as many heads, twice as wide",
                "change the size",
            )
        return replace(
            shape, num_heads=shape.num_heads // 2, num_kv_heads=shape.num_kv_heads // 2, head_dim=2 * shape.head_dim
        )

    def config(self, shape: ModelShape, match: str) -> DiffTransformerConfig:
        """Returns the configuration of this arm of a shape; raises what ``pair_config`` raises."""
        from diffattn.model.pairing import pair_config

        return pair_config(self.shape(shape), self.attention, match=match, **self.fields)

    def build(self, shape: ModelShape, *, seed: int, match: str) -> Pair:
        """Returns the model of this arm with its softmax twin; raises what ``build_pair`` raises."""
        from diffattn.model.pairing import build_pair

        return build_pair(self.shape(shape), self.attention, seed=seed, match=match, **self.fields)


def _plain(name: str) -> Arm:
    """Returns the arm that is a variant with nothing changed."""
    return Arm(name, VARIANTS[name].summary, None if name == BASELINE else BASELINE)


ARMS: dict[str, Arm] = {
    "softmax": _plain("softmax"),
    "softmax+wide_heads": Arm(
        "softmax", "half the heads, twice as wide: as many as V1's output heads", wide_heads=True
    ),
    "softmax+head_norm": Arm("softmax", "an RMSNorm of each head's output", fields={"head_norm": True}),
    "gated": _plain("gated"),
    "diff_v1": _plain("diff_v1"),
    "diff_v1+no_norm": Arm("diff_v1", "no RMSNorm of each head, nor its scale", "diff_v1", {"head_norm": False}),
    "diff_v1+lambda_init_0.8": Arm("diff_v1", "λ_init 0.8 in every layer", "diff_v1", {"lambda_init": 0.8}),
    "diff_v1+lambda_init_0.5": Arm("diff_v1", "λ_init 0.5 in every layer", "diff_v1", {"lambda_init": 0.5}),
    "diff_v2": _plain("diff_v2"),
    "diff_v2+no_sigmoid": Arm("diff_v2", "λ = x W_λ, without the sigmoid", "diff_v2", {"lambda_form": "linear"}),
    "diff_v2+no_lambda": Arm("diff_v2", "λ = 1, no W_λ", "diff_v2", {"lambda_form": "one"}),
    "diff_v2+other_groups": Arm(
        "diff_v2", "the noise map of the next key/value group's head", "diff_v2", {"pairs_share_group": False}
    ),
    **{name: _plain(name) for name in VARIANTS},
}
"""The arms by name, in the order of tables; a variant that is not named here comes last."""
