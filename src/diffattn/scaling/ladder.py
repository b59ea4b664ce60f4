"""A ladder: pairs of growing size, trained on the same number of tokens; one row of JSON a run.

The rows are what a scaling law is fitted to (``scaling/fit.py``). A run whose row exists is skipped, a run that was
cut goes on from its last checkpoint, and several processes may work on one ladder: each takes runs that no other has.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffattn.config_fields import is_count, is_measure
from diffattn.data.mixture import check_share, with_needles
from diffattn.data.packing import PreparedData, prepare_data
from diffattn.data.text import read_corpus
from diffattn.errors import DataError, one_line
from diffattn.files import parse_json, writable_folder
from diffattn.folders import LADDER, own_folder
from diffattn.machine import Provenance
from diffattn.model.pairing import parameters_of
from diffattn.plan.cost import flops_per_token
from diffattn.plan.shape import ModelShape
from diffattn.progress import OnStage, Stage, unseen
from diffattn.results.ladder import LadderRow, LadderRun
from diffattn.scaling.arms import ARMS, Arm
from diffattn.scaling.options import LadderOptions
from diffattn.sealed import append_row, unbroken
from diffattn.train.callbacks import Progress
from diffattn.train.lock import InUseError
from diffattn.train.recipe import Recipe
from diffattn.train.run import train
from diffattn.train.single import new_folder

ROWS = "rows.jsonl"
# What a field of a row has to be, by its key in the file.
_WORDS = ("attention", "match", "dtype", "data_digest")
_COUNTS = ("seed", "hidden_size", "num_layers", "num_heads", "vocab_size", "context", "tokens", "batch_size",
           "parameters", "non_embedding_parameters")  # fmt: skip
_MEASURES = ("learning_rate", "val_loss", "bits_per_byte", "train_tokens_per_second", "model_flops_per_token")


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
    """An estimate for all that is left, as if this process did it alone; None before anything is timed."""
    step: Progress | None = None
    """The progress of the run; None at its start."""


def run_ladder(
    options: LadderOptions | None = None,
    *,
    out: str | Path,
    command: str = "diffattn.run_ladder(...)",
    on_progress: Callable[[LadderProgress], None] = lambda progress: None,
    on_stage: OnStage = unseen,
    on_note: Callable[[str], None] = lambda line: None,
) -> list[LadderRow]:
    """Trains every variant, size and seed that has no row yet, smallest first, and appends a row for each.

    Call it again, or in several processes at once, with the same ``out``: what is done is skipped. The run folders in
    ``out`` may be deleted once their rows exist; a copy of ``rows.jsonl`` in a new folder is enough to go on.

    Args:
        options: the sizes, variants and seeds; default: those of :class:`LadderOptions`.
        out: folder of ``rows.jsonl`` and of the run folders.
        command: the command that made the rows, to be named in each.
        on_progress: called at the start of each run and after each step.
        on_stage: called with what is done beside the steps, and how much of it is.
        on_note: called with a line about the text that a person should see.

    Returns:
        The rows of this ladder, in order of size, seed and variant.

    Raises:
        ConfigError, DataError: options, text or rows that cannot be used.
        TrainingError: a run diverged or the disk is full; other rows are kept.
        KeyboardInterrupt: Ctrl-C; the run goes on from its last step the next time.
    """
    options = options or LadderOptions()
    _check(options)
    folder = own_folder(out, LADDER)
    # A damaged row is named before any work.
    read_rows(folder / ROWS)
    writable_folder(folder)
    on_stage(Stage("reading the text"))
    corpus = read_corpus(options.text, text_column=options.text_column, on_note=on_note)
    data = prepare_data(corpus, vocab_size=options.vocab_size, context=options.context, on_stage=on_stage)
    if options.needles:
        on_stage(Stage("hiding numbers in the text"))
    data = with_needles(data, corpus, share=options.needles)
    runs = [
        _Run(options, shape, arm, seed, data)
        for shape in options.shapes()
        for seed in range(options.seeds)
        for arm in options.variants
    ]
    for index, run in enumerate(runs):
        if run.facts.key in _by_key(folder):
            continue
        with contextlib.ExitStack() as stack:
            try:
                own = stack.enter_context(new_folder(folder / run.name))
            except InUseError:
                continue
            # Read again: the process that had the folder until now may have written its row.
            rows = _by_key(folder)
            if run.facts.key in rows:
                continue
            report = functools.partial(_report, on_progress, runs, index, rows)
            report(None)
            append_row(folder / ROWS, run.row(own, command, report, on_stage).to_json())
    rows = _by_key(folder)
    return [rows[run.facts.key] for run in runs if run.facts.key in rows]


def _check(options: LadderOptions) -> None:
    """Refuses what could not be trained, before anything is read or written."""
    check_share(options.needles)
    for shape in options.shapes():
        for name in options.variants:
            ARMS[name].config(shape, options.match)


def _by_key(folder: Path) -> dict[tuple[object, ...], LadderRow]:
    """Returns the rows in a folder by what tells one run from another."""
    return {row.key: row for row in read_rows(folder / ROWS)}


def read_rows(path: str | Path) -> list[LadderRow]:
    """Returns the rows of a ladder; a missing file has none.

    Raises:
        DataError: a line that is no JSON object with the fields of a row, or that was changed since it was written.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        given = f"{path} cannot be read ({error.strerror})"
        raise DataError(given, "the rows of a ladder there", "check the path and its rights") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip() and number == len(lines):
            break
        try:
            rows.append(_row(line))
        except ValueError as error:
            raise DataError(
                f"{path} line {number} is damaged ({one_line(error)})",
                "a row of a ladder, in JSON with all of its fields",
                "remove the line, and its run is trained again",
            ) from None
    return rows


