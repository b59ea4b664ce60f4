"""A ladder: pairs of growing size, trained on the same number of tokens; one row of JSON a run.

The rows are what a scaling law is fitted to (``scaling/fit.py``). A run whose row exists is skipped, a run that was
cut goes on from its last checkpoint, and several processes may work on one ladder: each takes runs that no other has.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffattn.config_fields import is_count, is_measure
from diffattn.data.mixture import check_share, with_needles
from diffattn.data.packing import PreparedData, prepare_data
from diffattn.data.text import read_corpus
from diffattn.errors import ConfigError, DataError
from diffattn.files import parse_json, writable_folder
from diffattn.folders import LADDER, own_folder
from diffattn.machine import versions
from diffattn.model.pairing import MATCHES, parameters_of
from diffattn.names import one_of
from diffattn.plan.cost import count_parameters, flops_per_token
from diffattn.plan.rule import parse_count, shape_about
from diffattn.plan.shape import ModelShape
from diffattn.progress import OnStage, Stage, unseen
from diffattn.scaling.arms import ARMS, Arm
from diffattn.sealed import append_row, unbroken
from diffattn.train.callbacks import Progress
from diffattn.train.lock import InUseError
from diffattn.train.recipe import Recipe
from diffattn.train.run import train
from diffattn.train.single import new_folder
from diffattn.variants import DEFAULT_VARIANTS

ROWS = "rows.jsonl"
_KEY = ("attention", "seed", "hidden_size", "num_layers", "num_heads", "vocab_size", "context", "tokens",
        "learning_rate", "batch_size", "match", "dtype", "data_digest")  # fmt: skip
_COUNTS = ("seed", "hidden_size", "num_layers", "num_heads", "vocab_size", "context", "tokens", "batch_size",
           "parameters", "non_embedding_parameters")  # fmt: skip
_MEASURES = ("learning_rate", "val_loss", "bits_per_byte", "train_tokens_per_second", "model_flops_per_token")


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """What is trained; the fields are the options of ``diffattn scale run``."""

    sizes: tuple[str, ...] = ("200k", "550k", "1.2M", "1.9M", "4.2M")
    """Non-embedding parameters of the softmax models; the nearest shapes of ``diffattn.plan.rule.shape_about``."""
    tokens: str = "8M"
    """Training tokens of every run, rounded up to whole steps; the same for every size."""
    variants: tuple[str, ...] = DEFAULT_VARIANTS
    """What is trained at every size: names in ``diffattn.scaling.arms.ARMS``."""
    seeds: int = 3
    """Pairs at every size."""
    text: str = "sotu"
    """A file, a folder, or the id of a data set."""
    text_column: str = "text"
    """The field of a row that holds the text."""
    vocab_size: int = 1024
    """Tokens of the tokenizer that is trained on the text."""
    context: int = 256
    """Tokens per block."""
    needles: float = 0.0
    """Share of the training tokens in pieces in which something earlier is to be looked up; pieces grow over the run
    (``diffattn.data.mixture``)."""
    batch_size: int = 8
    """Blocks per step."""
    match: str = "parameters"
    """As in ``build_pair``."""
    learning_rate: float | None = None
    """Peak of the schedule, the same for every size; default: the rule of ``learning_rate_for``."""
    device: str = "auto"
    """``auto``, ``cpu`` or ``cuda``."""
    dtype: str = "auto"
    """``auto``, ``float32`` or ``bfloat16`` (autocast)."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "variants", tuple(one_of(name, ARMS) for name in self.variants))
        except ConfigError:
            given = " ".join(self.variants)
            raise ConfigError(f"variants holds {given!r}; wanted of {', '.join(ARMS)}: correct the name") from None
        if self.match not in MATCHES:
            raise ConfigError(f"match holds {self.match!r}; wanted of {', '.join(MATCHES)}: correct the name")
        for name in ("sizes", "variants"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ConfigError(f"{name} is {' '.join(getattr(self, name)) or 'empty'}; wanted each at most once")
        if not 1 <= self.seeds <= 1000:
            raise ConfigError(f"seeds is {self.seeds}; wanted a number of pairs, at least 1 and at most 1,000")
        check_share(self.needles)
        parse_count(self.tokens)
        widths = [shape.hidden_size for shape in self.shapes()]
        if len(set(widths)) < len(widths):
            raise ConfigError(
                f"sizes is {' '.join(self.sizes)}; two of them have the same nearest shape, widths are "
                f"{', '.join(map(str, widths))}: move them apart"
            )
        for shape in self.shapes():
            self.recipe(shape, 0)
            for name in self.variants:
                ARMS[name].config(shape, self.match)

    def shapes(self) -> list[ModelShape]:
        """The softmax Transformers to be replaced, in the order of their size."""
        counts = sorted(parse_count(size) for size in self.sizes)
        return [
            shape_about(count, non_embedding=True, vocab_size=self.vocab_size, context=self.context) for count in counts
        ]

    def recipe(self, shape: ModelShape, seed: int) -> Recipe:
        """The recipe of one run."""
        return Recipe(
            steps=math.ceil(parse_count(self.tokens) / (self.batch_size * self.context)),
            seed=seed,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate or learning_rate_for(count_parameters(shape, "softmax").non_embedding),
            device=self.device,
            dtype=self.dtype,
            evaluations=4,
            evaluation_blocks=256,
            checkpoints=10,
        ).resolved()


def learning_rate_for(non_embedding_parameters: int) -> float:
    """The rule for the peak: ``4e-3 · (N / 10⁶)^(−1/3)``, N without the embedding, to two digits; 1e-2 at most.

    >>> learning_rate_for(1_000_000), learning_rate_for(8_000_000)
    (0.004, 0.002)
    """
    return float(f"{min(1e-2, 4e-3 * (non_embedding_parameters / 1e6) ** (-1 / 3)):.2g}")


@dataclass(frozen=True)
class LadderProgress:
    """``done`` of ``runs`` are in the rows; ``seconds_left`` is an estimate for all that is left, as if
    this process did it alone, None before anything is timed."""

    attention: str
    size: int
    seed: int
    done: int
    runs: int
    seconds_left: float | None
    step: Progress | None = None


def run_ladder(
    ladder: Ladder | None = None,
    *,
    out: str | Path,
    command: str = "diffattn.run_ladder(...)",
    on_progress: Callable[[LadderProgress], None] = lambda progress: None,
    on_stage: OnStage = unseen,
    on_note: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Train every variant, size and seed that has no row yet, smallest first, and append a row for each.

    Call it again, or in several processes at once, with the same ``out``: what is done is skipped. The run folders in
    ``out`` may be deleted once their rows exist; a copy of ``rows.jsonl`` in a new folder is enough to go on.

    Args:
        ladder: what is trained.
        out: folder of ``rows.jsonl`` and of the run folders.
        command: what made the rows, to be named in each.
        on_progress: called at the start of each run and after each step.
        on_stage: called with what is done beside the steps, and how much of it is.
        on_note: called with a line about the text that a person should see.

    Returns:
        The rows of this ladder, in order of size, seed and variant. ``parameters`` and ``non_embedding_parameters``
        are those of the model itself; ``tokens`` those that it was trained on; ``val_loss`` in nats per token.

    Raises:
        ConfigError, DataError: options, text or rows that cannot be used.
        TrainingError: a run diverged or the disk is full; other rows are kept.
        KeyboardInterrupt: Ctrl-C; the run goes on from its last step the next time.
    """
    ladder = ladder or Ladder()
    folder = own_folder(out, LADDER)
    # A damaged row is told of before any work.
    read_rows(folder / ROWS)
    writable_folder(folder)
    on_stage(Stage("reading the text"))
    corpus = read_corpus(ladder.text, text_column=ladder.text_column, on_note=on_note)
    data = prepare_data(corpus, vocab_size=ladder.vocab_size, context=ladder.context, on_stage=on_stage)
    if ladder.needles:
        on_stage(Stage("hiding numbers in the text"))
    data = with_needles(data, corpus, share=ladder.needles)
    runs = [
        _Run(ladder, shape, attention, seed, data)
        for shape in ladder.shapes()
        for seed in range(ladder.seeds)
        for attention in ladder.variants
    ]
    for index, run in enumerate(runs):
        if run.key in {_key(row) for row in read_rows(folder / ROWS)}:
            continue
        with contextlib.ExitStack() as stack:
            try:
                place = stack.enter_context(new_folder(folder / run.name))
            except InUseError:
                continue
            # Read again: who had the folder until now may have written its row.
            rows = {_key(row): row for row in read_rows(folder / ROWS)}
            if run.key in rows:
                continue
            report = functools.partial(_report, on_progress, runs, index, rows)
            report(None)
            append_row(folder / ROWS, run.row(place, command, report, on_stage))
    wanted = [run.key for run in runs]
    rows = {_key(row): row for row in read_rows(folder / ROWS)}
    return [rows[key] for key in wanted if key in rows]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ladder; a missing file has none.

    Raises:
        DataError: a line that is no JSON object with the fields of a row, or that was changed since it was written.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); the rows of a ladder are wanted there") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip() and number == len(lines):
            break
        try:
            row = parse_json(line)
            if reason := _flaw(row):
                raise ValueError(reason)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{path} line {number} given; a row of a ladder is wanted, in JSON with all of its fields "
                f"({reason}): remove the line, and its run is trained again"
            ) from None
        rows.append(row)
    return rows


def _flaw(row: Any) -> str | None:
    """What is wrong with a row, in a few words."""
    if not isinstance(row, dict):
        return f"it holds a {type(row).__name__}"
    if missing := [name for name in (*_KEY, *_COUNTS, *_MEASURES) if name not in row]:
        return f"it has no {missing[0]}"
    wanted = {name: isinstance(row[name], str) for name in ("attention", "match", "dtype", "data_digest")}
    wanted |= {name: is_count(row[name]) for name in _COUNTS}
    wanted |= {name: is_measure(row[name]) and row[name] > 0 for name in _MEASURES}
    if wrong := [name for name, right in wanted.items() if not right]:
        return f"its {wrong[0]} is {row[wrong[0]]!r:.40}"
    return None if unbroken(row) else "it was changed after it was written: its seal does not fit the rest"


@dataclass(frozen=True)
class _Run:
    ladder: Ladder
    shape: ModelShape
    attention: str
    seed: int
    data: PreparedData

    @property
    def arm(self) -> Arm:
        return ARMS[self.attention]

    @functools.cached_property
    def recipe(self) -> Recipe:
        return self.ladder.recipe(self.shape, self.seed)

    @property
    def name(self) -> str:
        digest = "-".join(str(part) for part in (self.recipe.steps, f"{self.recipe.learning_rate:g}"))
        return f"{self.attention}-{self.shape.hidden_size}x{self.shape.num_layers}-seed{self.seed}-{digest}"

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What tells this run from others, known before it is trained."""
        config = self.arm.config(self.shape, self.ladder.match)
        built = config.shape()
        counted = parameters_of(config)
        flops = flops_per_token(built, self.arm.attention, context=self.ladder.context, phase="training")
        return {
            "attention": self.attention,
            "seed": self.seed,
            "parameters": counted.total,
            "non_embedding_parameters": counted.non_embedding,
            "tokens": self.recipe.steps * self.recipe.tokens_per_step(self.ladder.context),
            "hidden_size": built.hidden_size,
            "num_layers": built.num_layers,
            "num_heads": built.num_heads,
            "intermediate_size": built.intermediate_size,
            "vocab_size": built.vocab_size,
            "context": self.ladder.context,
            "needles": self.ladder.needles,
            "batch_size": self.ladder.batch_size,
            "match": self.ladder.match,
            "learning_rate": self.recipe.learning_rate,
            "dtype": self.recipe.dtype,
            "model_flops_per_token": flops.model,
            "data_digest": self.data.facts["digest"],
        }

    @property
    def key(self) -> tuple[Any, ...]:
        return _key(self.facts)

    def row(self, folder: Path, command: str, on_step: Callable[[Progress], None], on_stage: OnStage) -> dict[str, Any]:
        """Train, or go on training, and measure."""
        model = self.arm.build(self.shape, seed=self.seed, match=self.ladder.match).model
        result = train(model, self.data, self.recipe, folder, resume=True, on_progress=on_step, on_stage=on_stage)
        return self.facts | {
            "val_loss": result.val_loss,
            "bits_per_byte": result.bits_per_byte,
            "train_tokens_per_second": result.train_tokens_per_second,
            "versions": versions(),
            "command": command,
        }


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)


def _work(row: dict[str, Any]) -> float:
    return float(row["model_flops_per_token"]) ** 0.75 * row["tokens"]


def _report(
    on_progress: Callable[[LadderProgress], None],
    runs: list[_Run],
    index: int,
    rows: dict[tuple[Any, ...], dict[str, Any]],
    step: Progress | None,
) -> None:
    run = runs[index]
    left = [other for other in runs if other.key not in rows]
    # Seconds per FLOPs^0.75, measured: larger models keep the machine busier.
    paces = [row["tokens"] / row["train_tokens_per_second"] / _work(row) for row in rows.values()]
    if step is not None:
        paces.append(run.facts["tokens"] / step.tokens_per_second / _work(run.facts))
    seconds = None
    if paces:
        seconds = paces[-1] * sum(_work(other.facts) for other in left if other is not run)
        seconds += step.seconds_left if step is not None else paces[-1] * _work(run.facts)
    size, done = run.facts["non_embedding_parameters"], len(runs) - len(left)
    on_progress(LadderProgress(run.attention, size, run.seed, done, len(runs), seconds, step))
