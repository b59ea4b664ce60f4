"""The main job: train a DIFF Transformer and the softmax Transformer that it replaces, and say what was gained.

Every variant starts from its twin's initial values, sees the same blocks in the same order, and is measured on the
same held-out documents; the claim is the paired difference over seeds, with its interval.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diffattn.data.packing import PreparedData, prepare_data
from diffattn.errors import ConfigError
from diffattn.files import write_json, write_text
from diffattn.folders import COMPARISON, own_folder
from diffattn.machine import processor_name
from diffattn.model.fused import serving_backend
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.model.pairing import MATCHES, build_pair, pair_config
from diffattn.plan.cost import cache_bytes_per_token, count_parameters, flops_per_token
from diffattn.plan.shape import DEFAULT_VARIANTS, VARIANTS, ModelShape
from diffattn.progress import OnStage, Stage, unseen
from diffattn.report.compare_page import render_compare, render_picture
from diffattn.study.maps import attention_maps, token_labels
from diffattn.study.statistics import pairs
from diffattn.train.callbacks import Progress, read_metrics
from diffattn.train.measure import StepCost, measure_load, measure_step
from diffattn.train.recipe import Recipe
from diffattn.train.record import TrainResult
from diffattn.train.run import train
from diffattn.train.single import check_context, new_folder

DEFAULT_STEPS = 250
DEFAULT_MINUTES = 6.0
"""Without ``steps`` and ``minutes``: this many steps, fewer where they would take longer than this."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared with what; the fields are the options of ``diffattn compare``."""

    shape: str = "3M"
    """Preset or TOML file of the softmax Transformer that is to be replaced."""
    variants: tuple[str, ...] = DEFAULT_VARIANTS
    """What is trained, of softmax, diff_v1, diff_v2 and gated; softmax is the baseline of the pairs."""
    seeds: int = 2
    """Pairs: initial values and order of the data are drawn anew for each, the same for all variants."""
    steps: int | None = None
    """Optimizer steps of each run."""
    minutes: float | None = None
    """Instead of steps: as many as fit into this time for everything together."""
    text: str = "sotu"
    """A file, a folder, or the id of a data set."""
    context: int | None = None
    """Tokens per block; default: the shape's max_position_embeddings."""
    match: str = "parameters"
    """``parameters``: V2's feed-forward width is narrowed until the totals match. ``shape``: it has more parameters."""
    batch_size: int = 4
    """Blocks per step."""
    learning_rate: float = 2e-3
    """Peak of the schedule."""
    device: str = "auto"
    """``auto``, ``cpu`` or ``cuda``."""
    dtype: str = "auto"
    """``auto``, ``float32`` or ``bfloat16`` (autocast)."""

    def __post_init__(self) -> None:
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise ConfigError(f"variants is {' '.join(self.variants) or 'empty'}; wanted each of them at most once")
        for name in self.variants:
            if name not in VARIANTS:
                raise ConfigError(f"variants holds {name!r}; wanted some of {', '.join(VARIANTS)}")
        if self.seeds < 1:
            raise ConfigError(f"seeds is {self.seeds}; wanted a number of pairs, at least 1")
        if self.steps is not None and self.minutes is not None:
            raise ConfigError(f"steps is {self.steps} and minutes is {self.minutes}; wanted one of them: leave one out")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; wanted at least 1")
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            raise ConfigError(f"minutes is {self.minutes}; wanted more than 0")
        if self.match not in MATCHES:
            raise ConfigError(f"match is {self.match!r}; wanted one of {', '.join(MATCHES)}")
        self.recipe(1, 0)

    def recipe(self, steps: int, seed: int) -> Recipe:
        """The recipe of one run."""
        return Recipe(
            steps=steps,
            seed=seed,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            device=self.device,
            dtype=self.dtype,
            evaluations=3,
            evaluation_blocks=64,
            checkpoints=3,
        ).resolved()


