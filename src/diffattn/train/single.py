"""``diffattn train``: trains one model of a shape, from text to a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from diffattn.data.packing import prepare_data
from diffattn.data.tokenizer import vocabulary_rows
from diffattn.errors import ConfigError, DiffattnError
from diffattn.files import writable_folder
from diffattn.folders import RUN, own_folder
from diffattn.model.loading import load_tokenizer
from diffattn.model.pairing import build_pair, pair_config
from diffattn.plan.named_model import load_shape
from diffattn.plan.shape import ModelShape
from diffattn.progress import OnStage, Stage, unseen
from diffattn.train.callbacks import Progress
from diffattn.train.lock import held
from diffattn.train.masked import with_mask
from diffattn.train.options import TrainOptions
from diffattn.train.own import check_resumable, to_keep
from diffattn.train.recipe import CAUSAL, MASKED, Recipe
from diffattn.train.record import TrainResult
from diffattn.train.run import check_new, train
from diffattn.train.spread.layout import Layout
from diffattn.train.spread.ranks import Ranks, joined
from diffattn.train.trackers.callback import check_trackers


def train_shape(
    shape: ModelShape | str,
    attention: str,
    recipe: Recipe,
    out: str | Path,
    *,
    text: str | Path | Sequence[str | Path] = TrainOptions.text,
    text_column: str = TrainOptions.text_column,
    context: int | None = TrainOptions.context,
    match: str = TrainOptions.match,
    tokenizer: str | Path | None = TrainOptions.tokenizer,
    lossy_tokenizer: bool = TrainOptions.lossy_tokenizer,
    chat_template: str | None = None,
    track: Sequence[str] = TrainOptions.track,
    layout: Layout | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    on_stage: OnStage = unseen,
    on_note: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Prepares text, builds one variant of a shape with the recipe's seed, and trains it.

    On several ranks all call this alike. The first rank of each host prepares the text while its others wait; rank 0
    alone writes the folder and calls ``on_progress``, ``on_stage`` and ``on_note``.

    Args:
        shape: the softmax Transformer to be replaced, or the name of its preset or TOML file.
        attention: the variant.
        recipe: the settings of the run.
        out: the run folder; it must not hold a run unless ``resume``.
        text, text_column, match, tokenizer, lossy_tokenizer, track: see
            :class:`diffattn.train.options.TrainOptions`.
        chat_template: the template itself, for the tokenizer in the model's folder. Default: the tokenizer's own.
        context: tokens per block; default and upper limit: the shape's ``max_position_embeddings``.
        layout: how the run is spread over ranks and computed, which changes no result. Default: ``Layout()``.
        resume: continue from the last good checkpoint in ``out``.
        on_progress: called after each step.
        on_stage: called with each stage of the work beside the steps.
        on_note: called with a line about the text that a person should see.

    Raises:
        CheckpointError, ConfigError, DataError: nothing was written.
        TrainingError, KeyboardInterrupt: the same as :func:`diffattn.train.run.train`.
    """
    shape = shape if isinstance(shape, ModelShape) else load_shape(shape)
    layout, recipe = layout or Layout(), recipe.resolved()
    causal = recipe.objective == CAUSAL
    pair_config(shape, attention, match=match).check_tensor_parallel(layout.tensor_parallel)
    context = check_context(shape, context)
    track = check_trackers(track)
    given = None if tokenizer is None else fitting_tokenizer(Path(tokenizer), shape.vocab_size, whose="shape")
    options = to_keep(
        text, context, text_column, shape=shape, attention=attention, match=match, track=track, layout=layout.to_dict(),
        tokenizer=None if tokenizer is None else str(Path(tokenizer).absolute()), lossy_tokenizer=lossy_tokenizer,
        chat_template=chat_template,
    )  # fmt: skip
    with joined(recipe.device, recipe.to_dict() | layout.to_dict() | options) as ranks:
        layout.check(ranks.world, recipe.batch_size)
        ranks.share(lambda: check_out(out, resume))
        if not ranks.is_first:
            on_stage, on_note = unseen, lambda line: None
        with folder_of_ranks(Path(out), ranks) as folder:
            data = ranks.first_on_host(
                lambda: prepare_data(
                    text, vocab_size=trained_rows(shape, recipe) if given is None else None, tokenizer=given,
                    context=context, text_column=text_column, lossy_tokenizer=lossy_tokenizer,
                    chat_template=chat_template, on_stage=on_stage, on_note=on_note,
                )
            )  # fmt: skip
            data = data if causal else with_mask(data, shape.vocab_size)
            on_stage(Stage("building the model"))
            model = build_pair(shape, attention, seed=recipe.seed, match=match, is_causal=causal).model
            return train(
                model, data, recipe, folder, options=options, track=track, layout=layout, resume=resume,
                on_progress=on_progress, on_stage=on_stage,
            )  # fmt: skip


def trained_rows(shape: ModelShape, recipe: Recipe) -> int:
    """Returns the tokens of a tokenizer that is trained for a shape: a row each, but for that of the mask token."""
    return shape.vocab_size - (recipe.objective == MASKED)


def check_context(shape: ModelShape, context: int | None, *, whose: str = "shape") -> int:
    """Returns the given context, or by default the shape's; raises if it is longer than the shape's positions."""
    context = shape.max_position_embeddings if context is None else context
    if not 2 <= context <= shape.max_position_embeddings:
        more = ", or write a shape with more positions" if whose == "shape" else ""
        raise ConfigError(
            f"context is {context}",
            f"2 to {shape.max_position_embeddings}, the {whose}'s max_position_embeddings",
            f"change it{more}",
        )
    return context


def fitting_tokenizer(folder: Path, rows: int, *, whose: str) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a folder; raises if it has more tokens than a model or a shape has rows."""
    tokenizer = load_tokenizer(folder)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"the tokenizer in {folder} is {type(tokenizer).__name__}",
            "one with a tokenizer.json",
            "save it again with a recent transformers",
        )
    needed = vocabulary_rows(tokenizer)
    if needed > rows:
        way = "take the tokenizer that belongs to the model"
        if whose == "shape":
            way = f"write a shape with vocab_size = {needed} into a TOML file for --shape, or take another tokenizer"
        raise ConfigError(
            f"the tokenizer in {folder} has ids up to {needed - 1}, the {whose} {rows} rows", "a row for each id", way
        )
    return tokenizer


def check_out(out: str | Path, resume: bool) -> None:
    """Raises if a run is to be resumed and there is none, or is to be started and something is there."""
    check_resumable(out, resume)
    check_new(own_folder(out, RUN), resume)


def folder_of_ranks(path: Path, ranks: Ranks) -> contextlib.AbstractContextManager[Path]:
    """Does as :func:`new_folder` on rank 0, and nothing on the others, which use the folder that it has."""
    return new_folder(path) if ranks.is_first else contextlib.nullcontext(path)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Makes and locks a run folder; if an error ends the block, removes the folders that are still empty.

    Raises:
        InUseError: another process trains in it.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        with held(writable_folder(path)):
            yield path
    except DiffattnError:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
