"""A row of ``findings.jsonl``: the result of one study of one trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from diffattn.results.base import Result
from diffattn.results.study import Axes, PointResult, StudyTable


@dataclass(frozen=True, kw_only=True)
class TrainedModel(Result):
    """The facts by which a row names its model; all of them stand in the model's row of the ladder.

    In JSON the key of ``arm`` is ``attention``.
    """

    arm: str
    """The model that was trained: a variant, or a variant with one change."""
    seed: int
    """The seed of the run."""
    tokens: int
    """Tokens that the model was trained on."""
    learning_rate: float
    """Peak of the learning rate."""
    data_digest: str
    """The digest of the text and its tokenizer."""
    val_loss: float
    """Held-out loss in nats per token."""
    parameters: int
    """Parameters of the model."""

    def to_json(self) -> dict[str, object]:
        """Returns the facts as JSON takes them."""
        return {"attention" if name == "arm" else name: value for name, value in super().to_json().items()}


@dataclass(frozen=True)
class MeanPoint:
    """The mean of a model's samples at one point of a study; in JSON a list of the four."""

    panel: str
    """The measured quantity."""
    x: float
    """The setting on the first axis, in the unit that ``Axes.x`` names."""
    by: float | None
    """The setting on the second axis, in the unit that ``Axes.by`` names; None where there is none."""
    mean: float
    """The mean over the samples, in the unit that ``Axes.y`` names."""


@dataclass(frozen=True, kw_only=True)
class Finding(Result):
    """One study of one model."""

    name: str
    """The name of the row: that of the study, or of one way to ask it."""
    model: TrainedModel
    """The model."""
    study: str
    """The study."""
    asked: Mapping[str, object] | None
    """The options that the study was asked with; None where nothing was asked."""
    points: Sequence[MeanPoint]
    """The points, in the order in which they were measured."""
    axes: Axes
    """The words on the axes."""

    def to_json(self) -> dict[str, object]:
        """Returns the row as JSON takes it."""
        written = super().to_json()
        written["points"] = [[point.panel, point.x, point.by, point.mean] for point in self.points]
        return written

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Returns the row that a line of the file holds; facts beside it, such as the machine, are left out.

        Raises:
            KeyError, TypeError: the line is no such row.
        """
        model = {"arm" if name == "attention" else name: value for name, value in row["model"].items()}
        return cls(
            name=row["name"],
            model=TrainedModel(**model),
            study=row["study"],
            asked=row["asked"],
            points=[MeanPoint(*point) for point in row["points"]],
            axes=Axes(**row["axes"]),
        )


@dataclass(frozen=True, kw_only=True)
class SeedsStudy:
    """One study of all models, each arm over its seeds."""

    name: str
    """The name of its rows."""
    seeds: Mapping[str, Sequence[int]]
    """The seeds of each arm, by its name, softmax first."""
    study: str
    """The study."""
    points: Sequence[PointResult]
    """The points, in the order in which they were measured; the first arm is what the others are compared with."""
    axes: Axes
    """The words on the axes."""

    @property
    def table(self) -> StudyTable:
        """The part that a table or a chart shows."""
        return StudyTable(study=self.study, names=list(self.seeds), points=self.points, axes=self.axes)
