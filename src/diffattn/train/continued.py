"""``diffattn train --from``: trains an existing model of ours further, with its own tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from diffattn.checkpoint_files import printable, read_config, weights_digest
from diffattn.data.packing import prepare_data
from diffattn.errors import ConfigError
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.loading import check_weights, load_config, load_model
from diffattn.progress import OnStage, Stage, unseen
from diffattn.train.callbacks import Progress
from diffattn.train.options import TrainOptions
from diffattn.train.own import to_keep
from diffattn.train.recipe import CAUSAL, Recipe
from diffattn.train.record import TrainResult
from diffattn.train.run import train
from diffattn.train.single import check_context, check_out, fitting_tokenizer, folder_of_ranks
from diffattn.train.spread.layout import Layout
from diffattn.train.spread.ranks import joined
from diffattn.train.trackers.callback import check_trackers

CONTEXT = 512
"""The default tokens per block: pretrained models have contexts that no small machine can train."""
LEARNING_RATE = 1e-4
"""The default learning rate: at the rates of new models a pretrained model forgets what it knows."""

_MODEL = DiffTransformerConfig.model_type


def continue_training(
    source: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    text: str | Path | Sequence[str | Path] = TrainOptions.text,
    text_column: str = TrainOptions.text_column,
    context: int | None = TrainOptions.context,
    lossy_tokenizer: bool = TrainOptions.lossy_tokenizer,
    chat_template: str | None = None,
    track: Sequence[str] = TrainOptions.track,
    layout: Layout | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    on_stage: OnStage = unseen,
    on_note: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Trains an existing model further on text in its own tokens; a run like any other, with one more row of metrics.

    ``metrics.jsonl`` begins with the held-out loss at step 0, before the first step, so that the curves of a model and
    of its conversion can be drawn in one chart. The optimizer starts anew.

    Args:
        source: a folder with one of our models and its tokenizer, such as one that ``diffattn convert`` or a run wrote.
        recipe: the settings of the run; the seed decides the order of the data. ``LEARNING_RATE`` suits a pretrained
            model better than the recipe's default.
        out: the run folder; it must not hold a run unless ``resume``.
        text, text_column, lossy_tokenizer, track: see :class:`diffattn.train.options.TrainOptions`.
        chat_template: the template itself, for the tokenizer in the model's folder. Default: the tokenizer's own.
        context: tokens per block. Default: ``CONTEXT``, or the model's ``max_position_embeddings`` if that is less.
        layout: how the run is spread over ranks and computed, which changes no result. Default: ``Layout()``.
        resume: continue from the last good checkpoint in ``out``; ``source`` still has to be the same model.
        on_progress: called after each step.
        on_stage: called with each stage of the work beside the steps.
        on_note: called with a line about the text that a person should see, such as how much the tokenizer loses.

    Raises:
        CheckpointError: a folder without a whole model, or without a tokenizer that can be read.
        ConfigError: another library's model, more tokens than the model has rows, a context that is too long, or a
            tokenizer that loses text.
        DataError: text that cannot be read, or is too short.
        TrainingError, KeyboardInterrupt: as in :func:`diffattn.train.run.train`.
    """
    source = Path(source)
    layout, recipe = layout or Layout(), recipe.resolved()
    if recipe.objective != CAUSAL:
        raise ConfigError(
            f"objective is {recipe.objective!r} with --from", "a new model of a shape", "leave out one of the two"
        )
    config = _read_config(source)
    config.check_tensor_parallel(layout.tensor_parallel)
    tokenizer = fitting_tokenizer(source, config.vocab_size, whose="model")
    # This comes before the data is prepared, which can take long.
    check_weights(source)
    default = min(config.max_position_embeddings, CONTEXT)
    context = check_context(config.shape(), default if context is None else context, whose="model")
    track = check_trackers(track)
    origin = {"folder": str(source.resolve()), "digest": weights_digest(source)}
    options = to_keep(
        text, context, text_column, lossy_tokenizer=lossy_tokenizer, chat_template=chat_template, track=track,
        layout=layout.to_dict(),
    )  # fmt: skip
    with joined(
        recipe.device, recipe.to_dict() | layout.to_dict() | options | {"the model": origin["digest"]}
    ) as ranks:
        layout.check(ranks.world, recipe.batch_size)
        ranks.share(lambda: check_out(out, resume))
        if not ranks.is_first:
            on_stage, on_note = unseen, lambda line: None
        with folder_of_ranks(Path(out), ranks) as folder:
            data = ranks.first_on_host(
                lambda: prepare_data(
                    text, tokenizer=tokenizer, context=context, text_column=text_column,
                    lossy_tokenizer=lossy_tokenizer, chat_template=chat_template, on_stage=on_stage, on_note=on_note,
                )
            )  # fmt: skip
            on_stage(Stage("loading the model"))
            model = load_model(source, "float32")
            return train(
                model, data, recipe, folder, source=origin, options=options, track=track, layout=layout,
                resume=resume, on_progress=on_progress, on_stage=on_stage,
            )  # fmt: skip


def _read_config(source: Path) -> DiffTransformerConfig:
    kind = read_config(source).get("model_type")
    if kind != _MODEL:
        raise ConfigError(
            f"{source} holds a {printable(str(kind))} model",
            f"a {_MODEL}",
            "convert it with diffattn convert, or name another folder with --from",
        )
    return load_config(source)
