"""Runs one training: takes a model, prepared text and a recipe; writes metrics, checkpoints and the trained model."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset

from diffattn.data.blocks import ValidationBlocks
from diffattn.data.packing import PreparedData
from diffattn.errors import ConfigError
from diffattn.files import file_facts, whole_folder, writable_folder, write_json
from diffattn.folders import RUN, holds_model_of_ours, own_folder
from diffattn.model.modeling import DiffTransformerLanguageModel
from diffattn.model.sharding import mesh_sizes, whole_model
from diffattn.model.trained import Trained, write_trained
from diffattn.progress import OnStage, Stage, unseen
from diffattn.sealed import sealed
from diffattn.train.callbacks import (
    DexAnnealing,
    Interruption,
    MetricsFile,
    MetricsRow,
    Progress,
    RunCallback,
    peak_tokens_per_second,
    read_metrics,
    warn,
)
from diffattn.train.checkpoints.sealing import last_good, prune
from diffattn.train.lock import held
from diffattn.train.masked import HELD_OUT, MaskedSamples
from diffattn.train.options import TrainOptions
from diffattn.train.recipe import CAUSAL, MASKED, Recipe
from diffattn.train.record import Claim, TrainResult, check_claim, kept_rows, read_result
from diffattn.train.spread.layout import Layout
from diffattn.train.spread.ranks import Ranks, joined
from diffattn.train.trackers.callback import Trackers, check_trackers
from diffattn.train.trainer import RankPart, RunTrainer, spread


def train(
    model: DiffTransformerLanguageModel,
    data: PreparedData,
    recipe: Recipe,
    out: str | Path,
    *,
    source: dict[str, str] | None = None,
    options: Mapping[str, object] | None = None,
    track: Sequence[str] = TrainOptions.track,
    layout: Layout | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    on_stage: OnStage = unseen,
) -> TrainResult:
    """Trains ``model`` on ``data`` and writes the folder ``out``.

    The folder holds ``config.json`` (recipe, model, data), ``metrics.jsonl`` (a row per step), ``checkpoint-N``
    (sealed with a manifest), ``model`` (``save_pretrained``) and ``result.json``. A run that was cut off at any moment
    and is resumed has exactly the losses of an uninterrupted one; a finished run is not trained again. All these files
    have seals (``diffattn.sealed``), so a number that was changed in one of them is an error. While a process trains,
    the folder is locked (``diffattn.train.lock``).

    In a process that torchrun has started, all ranks call this alike and train one model together, as one process
    would: rank 0 alone writes the folder and calls ``on_progress`` and ``on_stage``.

    Args:
        model: a model with float32 weights, trained in place; ``recipe.dtype`` is the dtype of its matrix products.
        data: the result of :func:`diffattn.data.packing.prepare_data`.
        recipe: the settings of the run.
        out: the run folder: new, empty, or that of a run; without ``resume`` it must not hold a run.
        source: the origin of a pretrained model: its ``folder``, and the ``digest`` of its weights, so that a run is
            resumed with the same model. The held-out loss is then also measured before the first step.
        options: the options beside the recipe that a resumed run needs, kept in ``config.json``; see
            ``train/resume.py``.
        track: the trackers that get the metrics too; see :class:`diffattn.train.options.TrainOptions`.
        layout: how the run is spread over ranks and computed, which changes no result. Default: ``Layout()``.
        resume: continue from the last good checkpoint in ``out``, or start if there is none.
        on_progress: called after each step.
        on_stage: called with each stage of the work beside the steps.

    Raises:
        ConfigError: ``out`` holds a run already, or something else, is being trained by another process, or cannot be
            written; or the attention function is unknown or not installed.
        CheckpointError: a file of the run in ``out`` is damaged, cut short, or was changed after it was written.
        TrainingError: the loss is not a number, or the disk is full; the last good checkpoint is kept.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the steps so far were saved.
    """
    _use_attention(model, recipe.attn_implementation)
    check_trackers(track)
    if model.config.is_causal == (recipe.objective == MASKED):
        raise ConfigError(
            f"objective is {recipe.objective!r}, and the model has is_causal={model.config.is_causal}",
            f"{CAUSAL} for a model that writes text, {MASKED} for an encoder",
            "change --objective",
        )
    recipe, layout = recipe.resolved(), layout or Layout()
    claim: Claim = {"recipe": recipe.to_dict(), "model": model.config.to_diff_dict(), "data": data.facts}
    more: dict[str, Mapping[str, object] | None] = {"source": source, "options": options}
    claim |= {part: values for part, values in more.items() if values is not None}
    with joined(recipe.device, recipe.to_dict() | layout.to_dict()) as ranks:
        layout.check(ranks.world, recipe.batch_size)
        mesh_sizes(ranks.world, shard=layout.shard, tensor=layout.tensor_parallel, per_host=ranks.rank.per_host)
        model.config.check_tensor_parallel(layout.tensor_parallel)
        if ranks.is_first:
            folder = writable_folder(own_folder(out, RUN))
        else:
            folder, on_progress, on_stage = Path(out), None, unseen
        with held(folder) if ranks.is_first else contextlib.nullcontext():
            return _train(model, data, recipe, folder, claim, layout, ranks, track, resume, on_progress, on_stage)


def _train(
    model: DiffTransformerLanguageModel,
    data: PreparedData,
    recipe: Recipe,
    folder: Path,
    claim: Claim,
    layout: Layout,
    ranks: Ranks,
    track: Sequence[str],
    resume: bool,
    on_progress: Callable[[Progress], None] | None,
    on_stage: OnStage,
) -> TrainResult:
    """Runs the training in a folder that is locked for these ranks."""

    def begin() -> tuple[dict[str, Any] | None, str | None]:
        """Returns the result of a finished run, or else the checkpoint that it goes on from."""
        check_new(folder, resume)
        if not (folder / "config.json").exists():
            write_json(folder / "config.json", sealed(claim))
        check_claim(folder, claim)
        finished = read_result(folder)
        if finished is not None:
            return finished.numbers(), None
        start, skipped = last_good(folder)
        for line in skipped:
            warn(f"{folder}: {line}")
        return None, None if start is None else start[1].name

    finished, found = ranks.share(begin)
    if finished is not None:
        return TrainResult(folder, **finished)
    on_stage(Stage("getting ready for the first step"))
    start = None if found is None else (int(found.rpartition("-")[2]), folder / found)
    step = start[0] if start else 0
    metrics = MetricsFile(folder / "metrics.jsonl", kept=kept_rows(start), written=ranks.is_first)
    together = recipe.batch_size * recipe.gradient_accumulation
    order = data.order(seed=recipe.seed, num_samples=recipe.steps * together, batch_size=together)
    validation: Dataset[dict[str, Tensor]] = ValidationBlocks(data.validation)
    if recipe.objective == MASKED:
        order = MaskedSamples(order, data.tokenizer, seed=recipe.seed)
        validation = MaskedSamples(validation, data.tokenizer, seed=HELD_OUT)
    some = Subset(validation, range(min(len(data.validation), recipe.evaluation_blocks)))
    part, parts = spread(model, recipe, layout, ranks)
    with Interruption(ranks) as interruption, Trackers(track, folder, metrics) as trackers:
        callback = RunCallback(
            metrics,
            interruption,
            tokens_per_step=recipe.tokens_per_step(data.train.context),
            validation_blocks=len(some),
            peak_tokens_per_second=peak_tokens_per_second(model.config, recipe, data.train.context),
            on_progress=on_progress,
            on_stage=on_stage,
        )
        annealing = DexAnnealing(model, steps=recipe.steps, fraction=recipe.anneal_fraction)
        trainer = RunTrainer(
            model,
            recipe,
            folder,
            RankPart(order, recipe.batch_size, part, parts),
            some,
            interruption,
            [callback, annealing, trackers],
            ranks=ranks,
            part=(part, parts),
        )
        try:
            if start is not None:
                trainer.restore(start[1], metrics)
            elif "source" in claim and recipe.evaluations:
                trainer.evaluate()
            if step < recipe.steps:
                trainer.train(resume_from_checkpoint=str(start[1]) if start else None)
            callback.validation_blocks = len(data.validation)
            # The last step already has its scheduled measurement. Run the final one on all blocks unless an interrupted
            # run did so.
            if len(metrics.held_out(recipe.steps)) == min(1, recipe.evaluations):
                trainer.evaluate(validation)
            trainer.saved()
        except KeyboardInterrupt:
            interruption.shield()
            trainer.save_now()
            raise
        finally:
            trainer.close()
            metrics.close()
        interruption.shield()
        on_stage(Stage("saving the model"))
        whole = whole_model(model)

        def finish() -> dict[str, Any]:
            assert whole is not None
            result = _finish(folder, whole, data, metrics.held_out(recipe.steps)[-1], continued="source" in claim)
            prune(folder, 1)
            return result.numbers()

        result = TrainResult(folder, **ranks.share(finish))
        interruption.lower()
    return result


def speed(rows: Sequence[MetricsRow]) -> float:
    """The training tokens per second in rows of metrics: the median over the steps, without the first ones."""
    steps = [row for row in rows if "loss" in row]
    if len(steps) < 2:
        return steps[0]["tokens"] / steps[0]["seconds"] if steps else math.nan
    pairs = list(itertools.pairwise(steps))
    settled = pairs[min(5, len(pairs) - 1) :]
    return statistics.median(
        (after["tokens"] - before["tokens"]) / max(after["seconds"] - before["seconds"], 1e-4)
        for before, after in settled
    )


def _use_attention(model: DiffTransformerLanguageModel, name: str) -> None:
    """Sets the attention function that serves the layer's one call."""
    if name == "auto":
        return
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"attn_implementation is {name!r} ({str(error).splitlines()[0]})",
            "an attention function that is installed",
            "choose another, or auto",
        ) from error


