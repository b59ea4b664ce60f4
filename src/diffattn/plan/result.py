"""The answer of a plan: one model, or two side by side, with a row for each quantity and each backend."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from diffattn.plan.estimate import Estimate
from diffattn.plan.setting import Setting
from diffattn.plan.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """One model of a plan."""

    name: str
    """The name, as ``variant:size`` or the folder's."""
    attention: str
    """The variant, a name in ``VARIANTS``."""
    shape: ModelShape
    """The shape that is built; for a matched V2 its feed-forward network is narrower than softmax's."""
    left_out: dict[str, int]
    """Numbers in a checkpoint's files that are not planned, by what they are."""
    estimate: Estimate
    """The cost in the plan's setting."""

    def to_json(self) -> dict[str, object]:
        """Returns the fields by name."""
        return {
            "name": self.name,
            "attention": self.attention,
            "shape": asdict(self.shape),
            "left_out": self.left_out,
            "estimate": self.estimate.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class RatioRow:
    """One quantity of both models."""

    key: str
    """The name of the quantity in JSON."""
    label: str
    """The name of the quantity for a person."""
    format: str
    """The way in which it is written: ``"count"``, ``"size"`` (bytes), ``"flops"`` or ``"seconds"``."""
    unit: str
    """The words that stand behind it, such as ``"per token"``; empty where nothing does."""
    model: float | None
    """The first model's value; None where it has none, as without a machine."""
    against: float | None
    """The second model's value; None where it has none, or where one model is planned."""
    ratio: float | None
    """The first model's value over the second's; None where one of them is missing or the second is 0."""

    def to_json(self) -> dict[str, object]:
        """Returns the fields by name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class BackendRow:
    """The cost of one backend of a model, beside a softmax model of the same shape under the same backend."""

    model: str
    """The model's name."""
    attention: str
    """The model's variant."""
    backend: str
    """The name of the backend."""
    score_bytes: int
    """Bytes of T × T maps in training; 0 where none are written out."""
    score_ratio_to_twin: float | None
    """Those bytes over the softmax model's; None where that has none."""
    cache_bytes: int
    """Bytes of the key/value cache."""
    cache_ratio_to_twin: float
    """Those bytes over the softmax model's."""
    training_flops_per_token: float | None
    """FLOPs per token that training executes; None where the weights are integers."""
    decoding_flops_per_token: float
    """FLOPs per token that decoding executes."""
    training_bytes: int | None
    """Bytes at the peak of training; None where the weights are integers."""
    inference_bytes: int
    """Bytes at the larger of the peaks of prefill and decoding."""

    def to_json(self) -> dict[str, object]:
        """Returns the fields by name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One model, or two side by side, in one setting."""

    model: PlannedModel
    """The first model."""
    against: PlannedModel | None
    """The second model; None where one is planned."""
    ratios: list[RatioRow]
    """The quantities of both, one a row."""
    backends: list[BackendRow]
    """The cost of each backend, for each model."""
    setting: Setting
    """The setting that the numbers hold for."""
    command: str
    """The command that makes the plan again; empty where none is known."""
    sentences: list[str]
    """Three answers: on memory, on training against inference, on small machines."""
    notes: list[str]
    """Lines that say what a name was taken for, and what of a checkpoint is not planned."""

    @property
    def models(self) -> list[PlannedModel]:
        """The one or two models."""
        return [self.model] if self.against is None else [self.model, self.against]

    def to_json(self) -> dict[str, object]:
        """Returns the fields by name, as ``diffattn plan --json`` prints them."""
        return {
            "model": self.model.to_json(),
            "against": None if self.against is None else self.against.to_json(),
            "ratios": [row.to_json() for row in self.ratios],
            "backends": [row.to_json() for row in self.backends],
            "setting": self.setting.to_json(),
            "command": self.command,
            "sentences": self.sentences,
            "notes": self.notes,
        }