class _Study:
    """The parts of a comparison that its steps share."""

    def __init__(self, options: Comparison, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.shape = ModelShape.load(options.shape)
        for attention in options.variants:
            # Refuses what cannot be built before anything is read or written.
            pair_config(self.shape, attention, match=options.match)
        self.context = check_context(self.shape, options.context)

    def build(self, attention: str, seed: int) -> DiffTransformerForCausalLM:
        return build_pair(self.shape, attention, seed=seed, match=self.options.match).model

    def run_folder(self, attention: str, seed: int) -> Path:
        return self.folder / f"{attention}-seed{seed}"


def compare(
    options: Comparison | None = None,
    *,
    out: str | Path,
    resume: bool = False,
    command: str = "diffattn.compare(...)",
    on_note: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[str, int, Progress], None] = lambda attention, seed, progress: None,
    on_stage: OnStage = unseen,
) -> dict[str, Any]:
    """Train every variant over every seed, measure, and write ``result.json`` and ``report.html`` into ``out``.

    Args:
        options: what to compare; default: the main job.
        out: the run folder; it must not hold a run unless ``resume``.
        resume: continue what ``out`` holds with the options that it was started with.
        command: what made the result, to be named in it.
        on_note: called with a line about what happens next.
        on_progress: called with the variant, the seed and the step.
        on_stage: called with what is done beside the steps, and how much of it is.

    Returns:
        The content of ``result.json``: ``variants`` (parameters, held-out loss and bits per byte per seed, training
        speed, peak memory, cache bytes and FLOPs per token, checkpoint bytes, seconds to load it and to the first
        token), ``pairs`` (the difference from softmax with its 95% interval, and a sentence), ``recipe``, ``versions``,
        ``data``.

    Raises:
        ConfigError, DataError: options or text that cannot work; nothing was written.
        KeyboardInterrupt: Ctrl-C; what was trained is kept and ``resume`` continues it.
    """
    began = time.perf_counter()
    folder = Path(out)
    stored = _stored(folder, resume)
    if stored is not None:
        options = _same_options(stored["options"], options, folder)
        began -= stored["plan"]["seconds"] if "plan" in stored else 0.0
    study = _Study(options := options or Comparison(), folder)
    with new_folder(folder):
        data = prepare_data(options.text, vocab_size=study.shape.vocab_size, context=study.context, on_stage=on_stage)
    config = stored or {"options": dataclasses.asdict(options), "command": command}
    write_json(folder / "config.json", config)
    if "plan" not in config:
        config["plan"] = _plan(study, data, began, on_stage)
        write_json(folder / "config.json", config)
    plan = config["plan"]
    on_note(
        f"{len(options.variants) * options.seeds} runs of {plan['steps']} steps of "
        f"{options.batch_size} × {study.context} tokens{plan['note']}; "
        f"about {_about(_seconds_of(options, plan['step_seconds'], data, plan['steps']))} of training and measuring"
    )
    runs: dict[str, list[TrainResult]] = {attention: [] for attention in options.variants}
    for seed in range(options.seeds):
        for attention in options.variants:
            runs[attention].append(
                train(
                    study.build(attention, seed),
                    data,
                    options.recipe(plan["steps"], seed),
                    study.run_folder(attention, seed),
                    resume=resume,
                    on_progress=functools.partial(on_progress, attention, seed),
                    on_stage=on_stage,
                )
            )
    on_stage(Stage("measuring the start-up of the models and writing the report"))
    result = _result(study, data, runs, plan, config["command"])
    write_json(folder / "result.json", result)
    curves, maps = _curves(study), _maps(study, data)
    write_text(folder / "report.html", render_compare(result, curves, maps))
    render_picture(curves, maps, folder / "picture.png")
    return result


def _stored(folder: Path, resume: bool) -> dict[str, Any] | None:
    file = folder / "config.json"
    if resume and not file.exists():
        raise ConfigError(f"{folder} holds no comparison to resume; wanted its config.json: name its folder with --out")
    own_folder(folder, COMPARISON)
    if not resume and file.exists():
        raise ConfigError(f"{folder} is not empty; continue the run in it with --resume or choose another --out")
    return json.loads(file.read_text(encoding="utf-8")) if resume else None


def _same_options(stored: dict[str, Any], given: Comparison | None, folder: Path) -> Comparison:
    """The stored options; what was given may repeat them or be left at its default, but not differ."""
    kept = Comparison(**{**stored, "variants": tuple(stored["variants"])})
    for field in dataclasses.fields(Comparison) if given is not None else ():
        now, then = getattr(given, field.name), getattr(kept, field.name)
        if now not in (then, field.default):
            raise ConfigError(
                f"{folder} was started with {field.name} = {then!r}, now {now!r} is given; resume without it, "
                "or choose another --out"
            )
    return kept


def _plan(study: _Study, data: PreparedData, began: float, on_stage: OnStage) -> dict[str, Any]:
    """Measure a step of each variant, and from that how many steps fit into the time."""
    options = study.options
    costs: dict[str, StepCost] = {}
    for attention in options.variants:
        on_stage(Stage(f"measuring a training step of {attention}"))
        costs[attention] = measure_step(study.build(attention, 0), data, options.recipe(1, 0))
    used = time.perf_counter() - began
    steps, note = options.steps or DEFAULT_STEPS, ""
    if options.steps is None:
        minutes = options.minutes or DEFAULT_MINUTES
        seconds = {name: cost.seconds for name, cost in costs.items()}
        fit = _steps_that_fit(options, seconds, data, 60 * minutes - used)
        if options.minutes is not None or fit < steps:
            steps, note = fit, f", which is what fits into {minutes:g} minutes on this machine"
    return {
        "steps": steps,
        "note": note,
        "seconds": used,
        "step_seconds": {name: cost.seconds for name, cost in costs.items()},
        "peak_bytes": {name: cost.peak_bytes for name, cost in costs.items()},
    }


