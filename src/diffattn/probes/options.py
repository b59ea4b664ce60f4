"""The options of the lens, those that all studies share, and the base of each study's own; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from diffattn.errors import ConfigError
from diffattn.model.options import Device, Dtype

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Larger numbers are typing mistakes: such a study would take months, or more memory than there is.
MOST_SAMPLES, MOST_TOGETHER = 1_000_000, 65_536


def fitting_length(asked: int | None, positions: int | None, *, most: int = 1024) -> int:
    """Returns the length that is asked for where it fits into a model, and one that fits where none is asked for.

    Args:
        asked: tokens; None: ``most``, or ``positions`` where these are fewer.
        positions: the model's ``max_position_embeddings``; None: any number.
        most: the length that is usual.

    Raises:
        ConfigError: more than the model's positions, or none.

    >>> fitting_length(None, 512), fitting_length(300, 512), fitting_length(None, None)
    (512, 300, 1024)
    """
    if asked is None:
        return most if positions is None else min(most, positions)
    if asked < 1:
        raise ConfigError(f"a length of {asked} tokens given", "at least 1", "ask for a longer one")
    if positions is not None and asked > positions:
        raise ConfigError(
            f"a length of {asked} tokens given", f"at most {positions}, the model's max_position_embeddings",
            "ask for a shorter one",
        )  # fmt: skip
    return asked


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """The base of the options of a study; each field of a subclass is an option of the command line."""

    def fitted(self, positions: int | None) -> Self:
        """Returns the options with a length that was left open made to fit models with so many positions.

        Args:
            positions: the fewest ``max_position_embeddings`` of the models; None: any number.

        Raises:
            ConfigError: a length beyond the models' positions.
        """
        return self

    def check_bounds(self, **bounds: tuple[float, float]) -> None:
        """Refuses numbers with which a study has nothing to do, would never end, or not fit into any memory.

        Args:
            bounds: the smallest and the largest value of a field, or of each entry of a field with several.

        Raises:
            ConfigError: a number beyond its bounds, or a field with no entry.
        """
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            option = f"--{name.replace('_', '-')}"
            if value == ():
                raise ConfigError(f"{name} is empty", "at least one", f"change {option}")
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not least <= number <= most:
                    wanted = f"at least {least:,}" if number < least else f"at most {most:,}"
                    raise ConfigError(f"{name} is {number}", wanted, f"change {option}")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The options that are the same for every study: the text, how models are loaded, and what is kept."""

    text: str = "sotu"
    """Text to read: a file, a folder, or a data set's id; only the held-out part of it is read."""
    text_column: str = field(default="text", metadata={"option": "field"})
    """Name of the field that holds the text, where the text is rows of JSON, CSV or Parquet."""
    lossy_tokenizer: bool = False
    """Use a tokenizer that loses more than 1% of the text."""
    dtype: Dtype = "auto"
    """Number format of the weights; auto takes that of the file."""
    device: Device = "auto"
    """Device to run on: the processor (cpu) or a GPU (cuda); auto takes the GPU where there is one."""
    keep: Path | None = None
    """Folder to keep what is measured, so that a study that was stopped can go on."""


@dataclass(frozen=True, kw_only=True)
class LensOptions:
    """The options of :func:`diffattn.probes.lens.lens` beside ``LoadOptions``."""

    text: str
    """The text that the model reads, up to 2048 tokens."""
    layers: tuple[int, ...] | None = None
    """Layers that the page shows, counted from 0. Default: all."""
    answer: str | None = None
    """A part of the text; the page counts attention to anything else as noise. Default: none."""
