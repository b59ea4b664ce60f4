"""The verb ``diffattn train``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffattn.cli.arguments import check_given, given
from diffattn.cli.ranks import console_of_ranks
from diffattn.errors import ConfigError
from diffattn.rank import rank_here
from diffattn.train.options import LaunchOptions, TrainOptions
from diffattn.train.recipe import Recipe
from diffattn.train.spread.layout import Layout

if TYPE_CHECKING:
    from diffattn.cli.terminal.console import Console
    from diffattn.train.own import Own
    from diffattn.train.record import TrainResult

# What a model to start from says by itself.
_OF_A_SHAPE = ("shape", "attention", "match", "tokenizer")


def train(
    options: TrainOptions,
    recipe: Recipe,
    layout: Layout,
    launch: LaunchOptions,
    *,
    out: Path | None = None,
    resume: bool = False,
    json: bool = False,
) -> int:
    """Train one model and write it into a folder, with its losses and checkpoints.

    Examples:
        diffattn train --shape 3M --attention diff_v1 --steps 300 --out runs/first
        diffattn train --resume --out runs/first

    Args:
        out: Folder to write the run into. Default: a new one in runs/.
        resume: Go on with the run in --out, or with the newest run in runs/. The run keeps its options; those that are
            given beside --resume must be the same, except --shard, --tp, --checkpointing and --compile.
    """
    from diffattn.cli.terminal.console import print_json

    if launch.on == "ray" and rank_here().world > 1:
        raise ConfigError("--on ray under torchrun", "one of the two, since each starts ranks", "leave torchrun out")
    with console_of_ranks("train", out, resume, recipe.device, (options, recipe, layout)) as console:
        result = (_resume if resume else _start)(options, recipe, layout, launch, console)
    bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f} bits per byte, "
    console.note(
        f"held-out loss {result.val_loss:.4f} nats per token, {bits}"
        f"{result.train_tokens_per_second:,.0f} tokens/s; model: {result.model_folder}"
    )
    if json:
        print_json(dataclasses.asdict(result) | {"folder": str(result.folder)})
    return 0


def _run(
    name: str,
    call: Callable[..., TrainResult],
    recipe: Recipe,
    layout: Layout,
    launch: LaunchOptions,
    console: Console,
    *,
    resume: bool,
) -> TrainResult:
    """Trains here or on Ray, and shows how it goes."""
    shown: dict[str, Callable[[Any], None]] = {
        "on_progress": lambda step: console.progress(name, step), "on_stage": console, "on_note": console.note,
    }  # fmt: skip
    if launch.on == "here":
        return call(**shown)
    from diffattn.train.spread.ray_launch import train_on_ray

    return train_on_ray(call, recipe, console.folder, layout=layout, ranks=launch.ranks, resume=resume, **shown)


def _start(
    options: TrainOptions, recipe: Recipe, layout: Layout, launch: LaunchOptions, console: Console
) -> TrainResult:
    from diffattn.data.tokenizer import read_chat_template
    from diffattn.train.continued import LEARNING_RATE, continue_training
    from diffattn.train.single import train_shape

    source, named = options.source, given(options, recipe)
    template = None if options.chat_template is None else read_chat_template(options.chat_template)
    if source is not None:
        if wrong := [f"--{name} {named[name]}" for name in _OF_A_SHAPE if name in named]:
            raise ConfigError(
                f"{' '.join(wrong)} beside --from {source}", "one of the two, since the model's config.json says it",
                f"leave {' and '.join(word.split()[0] for word in wrong)} out",
            )  # fmt: skip
        if "learning_rate" not in named:
            recipe = dataclasses.replace(recipe, learning_rate=LEARNING_RATE)
        name = f"{source.name} seed {recipe.seed}"
        call = functools.partial(
            continue_training, source, recipe, console.folder, text=options.text, text_column=options.text_column,
            context=options.context, lossy_tokenizer=options.lossy_tokenizer, chat_template=template,
            track=options.track, layout=layout,
        )  # fmt: skip
        return _run(name, call, recipe, layout, launch, console, resume=False)
    if options.lossy_tokenizer and options.tokenizer is None:
        raise ConfigError(
            "--lossy-tokenizer without --from or --tokenizer",
            "one of them beside it, since a tokenizer that is trained on the text loses nothing",
            "leave --lossy-tokenizer out",
        )  # fmt: skip
    name = f"{options.attention} seed {recipe.seed}"
    call = functools.partial(
        train_shape, options.shape, options.attention, recipe, console.folder, text=options.text,
        text_column=options.text_column, context=options.context, match=options.match, tokenizer=options.tokenizer,
        lossy_tokenizer=options.lossy_tokenizer, chat_template=template, track=options.track, layout=layout,
    )  # fmt: skip
    return _run(name, call, recipe, layout, launch, console, resume=False)


def _resume(
    options: TrainOptions, recipe: Recipe, layout: Layout, launch: LaunchOptions, console: Console
) -> TrainResult:
    from diffattn.data.tokenizer import read_chat_template
    from diffattn.train.own import read_own
    from diffattn.train.resume import resume_training

    own, beside = read_own(console.folder), given(options, recipe)
    template = beside.get("chat_template")
    # The run keeps the template, not its file.
    if isinstance(template, Path) and read_chat_template(template) == own.chat_template:
        del beside["chat_template"]
    # It changes no number of the run, so it may change.
    track = options.track if beside.pop("track", None) else None
    text, source = _moved(own, console.folder, beside)
    # Ray says how many there are only once it is reached.
    world = rank_here().world if launch.on == "here" else launch.ranks or 2
    layout = dataclasses.replace(own.layout.going_on(world), **given(layout))  # type: ignore[arg-type]
    name = f"{own.attention if own.source is None else own.source.name} seed {own.recipe.seed}"
    call = functools.partial(
        resume_training, console.folder, text=text, source=source, shape=options.shape, match=options.match,
        track=track, layout=layout,
    )  # fmt: skip
    return _run(name, call, own.recipe, layout, launch, console, resume=True)


def _moved(own: Own, folder: Path, others: Mapping[str, object]) -> tuple[tuple[str, ...] | None, Path | None]:
    """Returns the text and the source that were given, once all that was given is known to be what the run has."""
    from diffattn.checkpoint_files import weights_digest
    from diffattn.plan.named_model import load_shape
    from diffattn.train.own import same_shape, same_text

    has = dataclasses.asdict(own.recipe) | {"attention": own.attention, "context": own.context}
    has |= {"text_column": own.text_column, "lossy_tokenizer": own.lossy_tokenizer, "tokenizer": own.tokenizer}
    # Its file's name is not kept, so that an error names it as the help does.
    has |= {"chat_template": own.chat_template and "FILE"}
    has |= {"text": own.text, "source": own.source, "match": own.match, "shape": own.shape and own.shape.name}
    same: dict[str, Callable[[Any], bool]] = {
        "text": lambda text: same_text(text, own.text, own.data_digest, own.text_column)
    }
    if own.tokenizer is not None:
        its_tokenizer = own.tokenizer
        same["tokenizer"] = lambda folder: folder.absolute() == its_tokenizer
    if own.source is not None:
        same["source"] = lambda source: weights_digest(source) == own.source_digest
    elif own.shape is None:
        # A version that did not keep them; the model says whether they are right.
        same |= dict.fromkeys(("shape", "match"), lambda value: True)
    else:
        its_shape = own.shape
        same["shape"] = lambda shape: same_shape(load_shape(shape), its_shape)
    agreed = {name for name, value in others.items() if name in same and same[name](value)}
    rest = {name: value for name, value in others.items() if name not in agreed}
    check_given(folder, rest, has, source="from", text_column="field")
    text, source = others.get("text"), others.get("source")
    return text if isinstance(text, tuple) else None, source if isinstance(source, Path) else None
