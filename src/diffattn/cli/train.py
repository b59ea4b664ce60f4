"""``diffattn train``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import tyro

from diffattn.errors import ConfigError

_SHAPE = {"shape": "3M", "attention": "diff_v1", "match": "parameters"}


def train(
    *,
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
    shape: str = "3M",
    attention: Literal["softmax", "diff_v1", "diff_v2", "gated"] = "diff_v1",
    seed: int = 0,
    steps: int = 300,
    text: str = "sotu",
    context: int | None = None,
    match: Literal["parameters", "shape"] = "parameters",
    batch_size: int = 4,
    gradient_accumulation: int = 1,
    learning_rate: float | None = None,
    warmup_fraction: float = 0.05,
    anneal_fraction: float = 0.5,
    weight_decay: float = 0.1,
    checkpoints: int = 4,
    evaluations: int = 4,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    out: Path | None = None,
    resume: bool = False,
    json: bool = False,
) -> Callable[[], int]:
    """Train one model and write it into a folder, with its losses and checkpoints.

    Examples:
        diffattn train --shape 3M --attention diff_v1 --steps 300 --out runs/first
        diffattn train --resume --out runs/first

    Args:
        source: Folder of a model with its tokenizer to train on, in place of a new model of --shape.
        shape: Size of the softmax model: a preset (300K, 3M, 30M, 830M, 1.4B, ...) or a TOML file.
        attention: The attention of the model: softmax, diff_v1, diff_v2 or gated.
        seed: Number that decides the initial values and the order of the text.
        steps: Number of updates of the weights.
        text: What to read: a file, a folder, or a data set's id; sotu is 12 MB of speeches that come with diffattn.
        context: Tokens that the model reads at once. Default: as the shape says; with --from at most 512.
        match: parameters: V2 gets a narrower feed-forward network, so that all have equally many parameters. shape: V2
            keeps its width and has more parameters.
        batch_size: Blocks of --context tokens in each forward pass.
        gradient_accumulation: Forward passes in each step.
        learning_rate: Highest learning rate of the run. Default: 0.002; with --from 0.0001.
        warmup_fraction: Share of the steps, 0 to 1, in which the learning rate rises.
        anneal_fraction: For DEX models: share of the steps, 0 to 1, in which lambda moves to its learned value.
        weight_decay: Weight decay of the optimizer, AdamW.
        checkpoints: How many checkpoints are written over the run.
        evaluations: How many times the held-out loss is measured over the run.
        device: Where to train: the processor (cpu) or a GPU (cuda); auto takes the GPU where there is one.
        dtype: Number format of the products; the weights stay float32. auto: bfloat16 where the
            machine multiplies it fast, else float32.
        out: Folder to write the run into. Default: a new one in runs/.
        resume: Go on with the run in --out, or with the newest run in runs/.
        json: Print the result as JSON on stdout.
    """

    def call() -> int:
        from diffattn.cli.console import Console, print_json

        given = {"shape": shape, "attention": attention, "match": match}
        with Console("train", out, resume=resume) as console:
            console.importing()
            from diffattn.train.continued import LEARNING_RATE, continue_training, started_from
            from diffattn.train.recipe import Recipe
            from diffattn.train.single import train_shape

            start = source or (started_from(console.folder) if resume else None)
            if start is not None and (
                wrong := [f"--{name} {value}" for name, value in given.items() if value != _SHAPE[name]]
            ):
                raise ConfigError(
                    f"{' '.join(wrong)} given with --from {start}, whose config.json says it; leave one out"
                )
            default_rate = Recipe.learning_rate if start is None else LEARNING_RATE
            rate = default_rate if learning_rate is None else learning_rate
            recipe = Recipe(
                steps=steps, seed=seed, batch_size=batch_size, gradient_accumulation=gradient_accumulation,
                learning_rate=rate,
                warmup_fraction=warmup_fraction, anneal_fraction=anneal_fraction, weight_decay=weight_decay,
                checkpoints=checkpoints, evaluations=evaluations, device=device, dtype=dtype,
            )  # fmt: skip
            name = f"{attention if start is None else start.name} seed {seed}"
            if start is None:
                result = train_shape(
                    shape, attention, recipe, console.folder, text=text, context=context, match=match,
                    resume=resume, on_progress=lambda step: console.progress(name, step), on_stage=console,
                )  # fmt: skip
            else:
                result = continue_training(
                    start, recipe, console.folder, text=text, context=context, resume=resume,
                    on_progress=lambda step: console.progress(name, step), on_stage=console,
                )  # fmt: skip
        console.note(
            f"held-out loss {result.val_loss:.4f} nats per token, {result.bits_per_byte:.4f} bits per byte, "
            f"{result.train_tokens_per_second:,.0f} tokens/s; model: {result.model_folder}"
        )
        if json:
            print_json(asdict(result) | {"folder": str(result.folder)})
        return 0

    return call
