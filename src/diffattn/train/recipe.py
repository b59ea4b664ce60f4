"""The settings of a training run, as one dataclass that is written into every run folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from diffattn.errors import ConfigError
from diffattn.model.options import Device, Dtype

DTYPES, DEVICES = get_args(Dtype), get_args(Device)
CAUSAL, MASKED = "clm", "mlm"
OBJECTIVES = (CAUSAL, MASKED)
MOST = 10**9
"""The largest count: more steps than anybody trains, and few enough that their products are exact everywhere."""
# Fields that have no option of the command line: they are the same in every run that it starts.
_NO_OPTION: Mapping[str, object] = {"option": None}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of one training run; the same recipe trains every variant of a pair.

    AdamW with a linear warmup, a linear decay to zero and clipped gradients, as in arXiv 2410.05258, appendix D; the
    learning rate and batch are those of small models. The file imports torch only where the machine is asked, so that
    the command line can read the fields without it.

    >>> Recipe(steps=10).tokens_per_step(context=256)
    1024
    """

    steps: int = 300
    """Number of updates of the weights (optimizer steps)."""
    batch_size: int = 4
    """Blocks of ``context`` tokens in each forward pass, of all processes together."""
    gradient_accumulation: int = 1
    """Forward passes in each step."""
    learning_rate: float = 2e-3
    """Highest learning rate of the run."""
    warmup_fraction: float = 0.05
    """Share of the steps, 0 to 1, in which the learning rate rises; at least one step is left to the decay."""
    weight_decay: float = 0.1
    """Weight decay of the optimizer, AdamW. It acts on matrices, and not on the gains of norms or the λ vectors."""
    beta1: float = field(default=0.9, metadata=_NO_OPTION)
    """Decay rate of AdamW's mean of the gradients."""
    beta2: float = field(default=0.95, metadata=_NO_OPTION)
    """Decay rate of AdamW's mean of the squared gradients."""
    max_grad_norm: float = field(default=1.0, metadata=_NO_OPTION)
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    seed: int = 0
    """Random seed for the initial values and for the order of the text."""
    dtype: str = field(default="auto", metadata={"choices": DTYPES})
    """Number format of the matrix products; the weights stay float32. auto: bfloat16 where the machine multiplies it
    fast, else float32."""
    device: str = field(default="auto", metadata={"choices": DEVICES})
    """Device to train on: the processor (cpu) or a GPU (cuda); auto takes the GPU where there is one."""
    attn_implementation: str = field(default="auto", metadata=_NO_OPTION)
    """The attention function of ``transformers`` that serves the layer's one call; ``auto`` leaves the model's own:
    ``diff_fused`` in a differential model, ``sdpa`` in a softmax one, unless it was built with another."""
    objective: str = field(default=CAUSAL, metadata={"choices": OBJECTIVES})
    """Task that the model learns. clm: to name each token from those before it. mlm: an encoder, whose tokens see both
    sides, learns to name 15% of the tokens, most of which are hidden from it."""
    evaluations: int = 4
    """Times that the held-out loss is measured over the run, at equal distances."""
    evaluation_blocks: int = field(default=128, metadata=_NO_OPTION)
    """Held-out blocks of each of those measurements; the last one, after training, takes all."""
    anneal_fraction: float = 0.5
    """Share of the steps, 0 to 1, in which the λ of a DEX model moves to its learned value."""
    checkpoints: int = 4
    """Checkpoints that are written over the run."""
    keep_checkpoints: int = field(default=2, metadata=_NO_OPTION)
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
        _check("objective", self.objective, self.objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}")
        _check("device", self.device, self.device in DEVICES, f"one of {', '.join(DEVICES)}")
        if self.device == "cuda" and not _has_cuda():
            raise ConfigError("device is 'cuda'", "a GPU that this build of torch can use", "pass --device cpu")

    def resolved(self) -> Recipe:
        """Returns the recipe with ``auto`` replaced by what this machine does best."""
        device = self.device if self.device != "auto" else ("cuda" if _has_cuda() else "cpu")
        dtype = self.dtype if self.dtype != "auto" else ("bfloat16" if fast_bfloat16(device) else "float32")
        return dataclasses.replace(self, device=device, dtype=dtype)

    def tokens_per_step(self, context: int) -> int:
        """The training tokens of one optimizer step."""
        return self.batch_size * self.gradient_accumulation * context

    def to_dict(self) -> dict[str, object]:
        """Returns all fields, for ``config.json``; without the objective that every run had before there were two."""
        fields = dataclasses.asdict(self)
        if self.objective == CAUSAL:
            del fields["objective"]
        return fields


def fast_bfloat16(device: str) -> bool:
    """Returns whether the machine multiplies bfloat16 in hardware: such a GPU, or a CPU with AMX or AVX512-BF16."""
    import torch

    from diffattn.ops.half import multiplies

    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return multiplies(torch.bfloat16)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _check(name: str, given: object, good: bool, wanted: str) -> None:
    if not good:
        raise ConfigError(f"{name} is {given!r}", wanted, f"change --{name.replace('_', '-')}")
