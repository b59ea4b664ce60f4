"""The options of a conversion, in a file that imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

TARGETS = (
    "softmax",
    "diff_v1",
    "diff_v2",
    "diff_gda",
    "diff_gda_v2",
    "dex",
    "diffllama",
    "motif",
    "reference",
    "llama",
)
NOISE = ("copy", "perturbed")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """The options of :func:`diffattn.convert.convert.convert`; those that are None are left to the target."""

    to: str | None = field(default=None, metadata={"choices": TARGETS})
    """Kind of model to make. Default: diff_v1 of diffllama, diff_v1 or diff_gda of Motif, softmax of Llama, the same
    version of the authors' own models."""
    noise: str | None = field(default=None, metadata={"choices": NOISE})
    """Start of the second map, only with --to diff_v2. copy: the model computes the same as before. perturbed: the
    second map is changed a little, as a start for training. Default: copy."""
    noise_std: float | None = None
    """Size of the change, as a share of the spread of the weights, only with --noise perturbed. Default: 0.1."""
    seed: int | None = None
    """Random seed for the change, only with --noise perturbed. Default: 0."""
    chat_template: Path | None = None
    """File of a chat template (Jinja) for the model's tokenizer, in place of its own: generate and serve use it."""
    dex_heads: str | None = None
    """Heads that subtract, only with --to dex: 0,2 names them for all layers, and 0,2/1/ for each of three layers.
    Default: all."""
