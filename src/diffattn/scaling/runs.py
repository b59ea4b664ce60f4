"""The runs of a ladder: what each trains, the folder and the row of it, and how long those that are left may take."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffattn.data.mixture import with_needles
from diffattn.data.packing import PreparedData, prepare_data
from diffattn.data.text import read_corpus
from diffattn.machine import Provenance
from diffattn.model.pairing import parameters_of
from diffattn.plan.cost import flops_per_token
from diffattn.plan.shape import ModelShape
from diffattn.progress import OnStage, Stage, unseen
from diffattn.results.ladder import LadderRow, LadderRun
from diffattn.scaling.arms import ARMS, Arm
from diffattn.scaling.options import LadderOptions
from diffattn.train.callbacks import Progress
from diffattn.train.recipe import Recipe
from diffattn.train.run import train


@dataclass(frozen=True)
class LadderProgress:
    """The progress of a ladder, at the start of a run and after each of its steps."""

    arm: str
    """The variant, or the variant with one change, that is trained now."""
    size: int
    """The parameters without the embedding."""
    seed: int
    """The seed of the run."""
    done: int
    """The number of runs that have their rows."""
    runs: int
    """The number of all runs."""
    seconds_left: float | None
    """An estimate for all that is left, as if nobody but this call trained it; None before anything is timed."""
    step: Progress | None = None
    """The progress of the run; None at its start."""


@dataclass(frozen=True)
class Missing:
    """A run that has no row, since another process trains it."""

    run: str
    """The name of its folder."""
    by: str
    """Who trains it, such as ``process 12 on host``."""
    key: tuple[object, ...]
    """The key of the row that it will have."""

    def __str__(self) -> str:
        return f"{self.run} ({self.by})"


@dataclass(frozen=True)
class Run:
    """One run of a ladder: an arm, a size and a seed."""

    options: LadderOptions
    shape: ModelShape
    name_of_arm: str
    seed: int
    data: PreparedData

    @property
    def arm(self) -> Arm:
        return ARMS[self.name_of_arm]

    @functools.cached_property
    def recipe(self) -> Recipe:
        return self.options.recipe(self.shape, self.seed)

    @property
    def name(self) -> str:
        """The name of its folder."""
        parts = [str(self.recipe.steps), f"{self.recipe.learning_rate:g}"]
        if self.options.group > 1:
            parts.append(f"group{self.options.group}")
        digest = "-".join(parts)
        return f"{self.name_of_arm}-{self.shape.hidden_size}x{self.shape.num_layers}-seed{self.seed}-{digest}"

    @functools.cached_property
    def facts(self) -> LadderRun:
        """The facts that are known before the run is trained."""
        config = self.arm.config(self.shape, self.options.match)
        built = config.shape()
        counted = parameters_of(config)
        flops = flops_per_token(built, self.arm.attention, context=self.options.context, phase="training")
        return LadderRun(
            arm=self.name_of_arm,
            seed=self.seed,
            parameters=counted.total,
            non_embedding_parameters=counted.non_embedding,
            tokens=self.recipe.steps * self.recipe.tokens_per_step(self.options.context),
            hidden_size=built.hidden_size,
            num_layers=built.num_layers,
            num_heads=built.num_heads,
            group=self.options.group,
            intermediate_size=built.intermediate_size,
            vocab_size=built.vocab_size,
            context=self.options.context,
            needles=self.options.needles,
            batch_size=self.options.batch_size,
            match=self.options.match,
            learning_rate=self.recipe.learning_rate,
            dtype=self.recipe.dtype,
            model_flops_per_token=flops.model,
            data_digest=self.data.facts["digest"],
        )

    def row(
        self, folder: Path, command: str, on_step: Callable[[Progress], None], on_stage: OnStage = unseen
    ) -> LadderRow:
        """Trains, or goes on training, and measures."""
        model = self.arm.build(self.shape, seed=self.seed, match=self.options.match).model
        result = train(model, self.data, self.recipe, folder, resume=True, on_progress=on_step, on_stage=on_stage)
        # Only encoders have none.
        assert result.bits_per_byte is not None
        return LadderRow(
            **vars(self.facts),
            val_loss=result.val_loss,
            bits_per_byte=result.bits_per_byte,
            train_tokens_per_second=result.train_tokens_per_second,
            versions=Provenance.here().to_json(),
            command=command,
        )


def runs_of(
    options: LadderOptions, *, on_stage: OnStage = unseen, on_note: Callable[[str], None] = lambda line: None
) -> list[Run]:
    """Prepares the text and returns all runs in order of size, seed and variant.

    Raises:
        ConfigError, DataError: text that cannot be used.
    """
    data = prepare_data(
        options.text, vocab_size=options.vocab_size, context=options.context, text_column=options.text_column,
        on_stage=on_stage, on_note=on_note,
    )  # fmt: skip
    if options.needles:
        on_stage(Stage("hiding numbers in the text"))
        corpus = read_corpus(options.text, text_column=options.text_column)
        data = with_needles(data, corpus, share=options.needles)
    return [
        Run(options, shape, arm, seed, data)
        for shape in options.shapes()
        for seed in range(options.seeds)
        for arm in options.variants
    ]


def progress_of(run: Run, runs: Sequence[Run], rows: Collection[LadderRow], step: Progress | None) -> LadderProgress:
    """Says how far a ladder is, with an estimate of what is left from the runs that have their ``rows``."""
    done = {row.key for row in rows}
    left = [other for other in runs if other.facts.key not in done]
    # Seconds for each unit of work, as measured.
    paces = [row.tokens / row.train_tokens_per_second / _work(row) for row in rows]
    if step is not None:
        paces.append(run.facts.tokens / step.tokens_per_second / _work(run.facts))
    seconds = None
    if paces:
        seconds = paces[-1] * sum(_work(other.facts) for other in left if other is not run)
        seconds += step.seconds_left if step is not None else paces[-1] * _work(run.facts)
    size, done_runs = run.facts.non_embedding_parameters, len(runs) - len(left)
    return LadderProgress(run.name_of_arm, size, run.seed, done_runs, len(runs), seconds, step)


def _work(run: LadderRun) -> float:
    """Returns a measure of a run's time that is good enough to compare runs: larger models keep a machine busier."""
    return run.model_flops_per_token**0.75 * run.tokens
