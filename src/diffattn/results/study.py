"""The result of a study of several models: points, each with the mean of every model and its difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffattn.results.base import Result
from diffattn.results.interval import Interval


@dataclass(frozen=True, kw_only=True)
class Axes(Result):
    """The words on the axes of a study's chart."""

    x: str
    """The meaning of the points' ``x``, such as ``depth of the needle``."""
    y: str
    """The unit of the values, such as ``nats per token``; empty where each panel has a unit of its own."""
    by: str
    """The meaning of the points' ``by``, a second axis of settings such as ``layer``; empty where there is none."""
    logarithmic: bool
    """True where the axis of ``x`` is drawn logarithmically."""


@dataclass(frozen=True, kw_only=True)
class ModelPoint(Interval):
    """One model at one point: its mean with the interval, and its difference from the first model."""

    values: int
    """The number of values behind the mean: runs of the model where there are several, else samples."""
    difference: Interval | None
    """The paired difference from the first model, in the unit of the values; None for the first model, and where the
    two have values that cannot be paired."""
    is_first: bool
    """True for the model that the others are compared with; it has no ``difference`` in JSON."""

    def to_json(self) -> dict[str, object]:
        """Returns the point as JSON takes it."""
        written = super().to_json()
        for name in ("is_first", *(["difference"] if self.is_first else [])):
            del written[name]
        return written


@dataclass(frozen=True, kw_only=True)
class PointResult(Result):
    """One thing that was measured at one setting, of every model that has it."""

    panel: str
    """The measured quantity; the points of one panel are drawn together, joined by a line for each model."""
    x: float
    """The setting on the first axis, in the unit that ``Axes.x`` names."""
    by: float | None
    """The setting on the second axis, in the unit that ``Axes.by`` names; None where there is none."""
    models: Mapping[str, ModelPoint]
    """The values of each model here, by its name; a model that lacks this point is not there."""


@dataclass(frozen=True, kw_only=True)
class StudyTable:
    """The content of the table and of the chart of a study."""

    study: str
    """The name of the study, or what the table is of."""
    names: Sequence[str]
    """The names of all models, the first of which the others are compared with."""
    points: Sequence[PointResult]
    """The points, in the order in which they were measured."""
    axes: Axes
    """The words on the axes."""


@dataclass(frozen=True, kw_only=True)
class StudyModel(Result):
    """One model of a study: the folders of its runs, and their size."""

    folders: Sequence[str]
    """The folder of each run; runs differ in their seed."""
    parameters: Sequence[int]
    """The parameters of each run's model."""


@dataclass(frozen=True, kw_only=True)
class StudyResult(Result):
    """The result of one study of several models, as ``diffattn eval STUDY --json`` prints it."""

    study: str
    """The name of the study."""
    options: Mapping[str, object]
    """The options that the study was asked with, by their names."""
    text: str
    """The file, folder or data set that the text was read from."""
    models: Mapping[str, StudyModel]
    """The models by their names; the others are compared with the first."""
    points: Sequence[PointResult]
    """The points, in the order in which they were measured."""
    axes: Axes
    """The words on the axes."""
    versions: Mapping[str, object]
    """The releases of what ran, and the machine."""
    command: str
    """The command that made the result."""

    @property
    def table(self) -> StudyTable:
        """The part of the result that a table or a chart shows."""
        return StudyTable(study=self.study, names=list(self.models), points=self.points, axes=self.axes)
