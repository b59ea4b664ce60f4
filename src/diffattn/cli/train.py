"""``diffattn train``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal


def train(
    *,
    shape: str = "3M",
    attention: Literal["softmax", "diff_v1", "diff_v2"] = "diff_v1",
    seed: int = 0,
    steps: int = 300,
    text: str = "sotu",
    context: int | None = None,
    match: Literal["parameters", "shape"] = "parameters",
    batch_size: int = 4,
    gradient_accumulation: int = 1,
    learning_rate: float = 2e-3,
    warmup_fraction: float = 0.05,
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
        shape: Preset (300K, 3M, 30M, 830M, 1.4B, ...) or TOML file of the softmax Transformer to be replaced.
        attention: The variant.
        seed: Of the initial values and of the order of the data.
        steps: Optimizer steps.
        text: A file, a folder, or a data set's id; sotu is 12 MB of public speeches that are installed with diffattn.
        context: Tokens per block. Default: the shape's.
        match: parameters: V2's feed-forward width is narrowed until the totals match. shape: it has more parameters.
        batch_size: Blocks per forward pass.
        gradient_accumulation: Forward passes per step.
        learning_rate: Peak of the schedule.
        warmup_fraction: Share of the steps in which the learning rate rises.
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
        from diffattn.train.recipe import Recipe
        from diffattn.train.single import train_shape

        recipe = Recipe(
            steps=steps, seed=seed, batch_size=batch_size, gradient_accumulation=gradient_accumulation,
            learning_rate=learning_rate, warmup_fraction=warmup_fraction, weight_decay=weight_decay,
            checkpoints=checkpoints, evaluations=evaluations, device=device, dtype=dtype,
        )  # fmt: skip
        with Console("train", out, resume=resume) as console:
            result = train_shape(
                shape, attention, recipe, console.folder, text=text, context=context, match=match, resume=resume,
                on_progress=lambda step: console.progress(f"{attention} seed {seed}", step),
            )  # fmt: skip
        console.note(
            f"held-out loss {result.val_loss:.4f} nats per token, {result.bits_per_byte:.4f} bits per byte, "
            f"{result.train_tokens_per_second:,.0f} tokens/s; model: {result.model_folder}"
        )
        if json:
            print_json(asdict(result) | {"folder": str(result.folder)})
        return 0

    return call
