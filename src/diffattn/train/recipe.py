"""How a model is trained, as one dataclass that is written into every run folder."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from diffattn.errors import ConfigError
from diffattn.ops.half import multiplies

DTYPES = ("auto", "float32", "bfloat16")
MOST = 10**9
"""Of every count: more steps than anybody trains, and few enough that their products are exact everywhere."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of one training run; the same recipe trains every variant of a pair.

    AdamW with a linear warmup, a linear decay to zero and clipped gradients, as in arXiv 2410.05258, appendix D; the
    learning rate and batch are those of small models.

    >>> Recipe(steps=10).tokens_per_step(context=256)
    1024
    """

    steps: int = 300
    """Optimizer steps."""
    batch_size: int = 4
    """Blocks of ``context`` tokens in one forward pass."""
    gradient_accumulation: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 2e-3
    """Peak of the schedule."""
    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rate rises; at least one step is left to the decay."""
    weight_decay: float = 0.1
    """Of matrices; the gains of norms and the λ vectors are not decayed."""
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    seed: int = 0
    """Of the initial values and of the order of the training blocks."""
    dtype: str = "auto"
    """``float32``, ``bfloat16`` (autocast over float32 weights), or ``auto``: bfloat16 where the machine multiplies it
    in hardware, else float32."""
    device: str = "auto"
    """``cpu``, ``cuda``, or ``auto``: cuda where there is one."""
    attn_implementation: str = "auto"
    """The attention function of ``transformers`` that serves the layer's one call; ``auto`` leaves the model's own:
    ``diff_fused`` in a differential model, ``sdpa`` in a softmax one, unless it was built with another."""
    evaluations: int = 4
    """Times that the held-out loss is measured while training, at equal distances."""
    evaluation_blocks: int = 128
    """Held-out blocks of each of those measurements; the last one, after training, takes all."""
    anneal_fraction: float = 0.5
    """DEX alone: share of the steps in which λ moves from the schedule by depth to what is learned."""
    checkpoints: int = 4
    """Times that a checkpoint is written while training."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept; older ones are removed."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "evaluation_blocks", "checkpoints",
                     "keep_checkpoints"):  # fmt: skip
            _check(name, getattr(self, name), isinstance(getattr(self, name), int) and 1 <= getattr(self, name) <= MOST,
                   f"a whole number of at least 1 and at most {MOST:,}")  # fmt: skip
        _check("evaluations", self.evaluations, isinstance(self.evaluations, int) and 0 <= self.evaluations <= MOST,
               f"a whole number, 0 to {MOST:,}")  # fmt: skip
        _check("seed", self.seed, isinstance(self.seed, int) and 0 <= self.seed < 2**31,
               "a whole number, 0 to 2147483647")  # fmt: skip
        _check("learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "a finite number above 0")
        _check("warmup_fraction", self.warmup_fraction, 0 <= self.warmup_fraction < 1, "0 or more, below 1")
        _check("anneal_fraction", self.anneal_fraction, 0 <= self.anneal_fraction <= 1, "0 to 1")
        for name in ("weight_decay", "max_grad_norm"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "a finite number, 0 or more")
        for name in ("beta1", "beta2"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) < 1, "0 or more, below 1")
        _check("dtype", self.dtype, self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        _check("device", self.device, self.device in ("auto", "cpu", "cuda"), "one of auto, cpu, cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is 'cuda'; this machine or this build of torch has none: use --device cpu")

    def resolved(self) -> Recipe:
        """The same recipe with ``auto`` replaced by what this machine does best."""
        device = self.device if self.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = self.dtype if self.dtype != "auto" else ("bfloat16" if fast_bfloat16(device) else "float32")
        return dataclasses.replace(self, device=device, dtype=dtype)

    def tokens_per_step(self, context: int) -> int:
        """Training tokens of one optimizer step."""
        return self.batch_size * self.gradient_accumulation * context

    def to_dict(self) -> dict[str, Any]:
        """All fields, for ``config.json``."""
        return dataclasses.asdict(self)


def fast_bfloat16(device: str) -> bool:
    """Whether the machine multiplies bfloat16 in hardware: CUDA with bfloat16, or a CPU with AMX or AVX512-BF16."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return multiplies(torch.bfloat16)


def _check(name: str, given: object, good: bool, wanted: str) -> None:
    if not good:
        raise ConfigError(f"{name} is {given!r}; wanted {wanted}: change --{name.replace('_', '-')}")
