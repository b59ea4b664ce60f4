"""``diffattn train --resume``: continues a run with the options in its folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from diffattn.plan.shape import ModelShape
from diffattn.progress import OnStage, unseen
from diffattn.rank import rank_here
from diffattn.train.callbacks import Progress
from diffattn.train.continued import continue_training
from diffattn.train.options import TrainOptions
from diffattn.train.own import read_own
from diffattn.train.record import TrainResult
from diffattn.train.single import train_shape
from diffattn.train.spread.layout import Layout


def resume_training(
    out: str | Path,
    *,
    text: str | Path | Sequence[str | Path] | None = None,
    source: str | Path | None = None,
    shape: ModelShape | str = TrainOptions.shape,
    match: str = TrainOptions.match,
    track: Sequence[str] | None = None,
    layout: Layout | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_stage: OnStage = unseen,
    on_note: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Continues the run in a folder with the options that it was started with; returns its result if it is finished.

    Args:
        out: a folder that :func:`diffattn.train.single.train_shape` or
            :func:`diffattn.train.continued.continue_training` wrote.
        text: the new path of its text, or paths of its texts, if that was moved; the content has to be the same.
        source: the new path of the model that it started from, if that was moved.
        shape, match: the shape of a run whose folder lacks it, because an earlier version of diffattn began it.
        track: the trackers from now on. Default: those that it was started with.
        layout: how the run goes on, spread over any number of ranks. Default: as it was begun, as far as the number of
            ranks allows.
        on_progress: called after each step.
        on_stage: called with each stage of the work beside the steps.
        on_note: called with a line about the text that a person should see.

    Raises:
        ConfigError: there is no run, or another process has it.
        CheckpointError: a file of the run is damaged, or was changed after it was written.
        DataError, TrainingError, KeyboardInterrupt: as in :func:`diffattn.train.run.train`.
    """
    own = read_own(Path(out))
    text = own.text if text is None else text
    source = own.source if source is None else source
    track = own.track if track is None else track
    layout = own.layout.going_on(rank_here().world) if layout is None else layout
    if own.source is not None and source is not None:
        return continue_training(
            source, own.recipe, out, text=text, text_column=own.text_column, context=own.context,
            lossy_tokenizer=own.lossy_tokenizer, chat_template=own.chat_template, track=track, layout=layout,
            resume=True, on_progress=on_progress, on_stage=on_stage, on_note=on_note,
        )  # fmt: skip
    return train_shape(
        own.shape or shape, own.attention, own.recipe, out, text=text, text_column=own.text_column,
        context=own.context, match=own.match or match, tokenizer=own.tokenizer, lossy_tokenizer=own.lossy_tokenizer,
        chat_template=own.chat_template, track=track, layout=layout, resume=True, on_progress=on_progress,
        on_stage=on_stage, on_note=on_note,
    )  # fmt: skip
