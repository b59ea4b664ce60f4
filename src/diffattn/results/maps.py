"""The attention maps of one head on one text, for each of several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffattn.results.base import Result

Map = Sequence[Sequence[float]]
"""A map of T × T attention weights: a row for each query token, in it a number for each key token."""


@dataclass(frozen=True, kw_only=True)
class AttentionMaps(Result):
    """The maps of one output head over T tokens; a model with one map has ``map_pos`` alone."""

    map_pos: Map
    """The first softmax map; each row sums to 1."""
    lam_map_neg: Map | None = None
    """λ times the second softmax map, as it is subtracted; None for a model with one map."""
    map_diff: Map | None = None
    """The difference ``map_pos − lam_map_neg``, by which the values are weighted; None for a model with one map."""
    lam: float | Sequence[float] | None = None
    """λ, without a unit: one number under V1, one for each of the T query tokens under V2, None without a λ."""

    @property
    def maps(self) -> dict[str, Map]:
        """Those maps that the model has, by the names of their fields, in the order in which they are drawn."""
        named = {"map_pos": self.map_pos, "lam_map_neg": self.lam_map_neg, "map_diff": self.map_diff}
        return {name: each for name, each in named.items() if each is not None}

    def to_json(self) -> dict[str, object]:
        """Returns the record as JSON takes it, without the fields that the model lacks."""
        return {name: value for name, value in super().to_json().items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class MapSet(Result):
    """The maps of one head of several models on the same tokens; all are drawn on one scale."""

    tokens: Sequence[str]
    """The T tokens as they are to be read: a leading space as ``·``, a line break as ``↵``."""
    variants: Mapping[str, AttentionMaps]
    """The maps by the name of the model or variant, in the order in which they are shown."""
    causal: bool = True
    """False for encoders, whose tokens see both sides."""


@dataclass(frozen=True, kw_only=True)
class HeadMaps(MapSet):
    """The maps that a comparison shows: which head they are of, and the text."""

    text: str
    """The text that the tokens make up."""
    layer: int
    """The layer, counted from 0."""
    head: int
    """The output head, counted from 0."""
