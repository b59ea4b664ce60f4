"""The main job: trains a DIFF Transformer and the softmax Transformer that it replaces, and says what was gained.

Every variant starts from its twin's initial values, sees the same blocks in the same order, and is measured on the
same held-out documents; the claim is the paired difference over seeds, with its interval.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from diffattn.data.packing import PreparedData, prepare_data
from diffattn.errors import ConfigError
from diffattn.files import write_json, write_text
from diffattn.folders import COMPARISON, own_folder
from diffattn.intervals import pairs
from diffattn.machine import Provenance
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.fused import serving_backend
from diffattn.model.heads.language import language_class
from diffattn.model.modeling import DiffTransformerLanguageModel
from diffattn.model.pairing import build_pair, pair_config
from diffattn.plan.cost import cache_bytes_per_token, count_parameters, flops_per_token
from diffattn.plan.named_model import load_shape
from diffattn.plan.shape import ModelShape
from diffattn.probes.lens import attention_maps, token_labels
from diffattn.progress import OnStage, Stage, unseen
from diffattn.rank import rank_here
from diffattn.report.compare_page import render_compare, render_picture
from diffattn.results.comparison import ComparisonResult, CurvePoint, LossCurve, VariantResult
from diffattn.results.maps import HeadMaps
from diffattn.study.comparison import RunPlan, Stored
from diffattn.study.options import CompareOptions
from diffattn.train.callbacks import Progress, read_metrics
from diffattn.train.masked import with_mask
from diffattn.train.measure import LoadCost, StepCost, measure_load, measure_step
from diffattn.train.own import same_shape, same_text
from diffattn.train.recipe import CAUSAL
from diffattn.train.record import NO_SEAL, TrainResult
from diffattn.train.run import train
from diffattn.train.single import check_context, folder_of_ranks, trained_rows
from diffattn.train.spread.layout import Layout
from diffattn.train.spread.ranks import Ranks, joined
from diffattn.train.trackers.callback import check_trackers
from diffattn.variants import VARIANTS

DEFAULT_STEPS = 250
"""The steps of each run, where neither ``steps`` nor ``minutes`` is given."""
DEFAULT_MINUTES = 6.0
"""The minutes of all runs together, beyond which there are fewer than ``DEFAULT_STEPS``."""


class _Study:
    """The parts of a comparison that its steps share."""

    def __init__(self, options: CompareOptions, folder: Path, shape: ModelShape, layout: Layout, ranks: Ranks) -> None:
        self.options, self.layout, self.ranks = options, layout, ranks
        self.folder = folder
        self.shape = shape
        self.causal = options.objective == CAUSAL
        for attention in options.variants:
            # Refuses what cannot be built before anything is read or written.
            config = pair_config(self.shape, attention, match=options.match)
            config.check_tensor_parallel(layout.tensor_parallel)
        self.context = check_context(self.shape, options.context)
        self.track = check_trackers(options.track)

    def build(self, attention: str, seed: int) -> DiffTransformerLanguageModel:
        return build_pair(self.shape, attention, seed=seed, match=self.options.match, is_causal=self.causal).model

    def run_folder(self, attention: str, seed: int) -> Path:
        return self.folder / f"{attention}-seed{seed}"


def compare(
    options: CompareOptions | None = None,
    *,
    out: str | Path,
    layout: Layout | None = None,
    resume: bool = False,
    command: str = "diffattn.compare(...)",
    on_note: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[str, int, Progress], None] = lambda attention, seed, progress: None,
    on_stage: OnStage = unseen,
) -> ComparisonResult:
    """Trains every variant over every seed, measures, and writes ``result.json`` and ``report.html`` into ``out``.

    On several ranks all call this alike and train each model together, one after another; rank 0 alone writes and calls
    ``on_note``, ``on_progress`` and ``on_stage``. Seconds and bytes of a step are those of rank 0 within such a step.

    Args:
        options: what to compare; default: the main job.
        out: the run folder; it must not hold a run unless ``resume``.
        layout: how each run is spread over ranks and computed, which changes no result. Default: ``Layout()``, or with
            ``resume`` that of before, as far as the number of ranks allows.
        resume: continue what ``out`` holds with the options that it was started with.
        command: the command that made the result, to be named in it.
        on_note: called with a line about what happens next.
        on_progress: called with the variant, the seed and the step.
        on_stage: called with what is done beside the steps, and how much of it is.

    Returns:
        The content of ``result.json``.

    Raises:
        ConfigError, DataError: options or text that cannot work, or a folder that another process has; nothing was
            written.
        CheckpointError: a file of the comparison to resume is damaged, or was changed after it was written.
        KeyboardInterrupt: Ctrl-C; what was trained is kept and ``resume`` continues it.
    """
    began = time.perf_counter()
    folder = Path(out)
    stored = Stored.read(folder) if resume else None
    first = stored.options if stored is not None else options or CompareOptions()
    if layout is None:
        layout = Layout() if stored is None else stored.layout.going_on(rank_here().world)
    with joined(first.recipe(1, 0).device, dataclasses.asdict(first) | layout.to_dict()) as ranks:
        layout.check(ranks.world, first.batch_size)
        ranks.share(lambda: _check_new(folder, resume))
        if not ranks.is_first:
            on_note, on_stage, on_progress = lambda line: None, unseen, lambda attention, seed, progress: None
        with folder_of_ranks(folder, ranks):
            return _compare(options, folder, layout, ranks, resume, command, began, on_note, on_progress, on_stage)


def _check_new(folder: Path, resume: bool) -> None:
    own_folder(folder, COMPARISON)
    if not resume and (folder / "config.json").exists():
        given = f"{folder} is not empty"
        raise ConfigError(given, "a new folder", "go on with the run in it with --resume, or choose another --out")


def _compare(
    options: CompareOptions | None,
    folder: Path,
    layout: Layout,
    ranks: Ranks,
    resume: bool,
    command: str,
    began: float,
    on_note: Callable[[str], None],
    on_progress: Callable[[str, int, Progress], None],
    on_stage: OnStage,
) -> ComparisonResult:
    """Compares, in a folder that no other process has but these ranks."""
    # The others look into it once rank 0 has it.
    ranks.share(lambda: None)
    stored = Stored.read(folder) if resume else None
    if stored is not None:
        options = _same_options(stored, options, folder)
        began -= stored.plan.seconds if stored.plan else 0.0
        if not stored.has_seal:
            on_note(f"{folder}: {NO_SEAL}")
    options = options or CompareOptions()
    shape = stored.shape if stored is not None else load_shape(options.shape).grouped(options.group)
    study = _Study(options, folder, shape, layout, ranks)
    data = ranks.first_on_host(
        lambda: prepare_data(
            options.text, vocab_size=trained_rows(study.shape, options.recipe(1, 0)), context=study.context,
            text_column=options.text_column, on_stage=on_stage, on_note=on_note,
        )
    )  # fmt: skip
    data = data if study.causal else with_mask(data, study.shape.vocab_size)
    if stored is None:
        stored = Stored(options, study.shape, command, data.facts["digest"], layout=layout)
        _write(stored, folder, ranks)
    plan = stored.plan
    if plan is None:
        plan = _plan(study, data, began, on_stage)
        stored = dataclasses.replace(stored, plan=plan)
        _write(stored, folder, ranks)
    on_note(
        f"{len(options.variants) * options.seeds} runs of {plan.steps} steps of "
        f"{options.batch_size} × {study.context} tokens{plan.note}; "
        f"about {_about(_seconds_of(options, plan.step_seconds, data, plan.steps))} of training and measuring"
    )
    runs: dict[str, list[TrainResult]] = {attention: [] for attention in options.variants}
    for seed in range(options.seeds):
        for attention in options.variants:
            runs[attention].append(
                train(
                    study.build(attention, seed),
                    data,
                    options.recipe(plan.steps, seed),
                    study.run_folder(attention, seed),
                    track=study.track,
                    layout=layout,
                    resume=resume,
                    on_progress=functools.partial(on_progress, attention, seed),
                    on_stage=on_stage,
                )
            )
    on_stage(Stage("measuring the start-up of the models and writing the report"))
    result = _result(study, data, runs, plan, stored.command)

    def report() -> None:
        write_json(folder / "result.json", result.to_json())
        curves, maps = _curves(study), _maps(study, data)
        write_text(folder / "report.html", render_compare(result, curves, maps))
        render_picture(curves, maps, folder / "picture.png")

    ranks.share(report)
    return result


def _write(stored: Stored, folder: Path, ranks: Ranks) -> None:
    ranks.share(lambda: stored.write(folder))


def _same_options(stored: Stored, given: CompareOptions | None, folder: Path) -> CompareOptions:
    """Returns the stored options; those given may repeat them or be left at their defaults.

    Raises:
        ConfigError: an option that differs from the stored one.
    """
    kept = stored.options
    for field in dataclasses.fields(CompareOptions) if given is not None else ():
        now, then = getattr(given, field.name), getattr(kept, field.name)
        # Who sees the metrics changes no number.
        if (
            field.name == "track"
            or now in (then, field.default)
            or (field.name == "text" and same_text(now, then, stored.data_digest, kept.text_column))
        ):
            continue
        if field.name == "shape" and same_shape(load_shape(now).grouped(kept.group), stored.shape):
            continue
        raise ConfigError(
            f"{folder} was started with {field.name} = {then!r}, and {now!r} is given",
            "the same option",
            "resume without it, or choose another --out",
        )
    # The text may lie in another folder than when the comparison began.
    moved = given is not None and given.text != CompareOptions.text
    kept = dataclasses.replace(kept, text=given.text) if given is not None and moved else kept
    return kept if given is None else dataclasses.replace(kept, track=given.track)


def _plan(study: _Study, data: PreparedData, began: float, on_stage: OnStage) -> RunPlan:
    """Measures a step of each variant on all ranks, and from what it costs rank 0 how many steps fit into the time."""
    options, ranks = study.options, study.ranks
    costs: dict[str, StepCost] = {}
    for attention in options.variants:
        on_stage(Stage(f"measuring a training step of {attention}"))
        model = study.build(attention, 0)
        costs[attention] = measure_step(model, data, options.recipe(1, 0), layout=study.layout, ranks=ranks)
    costs = {name: StepCost(**cost) for name, cost in ranks.share(lambda: _as_json(costs)).items()}
    used = ranks.share(lambda: time.perf_counter() - began)
    steps, note = options.steps or DEFAULT_STEPS, ""
    if options.steps is None:
        minutes = options.minutes or DEFAULT_MINUTES
        seconds = {name: cost.seconds for name, cost in costs.items()}
        fit = _steps_that_fit(options, seconds, data, 60 * minutes - used)
        if options.minutes is not None or fit < steps:
            steps, note = fit, f", which is what fits into {minutes:g} minutes on this machine"
    return RunPlan(
        steps=steps,
        note=note,
        seconds=used,
        step_seconds={name: cost.seconds for name, cost in costs.items()},
        peak_bytes={name: cost.peak_bytes for name, cost in costs.items()},
    )


def _as_json(costs: Mapping[str, StepCost]) -> dict[str, dict[str, Any]]:
    return {name: dataclasses.asdict(cost) for name, cost in costs.items()}


def _steps_that_fit(options: CompareOptions, step: Mapping[str, float], data: PreparedData, seconds: float) -> int:
    """Returns the steps of each run when all runs share ``seconds``; a step of each variant takes ``step`` seconds."""
    left = seconds - _seconds_of(options, step, data, 0)
    return max(1, int(left / (options.seeds * sum(step.values()))))


def _seconds_of(options: CompareOptions, step: Mapping[str, float], data: PreparedData, steps: int) -> float:
    """Returns the seconds that runs of so many steps take together, with evaluations, saving and the report."""
    recipe = options.recipe(1, 0)
    blocks = recipe.evaluations * min(recipe.evaluation_blocks, len(data.validation)) + len(data.validation)
    # A forward pass without gradients is about a third of a step.
    evaluation_steps = blocks / options.batch_size / 3
    per_run = 3.0
    return 15.0 + per_run * options.seeds * len(step) + (steps + evaluation_steps) * options.seeds * sum(step.values())


def _about(seconds: float) -> str:
    """Returns a time that is read at a glance.

    >>> _about(41), _about(340), _about(9000)
    ('41 s', '6 minutes', '2.5 hours')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _result(
    study: _Study, data: PreparedData, runs: Mapping[str, list[TrainResult]], plan: RunPlan, command: str
) -> ComparisonResult:
    """Returns what was measured of every variant, and the pairs."""
    variants = {attention: _variant(study, attention, results, plan) for attention, results in runs.items()}
    recipe = study.options.recipe(plan.steps, 0).to_dict()
    recipe |= {"shape": dataclasses.asdict(study.shape), "context": study.context, "match": study.options.match}
    recipe.pop("seed")
    return ComparisonResult(
        variants=variants,
        pairs=pairs(variants),
        recipe=recipe,
        versions=Provenance.here().to_json(),
        data=data.facts,
        seeds=list(range(study.options.seeds)),
        command=command,
    )