def _row(line: bytes) -> LadderRow:
    """Returns the row that a line holds.

    Raises:
        ValueError: what is wrong with it, in a few words.
    """
    content = parse_json(line)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    row = LadderRow.from_json(content)
    right = {name: isinstance(content[name], str) for name in _WORDS}
    right |= {name: is_count(content[name]) for name in _COUNTS}
    right |= {name: is_measure(content[name]) and content[name] > 0 for name in _MEASURES}
    if wrong := [name for name, good in right.items() if not good]:
        raise ValueError(f"its {wrong[0]} is {content[wrong[0]]!r:.40}")
    if not unbroken(content):
        raise ValueError("it was changed after it was written: its seal does not fit the rest")
    return row


@dataclass(frozen=True)
class _Run:
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
        digest = "-".join(str(part) for part in (self.recipe.steps, f"{self.recipe.learning_rate:g}"))
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

    def row(self, folder: Path, command: str, on_step: Callable[[Progress], None], on_stage: OnStage) -> LadderRow:
        """Trains, or goes on training, and measures."""
        model = self.arm.build(self.shape, seed=self.seed, match=self.options.match).model
        result = train(model, self.data, self.recipe, folder, resume=True, on_progress=on_step, on_stage=on_stage)
        return LadderRow(
            **vars(self.facts),
            val_loss=result.val_loss,
            bits_per_byte=result.bits_per_byte,
            train_tokens_per_second=result.train_tokens_per_second,
            versions=Provenance.here().to_json(),
            command=command,
        )


def _work(run: LadderRun) -> float:
    """Returns a measure of a run's time that is good enough to compare runs: larger models keep a machine busier."""
    return run.model_flops_per_token**0.75 * run.tokens


def _report(
    on_progress: Callable[[LadderProgress], None],
    runs: list[_Run],
    index: int,
    rows: Mapping[tuple[object, ...], LadderRow],
    step: Progress | None,
) -> None:
    """Says how far the ladder is, with an estimate of what is left from the runs that are done."""
    run = runs[index]
    left = [other for other in runs if other.facts.key not in rows]
    # Seconds for each unit of work, as measured.
    paces = [row.tokens / row.train_tokens_per_second / _work(row) for row in rows.values()]
    if step is not None:
        paces.append(run.facts.tokens / step.tokens_per_second / _work(run.facts))
    seconds = None
    if paces:
        seconds = paces[-1] * sum(_work(other.facts) for other in left if other is not run)
        seconds += step.seconds_left if step is not None else paces[-1] * _work(run.facts)
    size, done = run.facts.non_embedding_parameters, len(runs) - len(left)
    on_progress(LadderProgress(run.name_of_arm, size, run.seed, done, len(runs), seconds, step))
