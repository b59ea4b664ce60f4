"""The file in which the folder of a comparison remembers how it was started."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffattn.config_fields import is_count, is_measure
from diffattn.data.sources import lasting
from diffattn.errors import CheckpointError, ConfigError, one_line
from diffattn.files import write_json
from diffattn.folders import COMPARISON, own_folder
from diffattn.plan.named_model import load_shape
from diffattn.plan.shape import ModelShape
from diffattn.results.base import Result
from diffattn.sealed import SEAL, read_sealed, sealed
from diffattn.study.options import CompareOptions
from diffattn.train.checkpoints.sealing import WAY_OUT
from diffattn.train.spread.layout import Layout


@dataclass(frozen=True)
class RunPlan(Result):
    """The number of steps of each run, and the measured costs that it follows from."""

    steps: int
    """Optimizer steps of each run."""
    note: str
    """Words on why it is so many, to be put behind the number; empty where they were asked for."""
    seconds: float
    """Seconds that had passed when the plan was made."""
    step_seconds: Mapping[str, float]
    """Seconds of a training step, by variant."""
    peak_bytes: Mapping[str, float]
    """Largest number of bytes of tensors within a training step, by variant."""

    @classmethod
    def from_json(cls, plan: Mapping[str, Any], variants: Iterable[str]) -> RunPlan:
        """Returns the plan that a file holds.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        costs = [plan[part][name] for part in ("step_seconds", "peak_bytes") for name in variants]
        numbers = all(map(is_measure, [plan["seconds"], *costs]))
        if not (is_count(plan["steps"]) and isinstance(plan["note"], str) and numbers):
            raise ValueError("its plan holds something else than numbers")
        return cls(**{field.name: plan[field.name] for field in dataclasses.fields(cls)})


@dataclass(frozen=True)
class Stored:
    """The ``config.json`` of a comparison: enough to go on with it from any working directory."""

    options: CompareOptions
    """The options that it was started with."""
    shape: ModelShape
    """The softmax Transformer that is replaced."""
    command: str
    """The command that started it."""
    data_digest: str
    """The digest of the text, which may lie elsewhere by now; empty in a folder of an earlier version."""
    plan: RunPlan | None = None
    """The steps, and the cost of a step of each variant; None until that is measured."""
    layout: Layout = field(default_factory=Layout)
    """The way its runs are spread over ranks and computed, which the ranks that go on with it may change."""
    has_seal: bool = True
    """False for a folder that an earlier version began, which sealed nothing."""

    def write(self, folder: Path) -> None:
        """Replaces the file."""
        options = dataclasses.asdict(self.options) | {"text": lasting(self.options.text)}
        content = {
            "options": options,
            "shape": dataclasses.asdict(self.shape),
            "command": self.command,
            "data_digest": self.data_digest,
            "layout": self.layout.to_dict(),
            "plan": {} if self.plan is None else self.plan.to_json(),
        }
        write_json(folder / "config.json", sealed(content))

    @classmethod
    def read(cls, folder: Path) -> Stored:
        """Returns what a folder remembers.

        Raises:
            ConfigError: there is no comparison, but perhaps something else.
            CheckpointError: the file is damaged, or was changed after it was written.
        """
        file = folder / "config.json"
        if not file.exists():
            given = f"{folder} holds no comparison to resume"
            raise ConfigError(given, "the folder of one, with its config.json", "name it with --out")
        own_folder(folder, COMPARISON)
        content = read_sealed(file, way_out=WAY_OUT)
        plan = None
        try:
            lists = {name: tuple(value) for name, value in content["options"].items() if isinstance(value, list)}
            layout = Layout(**content.get("layout", {}))
            options = CompareOptions(**{**content["options"], **lists})
            shape = (
                ModelShape(**content["shape"])
                if "shape" in content
                else load_shape(options.shape).grouped(options.group)
            )
            if content.get("plan"):
                plan = RunPlan.from_json(content["plan"], options.variants)
            texts = (content["command"], content.get("data_digest", ""), *options.text)
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("its command, digest or text is no text")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            given = f"{file} is damaged, or of another command ({one_line(error)})"
            raise CheckpointError(given, "the config.json of a comparison", WAY_OUT) from None
        return cls(
            options, shape, content["command"], content.get("data_digest", ""), plan, layout, has_seal=SEAL in content
        )
