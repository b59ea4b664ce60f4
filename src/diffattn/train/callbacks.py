"""The work of a run beside the optimizer: rows of metrics, a diverged run, Ctrl-C, the live line, λ of DEX."""

from __future__ import annotations

import atexit
import gc
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Required, TypedDict, TypeGuard

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from diffattn.config_fields import is_count, is_measure
from diffattn.errors import TrainingError
from diffattn.files import explained, parse_json, write_text
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DexProjection
from diffattn.names import SHORT_DTYPES
from diffattn.plan.cost import flops_per_token
from diffattn.plan.hardware import card_flops
from diffattn.progress import OnStage, Stage
from diffattn.train.recipe import Recipe
from diffattn.train.spread.ranks import ALONE, Ranks
from diffattn.variants import VARIANTS


@dataclass(frozen=True)
class Progress:
    """One step, as it is shown while training."""

    step: int
    """The number of the step, from 1."""
    steps: int
    """The steps of the whole run."""
    loss: float
    """The training loss in nats per token."""
    tokens_per_second: float
    """An estimate from the last 20 steps."""
    seconds_left: float
    """An estimate of the seconds until the last step."""
    mfu: float | None = None
    """Model FLOPs utilization, an estimate from the last 20 steps: the share of the peak rate of all GPUs that the
    model FLOPs take. None where the peak is not known."""


class MetricsRow(TypedDict, total=False):
    """A row of ``metrics.jsonl``: the loss of a step, or a measurement of the held-out loss."""

    step: Required[int]
    tokens: Required[int]
    """Training tokens so far."""
    seconds: Required[float]
    """Seconds of training so far, without the measurements."""
    loss: float
    """The training loss of the step, in nats per token."""
    grad_norm: float
    learning_rate: float
    val_loss: float
    """The held-out loss, in nats per token."""
    val_blocks: int
    """The number of held-out blocks that it was measured on."""
    mfu: float
    """Model FLOPs utilization of the step, 0 to 1; only where the peak rate of the machine is known."""