def check_new(folder: Path, resume: bool) -> None:
    """Raises if a folder holds a run that is not to be resumed, or other files where the trained model is written."""
    if (folder / "config.json").exists() and not resume:
        raise ConfigError(
            f"{folder} holds a run already", "a new folder", "continue it with --resume or choose another --out"
        )
    model = folder / "model"
    if os.path.lexists(model) and not holds_model_of_ours(model):
        raise ConfigError(
            f"{model} holds files that no run wrote", "an empty folder for the trained model", "move them away"
        )


def _finish(
    folder: Path, model: DiffTransformerLanguageModel, data: PreparedData, val_loss: float, *, continued: bool
) -> TrainResult:
    rows = read_metrics(folder / "metrics.jsonl")
    trained = Trained(
        attention=model.config.attention,
        parameters=model.num_parameters(),
        vocab_size=model.config.vocab_size,
        steps=rows[-1]["step"],
        tokens=rows[-1]["tokens"],
        val_loss=val_loss,
        continued=continued,
    )
    # Classifiers of several texts, and the library's batches of prompts, ask the configuration for it.
    if model.config.pad_token_id is None:
        model.config.pad_token_id = data.tokenizer.pad_token_id
    with whole_folder(folder / "model", replaces=holds_model_of_ours) as target:
        model.save_pretrained(target)
        data.tokenizer.save_pretrained(target)
        write_trained(target, trained)
    result = TrainResult(
        folder,
        val_loss=val_loss,
        # The loss of some tokens says nothing of a text's bytes.
        bits_per_byte=val_loss / math.log(2) / data.validation_bytes_per_token if model.config.is_causal else None,
        train_tokens_per_second=speed(rows),
    )
    files = [folder / "config.json", folder / "metrics.jsonl", *sorted((folder / "model").rglob("*"))]
    write_json(
        folder / "result.json",
        sealed(
            {
                "val_loss": result.val_loss,
                "bits_per_byte": result.bits_per_byte,
                "train_tokens_per_second": result.train_tokens_per_second,
                "files": {str(file.relative_to(folder)): file_facts(file) for file in files if file.is_file()},
            }
        ),
    )
    return result
