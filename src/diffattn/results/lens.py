"""The content of the page of ``diffattn lens``: the queries, keys and λ of one or two models on one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffattn.results.base import Result
from diffattn.results.maps import MapSet


@dataclass(frozen=True, kw_only=True)
class LensLayer(Result):
    """The numbers of one layer, each array as the base64 of its bytes in row-major order."""

    layer: int
    """The layer, counted from 0."""
    queries: str
    """Queries: (T, heads, width) numbers of the model's ``dtype``, and behind them (T, noise_heads, width)."""
    keys: str
    """Keys: (maps, T, groups, width) numbers of the model's ``dtype``; once where V2's two maps share them."""
    lam: str | None
    """λ: (T or 1, heads) numbers in float32; None for a model with one map."""


@dataclass(frozen=True, kw_only=True)
class LensModel(Result):
    """One model of the page."""

    name: str
    """The name that the page shows."""
    attention: str
    """The variant; ``softmax`` for a model that is not ours."""
    heads: int
    """Output heads."""
    noise_heads: int
    """Heads whose maps are subtracted, each from ``heads / noise_heads`` output heads; 0 for a model with one map."""
    groups: int
    """Key heads."""
    width: int
    """Width of a query and of a key, in channels."""
    scale: float
    """The number that the products of queries and keys are multiplied by."""
    dtype: str
    """The number format of queries and keys: ``float32`` or ``float16``."""
    layers: Sequence[LensLayer]
    """The layers that the page shows."""


@dataclass(frozen=True, kw_only=True)
class LensResult(Result):
    """The content of the page: one or two models on one text."""

    tokens: Sequence[str]
    """The tokens as they are to be read."""
    answer: Sequence[int] | None
    """The first token of the answer and the one behind its last; None where no answer was named."""
    models: Sequence[LensModel]
    """One model or two, beside each other."""
    command: str
    """The command that made the result."""
    picture: MapSet | None = None
    """The maps of one head of each model, where a picture of them was asked for."""

    def to_json(self) -> dict[str, object]:
        """Returns the result as JSON takes it; without ``picture`` where none was asked for."""
        written = super().to_json()
        if self.picture is None:
            del written["picture"]
        return written