class Interruption:
    """Ends a run on Ctrl-C or SIGTERM at once, but never between an optimizer step and its row of metrics.

    Inside ``with``, a signal raises KeyboardInterrupt; while shielded, it is raised as soon as the shield is lowered.
    Several ranks are always shielded, and end together where they agree that one of them has had a signal.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.shielded = ranks.world > 1
        self._pending = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Whoever started the ranks ends all when one has failed, and the others still have to say why they end.
        failed = self.ranks.world > 1 and kind not in (None, KeyboardInterrupt)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if failed else handler)
        if kind is KeyboardInterrupt:
            # Without this the ending process searches all objects of the libraries for cycles, for more than a second.
            atexit.register(gc.freeze)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.shielded:
            self._pending = True
        else:
            raise KeyboardInterrupt

    def shield(self) -> None:
        self.shielded = True

    def lower(self) -> None:
        self.shielded = self.ranks.world > 1
        if self.ranks.any(self._pending):
            self._pending = False
            raise KeyboardInterrupt

    def agree(self) -> None:
        """Ends several ranks together if one of them has had a signal; one process ends by itself."""
        if self.ranks.world > 1:
            self.lower()


class MetricsFile:
    """The file ``metrics.jsonl`` with a row per step and a row per measurement of the held-out loss.

    Args:
        path: the file.
        kept: the rows that it begins with.
        written: False on the ranks that know the rows and leave the file to rank 0.
    """

    def __init__(self, path: Path, *, kept: list[MetricsRow], written: bool = True) -> None:
        self.path = path
        self.rows = kept
        self._stream: IO[str] | None = None
        if written:
            write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
            self._stream = path.open("a", encoding="utf-8")

    def append(self, row: MetricsRow) -> None:
        self.rows.append(row)
        if self._stream is None:
            return
        with explained(self.path):
            self._stream.write(json.dumps(row) + "\n")
            self._stream.flush()

    def held_out(self, step: int) -> list[float]:
        """The held-out losses that were measured at a step, in order."""
        return [row["val_loss"] for row in self.rows if row["step"] == step and "val_loss" in row]

    def close(self) -> None:
        # Closing writes the rest of the buffer, which a full disk may have refused before.
        if self._stream is None:
            return
        with explained(self.path):
            self._stream.close()


def read_metrics(path: Path) -> list[MetricsRow]:
    """Reads the rows of a ``metrics.jsonl`` up to the first that is torn or damaged; a missing file has no rows."""
    return parse_metrics(path.read_bytes()) if path.is_file() else []


def parse_metrics(content: bytes) -> list[MetricsRow]:
    """Returns the rows up to the first that is torn, or that a run did not write."""
    rows = []
    # A complete file ends with a newline, so after the last newline stands a torn row or nothing.
    for line in content.split(b"\n")[:-1]:
        try:
            row = parse_json(line)
        except ValueError:
            break
        if not _is_row(row):
            break
        rows.append(row)
    return rows


def _is_row(row: object) -> TypeGuard[MetricsRow]:
    if not isinstance(row, dict) or not ("loss" in row or "val_loss" in row):
        return False
    counts = [row.get("step"), row.get("tokens"), row.get("val_blocks", 0)]
    measures = [row.get("seconds"), *(row[name] for name in ("loss", "val_loss", "grad_norm", "mfu") if name in row)]
    return all(is_count(value) for value in counts) and all(is_measure(value) for value in measures)


class RunCallback(TrainerCallback):
    """Writes the metrics, stops at a loss that is no number, delays signals in an optimizer step, reports progress."""

    def __init__(
        self,
        metrics: MetricsFile,
        interruption: Interruption,
        *,
        tokens_per_step: int,
        validation_blocks: int,
        peak_tokens_per_second: float | None,
        on_progress: Callable[[Progress], None] | None,
        on_stage: OnStage,
    ) -> None:
        self.metrics = metrics
        self.interruption = interruption
        self.tokens_per_step = tokens_per_step
        self.validation_blocks = validation_blocks
        self.peak_tokens_per_second = peak_tokens_per_second
        self.on_progress = on_progress
        self.on_stage = on_stage
        self._measured = 0
        self.seconds = next((row["seconds"] for row in reversed(metrics.rows)), 0.0)
        self._recent: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.interruption.shield()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        took = time.perf_counter() - self._began
        self.seconds += took
        self._recent = [*self._recent[-19:], took]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        # The Trainer would write all rows so far into each checkpoint; we keep them in metrics.jsonl.
        state.log_history.clear()
        if not logs or "loss" not in logs:
            return
        step, loss, norm = state.global_step, logs["loss"], logs.get("grad_norm", 0.0)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise diverged(f"the loss at step {step} is {loss} (gradient norm {norm})")
        row: MetricsRow = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "seconds": round(self.seconds, 4),
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": logs["learning_rate"],
        }
        if (mfu := self._mfu(self._recent[-1])) is not None:
            row["mfu"] = round(mfu, 6)
        self.metrics.append(row)
        if self.on_progress is not None:
            pace = sum(self._recent) / len(self._recent)
            left = (state.max_steps - step) * pace
            rate = self.tokens_per_step / pace
            self.on_progress(Progress(step, state.max_steps, loss, rate, left, self._mfu(pace)))
        self.interruption.lower()

    def _mfu(self, seconds: float) -> float | None:
        """Returns the model FLOPs utilization of a step that takes so long."""
        peak = self.peak_tokens_per_second
        return None if peak is None else self.tokens_per_step / seconds / peak

    def on_prediction_step(self, args: Any, state: Any, control: Any, *, eval_dataloader: Any, **kwargs: Any) -> None:
        self._measured += 1
        self.on_stage(Stage("measuring the held-out loss", self._measured, len(eval_dataloader)))
        self.interruption.agree()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        self._measured = 0
        if not math.isfinite(metrics["eval_loss"]):
            raise diverged(f"the held-out loss at step {state.global_step} is {metrics['eval_loss']}")
        self.metrics.append(
            {
                "step": state.global_step,
                "tokens": state.global_step * self.tokens_per_step,
                "seconds": round(self.seconds, 4),
                "val_loss": metrics["eval_loss"],
                "val_blocks": self.validation_blocks,
            }
        )


def peak_tokens_per_second(config: DiffTransformerConfig, recipe: Recipe, context: int) -> float | None:
    """Returns the tokens per second at which the model FLOPs take the peak rate of all ranks; None: it is not known."""
    peak = card_flops(torch.cuda.get_device_name()) if recipe.device == "cuda" else None
    # The FLOPs of DEX are not counted anywhere.
    if peak is None or config.attention not in VARIANTS:
        return None
    long = {name: rate for short, name in SHORT_DTYPES.items() if (rate := peak.get(short)) is not None}
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    flops = flops_per_token(config.shape(), config.attention, context=context, causal=config.is_causal)
    return ranks * long[recipe.dtype] / flops.model


def diverged(what: str) -> TrainingError:
    """Returns the error that ends a run whose loss or weights are no numbers any more."""
    return TrainingError(
        what, "a finite number", "start again with a lower --learning-rate or more warmup; the last checkpoint is kept"
    )


def warn(line: str) -> None:
    """Prints a line to stderr that the user should see."""
    print(line, file=sys.stderr)


def quiet() -> None:
    """Keeps the libraries from showing bars and warnings of their own."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


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
        """Returns the share of the way that is done after this many steps."""
        return min(1.0, step / self.until) if self.until else 1.0

    def _set(self, step: int) -> None:
        share = self.share(step)
        for layer, start in zip(self.layers, self.starts, strict=True):
            layer.annealed.fill_(start + (1.0 - start) * share)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._set(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._set(state.global_step)