def _steps_that_fit(options: Comparison, step: dict[str, float], data: PreparedData, seconds: float) -> int:
    """Steps of each run when all runs share ``seconds``, with ``step`` of each variant measured."""
    left = seconds - _seconds_of(options, step, data, 0)
    return max(1, int(left / (options.seeds * sum(step.values()))))


def _seconds_of(options: Comparison, step: dict[str, float], data: PreparedData, steps: int) -> float:
    """Seconds that runs of so many steps take together, with their evaluations, saving, and the report."""
    recipe = options.recipe(1, 0)
    blocks = recipe.evaluations * min(recipe.evaluation_blocks, len(data.validation)) + len(data.validation)
    # A forward pass without gradients is about a third of a step.
    evaluation_steps = blocks / options.batch_size / 3
    per_run = 3.0
    return 15.0 + per_run * options.seeds * len(step) + (steps + evaluation_steps) * options.seeds * sum(step.values())


def _about(seconds: float) -> str:
    """A time that is read at a glance.

    >>> _about(41), _about(340), _about(9000)
    ('41 s', '6 minutes', '2.5 hours')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _result(
    study: _Study, data: PreparedData, runs: dict[str, list[TrainResult]], plan: dict[str, Any], command: str
) -> dict[str, Any]:
    variants = {}
    for attention, results in runs.items():
        shape = pair_config(study.shape, attention, match=study.options.match).shape()
        parameters = count_parameters(shape, attention)
        used = study.options.recipe(1, 0)
        backend = serving_backend(attention, used.device, getattr(torch, used.dtype))
        flops = flops_per_token(shape, attention, context=study.context, phase="training", backend=backend)
        load = measure_load(results[0].model_folder, used.device)
        speeds = sorted(result.train_tokens_per_second for result in results)
        variants[attention] = {
            "parameters": parameters.total,
            "attention_parameters": parameters.attention,
            "intermediate_size": shape.intermediate_size,
            "val_loss": [result.val_loss for result in results],
            "bits_per_byte": [result.bits_per_byte for result in results],
            "attention_backend": backend,
            "train_tokens_per_second": speeds[len(speeds) // 2],
            "train_peak_bytes": plan["peak_bytes"][attention],
            "cache_bytes_per_token": cache_bytes_per_token(shape, attention, bytes_per_value=4),
            "model_flops_per_token": flops.model,
            "executed_flops_per_token": flops.executed,
            "checkpoint_bytes": (results[0].model_folder / "model.safetensors").stat().st_size,
            "load_seconds": load.load_seconds,
            "first_token_seconds": load.first_token_seconds,
        }
    recipe = study.options.recipe(plan["steps"], 0).to_dict()
    recipe |= {"shape": dataclasses.asdict(study.shape), "context": study.context, "match": study.options.match}
    recipe.pop("seed")
    return {
        "variants": variants,
        "pairs": pairs(variants),
        "recipe": recipe,
        "versions": versions(),
        "data": data.facts,
        "seeds": list(range(study.options.seeds)),
        "command": command,
    }


def versions() -> dict[str, Any]:
    """What ran, and on what."""
    names = ("diffattn", "torch", "transformers", "accelerate", "tokenizers")
    return {
        **{name: version(name) for name in names},
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name(),
        "threads": torch.get_num_threads(),
    }


def _curves(study: _Study) -> list[dict[str, Any]]:
    curves = []
    blocks = study.options.recipe(1, 0).evaluation_blocks
    for attention in study.options.variants:
        for seed in range(study.options.seeds):
            rows = read_metrics(study.run_folder(attention, seed) / "metrics.jsonl")
            curves.append(
                {
                    "attention": attention,
                    "seed": seed,
                    "train": [{"tokens": row["tokens"], "loss": row["loss"]} for row in rows if "loss" in row],
                    "validation": [
                        {"tokens": row["tokens"], "loss": row["val_loss"]}
                        for row in rows
                        # The last measurement takes more blocks and is the table's, not a point of the curve.
                        if row.get("val_blocks", blocks + 1) <= blocks
                    ],
                }
            )
    return curves


def _maps(study: _Study, data: PreparedData, *, tokens: int = 28) -> dict[str, Any]:
    """The maps of the first output head in the middle layer of each variant's first model, on held-out text."""
    ids = data.tokenizer.encode(data.sample_text())[: min(tokens, study.context)]
    layer = study.shape.num_layers // 2
    variants = {}
    for attention in study.options.variants:
        model = DiffTransformerForCausalLM.from_pretrained(study.run_folder(attention, 0) / "model")
        variants[attention] = attention_maps(model, torch.tensor([ids]), layer=layer, head=0)
    return {
        "text": data.tokenizer.decode(ids),
        "tokens": token_labels(data.tokenizer, ids),
        "layer": layer,
        "head": 0,
        "variants": variants,
    }
