"""One trained model of a ladder: a row of ``rows.jsonl``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from diffattn.results.base import Result

KEY = (
    "arm",
    "seed",
    "hidden_size",
    "num_layers",
    "num_heads",
    "group",
    "vocab_size",
    "context",
    "tokens",
    "learning_rate",
    "batch_size",
    "match",
    "dtype",
    "data_digest",
)
"""The fields that together say which run a row is of: two rows with the same values are of one run."""
_NAMES = {"arm": "attention"}


@dataclass(frozen=True, kw_only=True)
class LadderRun(Result):
    """The facts of a run of a ladder that are known before it is trained.

    In JSON the key of ``arm`` is ``attention``.
    """

    arm: str
    """The model that was trained: a variant, or a variant with one change, such as ``diff_v1+no_norm``."""
    seed: int
    """The seed of the initial values and of the order of the text."""
    parameters: int
    """Parameters of the model itself."""
    non_embedding_parameters: int
    """Parameters without the embedding."""
    tokens: int
    """Tokens that the model is trained on."""
    hidden_size: int
    """Width of the model, in channels."""
    num_layers: int
    """Number of layers."""
    num_heads: int
    """Heads of the softmax model that is replaced."""
    group: int = 1
    """Heads of the softmax model for each key/value head; 1 in a file that does not say."""
    intermediate_size: int | None
    """Width of the feed-forward network, in channels; None in a file that does not say."""
    vocab_size: int
    """Tokens of the vocabulary."""
    context: int
    """Tokens of a block."""
    needles: float | None
    """Share of the training tokens, 0 to 1, that ask for something earlier; None in a file that does not say."""
    batch_size: int
    """Blocks in each step."""
    match: str
    """The way in which the parameters of a pair are matched: ``parameters`` or ``shape``."""
    learning_rate: float
    """Peak of the learning rate."""
    dtype: str
    """Number format of the products in training."""
    model_flops_per_token: float
    """FLOPs of training for each token, by the definition of the variant; a multiply-add counts as 2."""
    data_digest: str
    """The digest of the text and its tokenizer."""

    @property
    def key(self) -> tuple[object, ...]:
        """The values of the fields in ``KEY``: equal for two rows of one run."""
        return tuple(getattr(self, name) for name in KEY)

    def to_json(self) -> dict[str, object]:
        """Returns the row as JSON takes it, without the fields that the file it came from lacks."""
        # A file that says no group means 1.
        fields = {name: value for name, value in super().to_json().items() if (name, value) != ("group", 1)}
        return {_NAMES.get(name, name): value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class LadderRow(LadderRun):
    """One trained model of a ladder, as ``rows.jsonl`` has it on a line."""

    val_loss: float
    """Held-out loss after training, in nats per token."""
    bits_per_byte: float
    """Held-out loss in bits per byte of text."""
    train_tokens_per_second: float
    """Tokens of a training step over its median time, in tokens per second."""
    versions: Mapping[str, object] | None = None
    """The releases of what ran, and the machine; None in a file that does not say."""
    command: str | None = None
    """The command that made the row; None in a file that does not say."""
    seal: str | None = None
    """The digest by which a changed row is noticed; None where the row has no seal, or is not written yet."""

    @classmethod
    def from_json(cls, row: Mapping[str, object]) -> Self:
        """Returns the row that a line of the file holds.

        Raises:
            ValueError: a field is missing; says which.
        """
        found: dict[str, object] = {}
        for field in dataclasses.fields(cls):
            name = _NAMES.get(field.name, field.name)
            if name not in row and field.name not in _OPTIONAL:
                raise ValueError(f"it has no {name}")
            found[field.name] = row.get(name, 1 if name == "group" else None)
        return cls(**found)  # type: ignore[arg-type]


_OPTIONAL = ("group", "intermediate_size", "needles", "versions", "command", "seal")
