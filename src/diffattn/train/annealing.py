"""The schedule of DEX: λ moves from a constant to what is learned while a model is trained."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from diffattn.model.modeling import DexProjection


class DexAnnealing(TrainerCallback):
    """Moves λ of DEX from its schedule by depth to its learned value: ``annealed`` rises linearly to 1.

    Let ``a₀`` be the value that the model began with and T the share ``fraction`` of the steps. The value in step t,
    from 0, and in measurements and checkpoints after t steps is ``a₀ + (1 − a₀) · min(1, t/T)``. It depends only on the
    number of the step, so a resumed run has it exactly. Source: arXiv 2505.16333; the length is our choice.
    """

    def __init__(self, model: nn.Module, *, steps: int, fraction: float) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, DexProjection)]
        self.starts = [layer.annealed.item() for layer in self.layers]
        self.until = steps * fraction

    def share(self, step: int) -> float:
        """The share of the way that is done after this many steps."""
        return min(1.0, step / self.until) if self.until else 1.0

    def _set(self, step: int) -> None:
        share = self.share(step)
        for layer, start in zip(self.layers, self.starts, strict=True):
            layer.annealed.fill_(start + (1.0 - start) * share)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._set(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._set(state.global_step)
