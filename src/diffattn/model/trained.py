"""The record of how a model was trained, kept beside its weights so that it goes where they go.

``training.json`` holds it with the SHA-256 of the weights that it describes: of weights that were saved over them it
says nothing.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from diffattn.checkpoint_files import weights_digest
from diffattn.config_fields import is_count, is_measure
from diffattn.errors import CheckpointError
from diffattn.files import read_object, write_json
from diffattn.humanize import count

TRAINING = "training.json"
ENOUGH = 20
"""Tokens for each parameter that a model is best trained on (Hoffmann et al. 2022, arXiv 2203.15556)."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The facts of a training: how much a model was trained, and how well it predicts."""

    attention: str
    """The variant."""
    parameters: int
    """The number of parameters."""
    vocab_size: int
    """The tokens among which each next one is predicted."""
    steps: int
    """The optimizer's steps."""
    tokens: int
    """The tokens that were read in training, repeated ones counted again."""
    val_loss: float
    """The loss on held-out text, in nats per token."""
    continued: bool
    """True if the run began from a model that was trained before, of which nothing is known here."""

    @property
    def little(self) -> bool:
        """True if it was trained on far less than a model of its size needs."""
        return not self.continued and self.tokens < ENOUGH * self.parameters

    @property
    def facts(self) -> str:
        """One line.

        >>> print(Trained(attention="diff_v1", parameters=3_000_000, vocab_size=4096, steps=30, tokens=15_360,
        ...     val_loss=7.2, continued=False).facts.replace(" on ", "\\n"))
        diff_v1, 3 M parameters, trained in 30 steps
        15,360 tokens; held-out loss 7.20 nats per token (guessing among 4,096 tokens costs 8.32)
        """
        on = " more" if self.continued else ""
        return (
            f"{self.attention}, {count(self.parameters)} parameters, trained in {self.steps:,}{on} steps on "
            f"{self.tokens:,} tokens; held-out loss {self.val_loss:.2f} nats per token (guessing among "
            f"{self.vocab_size:,} tokens costs {math.log(self.vocab_size):.2f})"
        )

    @property
    def advice(self) -> str | None:
        """Why its text is as it is, where it was trained on little; else None."""
        if not self.little:
            return None
        return (
            "so little training makes text that repeats itself or has no sense; that is no fault of the program: a "
            f"model of this size takes about {count(ENOUGH * self.parameters)} tokens to learn what it can"
        )


@dataclass(frozen=True)
class Claim:
    """The facts of a training that a file claims, before the weights are known to be those it describes."""

    trained: Trained
    """The facts."""
    weights: object
    """The digest of the weights that they are about, as the file has it."""

    def of_weights(self, folder: str | Path) -> Trained | None:
        """Returns the facts if the folder has those weights, else None; it reads them all, a second for each 1.4 GB."""
        return self.trained if self.weights == weights_digest(folder) else None


def write_trained(folder: Path, trained: Trained) -> None:
    """Keep it beside the weights that are in the folder."""
    write_json(folder / TRAINING, asdict(trained) | {"weights": weights_digest(folder)})


def read_trained(folder: str | Path) -> Trained | None:
    """Reads the facts about the weights in a folder; None where there are none, or where the weights are others.

    Raises:
        CheckpointError: a file that holds something else, or weights that cannot be read.
    """
    claim = read_claim(folder)
    return None if claim is None else claim.of_weights(folder)


def read_claim(folder: str | Path) -> Claim | None:
    """Reads ``training.json`` without reading the weights; None where there is no such file.

    Raises:
        CheckpointError: a file that holds something else.
    """
    file = Path(folder) / TRAINING
    if not file.is_file():
        return None
    way_out = "delete it, the model works without"
    values = read_object(file, way_out=way_out)
    weights = values.pop("weights", None)
    if values.keys() != {field.name for field in fields(Trained)} or not _sound(values):
        raise CheckpointError(f"{str(file)!r} holds something else", "what a run of diffattn train writes", way_out)
    return Claim(Trained(**values), weights)


def _sound(values: dict[str, Any]) -> bool:
    counts = (values["parameters"], values["vocab_size"], values["steps"], values["tokens"])
    whole = all(is_count(value) and value for value in counts)
    measured = is_measure(values["val_loss"]) and 0 <= values["val_loss"] < 1e9
    return whole and measured and isinstance(values["attention"], str) and isinstance(values["continued"], bool)
