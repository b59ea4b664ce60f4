"""The result of an ablation: each variant with one thing changed, and its difference from the model it changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffattn.results.base import Result
from diffattn.results.comparison import PairResult


@dataclass(frozen=True, kw_only=True)
class ArmResult(Result):
    """One arm of an ablation: a variant, or a variant with one thing changed."""

    changed: str
    """The change, in words."""
    base: str | None
    """The arm that it is compared with; None for softmax, which all others lead back to."""
    parameters: int
    """Parameters of the model."""
    val_loss: Sequence[float | None]
    """Held-out loss in nats per token, one for each seed of the result; None for a seed that was not trained."""


@dataclass(frozen=True, kw_only=True)
class ArmPair(PairResult):
    """An arm against its base, over the seeds that both have."""

    base: str
    """The arm that it is compared with; in JSON its key is ``baseline``."""
    seeds: Sequence[int]
    """The seeds that both have."""

    @property
    def baseline(self) -> str:
        """The name of the arm that this one is compared with."""
        return self.base

    def to_json(self) -> dict[str, object]:
        """Returns the pair as JSON takes it."""
        return {
            "baseline": self.base,
            "seeds": list(self.seeds),
            "val_loss_difference": self.val_loss_difference.to_json(),
            "parameters_ratio": self.parameters_ratio,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, kw_only=True)
class AblationResult(Result):
    """The whole of an ablation of one size and recipe."""

    study: str = "ablation"
    """The name of the study."""
    seeds: Sequence[int]
    """All seeds that any arm was trained with, in the order of the losses."""
    recipe: Mapping[str, object]
    """The size and the settings that all arms share."""
    variants: Mapping[str, ArmResult]
    """The results of each arm, by its name, in the order of the table of arms."""
    pairs: Mapping[str, ArmPair]
    """Each arm against its base, by the arm's name; an arm whose base has no seed in common is not there."""
    command: str
    """The command that made the result."""
