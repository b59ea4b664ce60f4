"""``diffattn train``: trains one model of a shape, from text to a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from diffattn.data.packing import prepare_data
from diffattn.errors import ConfigError, DiffattnError
from diffattn.files import writable_folder
from diffattn.folders import RUN, own_folder
from diffattn.model.pairing import build_pair, pair_config
from diffattn.plan.named_model import load_shape
from diffattn.plan.shape import ModelShape
from diffattn.progress import OnStage, Stage, unseen
from diffattn.train.callbacks import Progress
from diffattn.train.lock import held
from diffattn.train.options import TrainOptions
from diffattn.train.own import check_resumable, to_keep
from diffattn.train.recipe import Recipe
from diffattn.train.record import TrainResult
from diffattn.train.run import check_new, train
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
    track: Sequence[str] = TrainOptions.track,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    on_stage: OnStage = unseen,
    on_note: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Prepares text, builds one variant of a shape with the recipe's seed, and trains it.

    Args:
        shape: the softmax Transformer to be replaced, or the name of its preset or TOML file.
        attention: the variant.
        recipe: the settings of the run.
        out: the run folder; it must not hold a run unless ``resume``.
        text, text_column, match, track: see :class:`diffattn.train.options.TrainOptions`.
        context: tokens per block; default and upper limit: the shape's ``max_position_embeddings``.
        resume: continue from the last good checkpoint in ``out``.
        on_progress: called after each step.
        on_stage: called with each stage of the work beside the steps.
        on_note: called with a line about the text that a person should see.

    Raises:
        ConfigError, DataError: nothing was written.
        TrainingError, KeyboardInterrupt: the same as :func:`diffattn.train.run.train`.
    """
    shape = shape if isinstance(shape, ModelShape) else load_shape(shape)
    pair_config(shape, attention, match=match)
    context = check_context(shape, context)
    track = check_trackers(track)
    check_out(out, resume)
    with new_folder(Path(out)) as folder:
        data = prepare_data(
            text, vocab_size=shape.vocab_size, context=context, text_column=text_column, on_stage=on_stage,
            on_note=on_note,
        )  # fmt: skip
        on_stage(Stage("building the model"))
        model = build_pair(shape, attention, seed=recipe.seed, match=match).model
        options = to_keep(text, context, text_column, shape=shape, attention=attention, match=match, track=track)
        return train(
            model, data, recipe, folder, options=options, track=track, resume=resume, on_progress=on_progress,
            on_stage=on_stage,
        )  # fmt: skip


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


def check_out(out: str | Path, resume: bool) -> None:
    """Raises if a run is to be resumed and there is none, or is to be started and something is there."""
    check_resumable(out, resume)
    check_new(own_folder(out, RUN), resume)


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
