"""``diffattn train``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from diffattn.cli.arguments import check_given, given
from diffattn.errors import ConfigError

if TYPE_CHECKING:
    from diffattn.cli.terminal.console import Console
    from diffattn.train.own import Own
    from diffattn.train.record import TrainResult

# What a model to start from says by itself.
_OF_A_SHAPE = ("shape", "attention", "match")


def train(
    *,
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
    shape: str = "3M",
    attention: Literal["softmax", "diff_v1", "diff_v2", "gated"] = "diff_v1",
    seed: int = 0,
    steps: int = 300,
    text: str = "sotu",
    text_column: Annotated[str, tyro.conf.arg(name="field")] = "text",
    context: int | None = None,
    lossy_tokenizer: bool = False,
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
        text_column: Name of the field that holds the text, where the text is rows of JSON, CSV or Parquet.
        context: Tokens that the model reads at once. Default: as the shape says; with --from at most 512.
        lossy_tokenizer: With --from: use a tokenizer that loses more than 1% of the text.
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
        resume: Go on with the run in --out, or with the newest run in runs/. The run keeps its options; those that are
            given beside --resume must be the same.
        json: Print the result as JSON on stdout.
    """

    values = dict(locals())

    def call() -> int:
        from diffattn.cli.terminal.console import Console, print_json

        with Console("train", out, resume=resume) as console:
            console.importing()
            from diffattn.train.own import read_own

            if resume:
                own = read_own(console.folder)
                moved = _beside(own, console.folder, given(values))
                result = _resume(own, console, shape, match, moved)
            else:
                result = _start(console, values)
        console.note(
            f"held-out loss {result.val_loss:.4f} nats per token, {result.bits_per_byte:.4f} bits per byte, "
            f"{result.train_tokens_per_second:,.0f} tokens/s; model: {result.model_folder}"
        )
        if json:
            print_json(asdict(result) | {"folder": str(result.folder)})
        return 0

    return call


def _start(console: Console, values: dict[str, Any]) -> TrainResult:
    from diffattn.train.continued import LEARNING_RATE, continue_training
    from diffattn.train.recipe import Recipe
    from diffattn.train.single import train_shape

    source = values["source"]
    if source is not None and (wrong := [f"--{name} {values[name]}" for name in _OF_A_SHAPE if name in given(values)]):
        raise ConfigError(f"{' '.join(wrong)} given with --from {source}, whose config.json says it; leave one out")
    fields = {field.name: values[field.name] for field in dataclasses.fields(Recipe) if field.name in values}
    if fields["learning_rate"] is None:
        fields["learning_rate"] = Recipe.learning_rate if source is None else LEARNING_RATE
    recipe = Recipe(**fields)
    name = f"{values['attention'] if source is None else source.name} seed {recipe.seed}"
    options = {key: values[key] for key in ("text", "text_column", "context")}
    if source is not None:
        return continue_training(
            source, recipe, console.folder, **options, lossy_tokenizer=values["lossy_tokenizer"],
            on_progress=lambda step: console.progress(name, step), on_stage=console, on_note=console.note,
        )  # fmt: skip
    if values["lossy_tokenizer"]:
        raise ConfigError(
            "--lossy-tokenizer given without --from; the tokenizer of a new model loses nothing: leave it out"
        )
    return train_shape(
        values["shape"], values["attention"], recipe, console.folder, **options, match=values["match"],
        on_progress=lambda step: console.progress(name, step), on_stage=console, on_note=console.note,
    )  # fmt: skip


def _resume(own: Own, console: Console, shape: str, match: str, moved: dict[str, Any]) -> TrainResult:
    from diffattn.train.resume import resume_training

    name = f"{own.attention if own.source is None else own.source.name} seed {own.recipe.seed}"
    return resume_training(
        console.folder,
        shape=shape,
        match=match,
        **moved,
        on_progress=lambda step: console.progress(name, step),
        on_stage=console,
        on_note=console.note,
    )


def _beside(own: Own, folder: Path, others: dict[str, Any]) -> dict[str, Any]:
    """Where text and source are now, once what was given beside ``--resume`` is known to be what the run has."""
    from diffattn.checkpoint_files import weights_digest
    from diffattn.plan.named_model import load_shape
    from diffattn.train.own import same_shape, same_text

    others = {name: value for name, value in others.items() if name not in ("out", "resume", "json")}
    has: dict[str, Any] = dataclasses.asdict(own.recipe) | {"attention": own.attention, "context": own.context}
    has |= {"text_column": own.text_column, "lossy_tokenizer": own.lossy_tokenizer}
    has |= {"text": own.text, "source": own.source, "match": own.match, "shape": own.shape and own.shape.name}
    same: dict[str, Callable[[Any], bool]] = {
        "text": lambda text: same_text(text, own.text, own.data_digest, own.text_column)
    }
    if own.source is not None:
        same["source"] = lambda source: weights_digest(source) == own.source_digest
    elif own.shape is None:
        # A version that did not keep them; the model says whether they are right.
        same |= dict.fromkeys(("shape", "match"), lambda value: True)
    else:
        its_shape = own.shape
        same["shape"] = lambda shape: same_shape(load_shape(shape), its_shape)
    agreed = {name for name, value in others.items() if name in same and same[name](value)}
    others_left = {name: value for name, value in others.items() if name not in agreed}
    check_given(folder, others_left, has, source="from", text_column="field")
    return {name: others[name] for name in agreed if name in ("text", "source")}
