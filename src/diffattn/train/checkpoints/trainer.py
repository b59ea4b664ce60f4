"""The Trainer of ``transformers`` with our checkpoints in place of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer, TrainerState

from diffattn.train.callbacks import Interruption, MetricsFile, diverged
from diffattn.train.checkpoints.loading import load, load_random_state
from diffattn.train.checkpoints.saving import Saver
from diffattn.train.checkpoints.sealing import checkpoints
from diffattn.train.checkpoints.state import TRAINER, own_part


class SavingTrainer(Trainer):
    """The library's Trainer with checkpoints that are written in the background and sealed before they appear.

    Args:
        folder: the folder of the run.
        keep: the number of checkpoints that are kept.
        interruption: what holds Ctrl-C back while a checkpoint is begun.
        others: the arguments of the library's Trainer.
    """

    def __init__(self, folder: Path, keep: int, interruption: Interruption, **others: Any) -> None:
        super().__init__(**others)
        self._folder, self._keep, self._interruption = folder, keep, interruption
        self._saver: Saver | None = None

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        shielded = self._interruption.shielded
        self._interruption.shield()
        if not all(bool(own_part(weight).isfinite().all()) for weight in self.model.parameters()):
            raise diverged(f"after step {self.state.global_step} a weight is infinite or NaN")
        if self._saver is None:
            self._saver = Saver(
                self._folder, self.model, self._own_optimizer(), scheduler=self.lr_scheduler, keep=self._keep
            )
        self._saver.save(self.state.global_step, {TRAINER: dataclasses.asdict(self.state)})
        if not shielded:
            self._interruption.lower()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._saver is not None:
            self._saver.check()
        return super().training_step(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        # The weights are read with the optimizer, once it is there.
        pass

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load(Path(checkpoint), self.model, self._own_optimizer(), scheduler=self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random_state(Path(checkpoint), self.args.device)

    def _own_optimizer(self) -> torch.optim.Optimizer:
        """PyTorch's optimizer, which the library has put into a wrapper of its own."""
        optimizer = self.optimizer
        return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer

    def restore(self, checkpoint: Path, metrics: MetricsFile) -> None:
        """Measure the held-out loss where the run was cut between saving and measuring; load the weights for it."""
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER))
        step, last = self.state.global_step, self.args.max_steps
        due = self.args.eval_strategy == "steps" and (step % self.args.eval_steps == 0 or step == last)
        missing = due and not metrics.held_out(step)
        if missing or step == last:
            load(checkpoint, self.model)
        if missing:
            self.evaluate()

    def saved(self) -> None:
        """Wait until the checkpoint that was begun is complete."""
        if self._saver is not None:
            self._saver.wait()

    def save_now(self) -> None:
        """A checkpoint of the last complete step, unless there is one."""
        self.saved()
        done = [step for step, _ in checkpoints(self._folder)]
        if self.state.global_step and self.state.global_step not in done:
            self._save_checkpoint(self.model, trial=None)
            self.saved()

    def close(self) -> None:
        """Complete the checkpoint that was begun, however the run ends."""
        if self._saver is not None:
            self._saver.close()