def _variant(study: _Study, attention: str, results: list[TrainResult], plan: RunPlan) -> VariantResult:
    """Returns what was measured of one variant; loads its first model to time that."""
    shape = pair_config(study.shape, attention, match=study.options.match).shape()
    parameters = count_parameters(shape, attention)
    used = study.options.recipe(1, 0)
    shared = VARIANTS[attention].signals_per_noise(shape)
    backend = serving_backend(attention, used.device, getattr(torch, used.dtype), shape.head_dim, shared)
    flops = flops_per_token(
        shape, attention, context=study.context, phase="training", backend=backend, causal=study.causal
    )
    load = LoadCost(**study.ranks.share(lambda: dataclasses.asdict(measure_load(results[0].model_folder, used.device))))
    speeds = sorted(result.train_tokens_per_second for result in results)
    return VariantResult(
        parameters=parameters.total,
        attention_parameters=parameters.attention,
        intermediate_size=shape.intermediate_size,
        val_loss=[result.val_loss for result in results],
        bits_per_byte=[result.bits_per_byte for result in results] if study.causal else None,
        attention_backend=backend,
        train_tokens_per_second=speeds[len(speeds) // 2],
        train_peak_bytes=plan.peak_bytes[attention],
        cache_bytes_per_token=cache_bytes_per_token(shape, attention, bytes_per_value=4) if study.causal else None,
        model_flops_per_token=flops.model,
        executed_flops_per_token=flops.executed,
        checkpoint_bytes=(results[0].model_folder / "model.safetensors").stat().st_size,
        load_seconds=load.load_seconds,
        first_token_seconds=load.first_token_seconds,
    )


def _curves(study: _Study) -> list[LossCurve]:
    """Returns the loss curve of every run, as its rows have it."""
    curves = []
    blocks = study.options.recipe(1, 0).evaluation_blocks
    for attention in study.options.variants:
        for seed in range(study.options.seeds):
            rows = read_metrics(study.run_folder(attention, seed) / "metrics.jsonl")
            # The last measurement takes more blocks and is the table's, not a point of the curve.
            held_out = [row for row in rows if row.get("val_blocks", blocks + 1) <= blocks]
            curves.append(
                LossCurve(
                    attention=attention,
                    seed=seed,
                    train=[CurvePoint(row["tokens"], row["loss"]) for row in rows if "loss" in row],
                    validation=[CurvePoint(row["tokens"], row["val_loss"]) for row in held_out],
                )
            )
    return curves


def _maps(study: _Study, data: PreparedData, *, tokens: int = 28) -> HeadMaps:
    """Returns the maps of the first output head in the middle layer of each variant's first model, on held-out text."""
    ids = data.tokenizer.encode(data.sample_text())[: min(tokens, study.context)]
    layer = study.shape.num_layers // 2
    variants = {}
    for attention in study.options.variants:
        folder = study.run_folder(attention, 0) / "model"
        model = language_class(DiffTransformerConfig.from_pretrained(folder)).from_pretrained(folder)
        variants[attention] = attention_maps(model, torch.tensor([ids]), layer=layer, head=0)
    return HeadMaps(
        text=data.tokenizer.decode(ids),
        tokens=token_labels(data.tokenizer, ids),
        layer=layer,
        head=0,
        causal=study.causal,
        variants=variants,
    )
