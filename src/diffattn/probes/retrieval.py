"""Retrieval: how often a model copies the magic numbers that were hidden in a long text.

Source: arXiv 2410.05258v2, section 3.4, Table 2 and Figure 5 (N needles, R of them asked for, 5 depths × 50 samples,
exact match).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from diffattn.errors import CheckpointError, ConfigError
from diffattn.files import parse_json
from diffattn.probes.options import DEPTHS, MOST_SAMPLES, MOST_TOGETHER, StudyOptions, fitting_length
from diffattn.probes.study import Point, StudiedModel, Study
from diffattn.results.study import Axes
from diffattn.sealed import SEAL, append_row, unbroken

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from diffattn.data.needles import Haystack, NeedlePrompt


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions(StudyOptions):
    """The options of ``diffattn eval retrieval``."""

    lengths: tuple[int, ...] = ()
    """Tokens of a prompt with its question and answer. Default: 1024, or what the models can read where that is
    less."""
    depths: tuple[float, ...] = DEPTHS
    """Depths at which the first number that is asked for is hidden: 0 is the beginning of the text, 1 its end."""
    tasks: tuple[tuple[int, int], ...] = ((1, 1), (2, 2), (4, 2), (6, 2))
    """Pairs: how many numbers are hidden, and how many of them are asked for."""
    samples: int = 50
    """Prompts for each length, depth and task."""
    batch_size: int = 16
    """Prompts that are answered together."""
    seed: int = 0
    """Random seed for the prompts; models with the same tokenizer get the same ones."""

    def __post_init__(self) -> None:
        self.check_bounds(samples=(1, MOST_SAMPLES), batch_size=(1, MOST_TOGETHER), depths=(0, 1))
        if not self.tasks:
            raise ConfigError("tasks is empty", "at least one pair of numbers", "change --tasks")

    def fitted(self, positions: int | None) -> RetrievalOptions:
        """Returns the options with lengths that fit the models."""
        return replace(self, lengths=tuple(fitting_length(each, positions) for each in self.lengths or (None,)))


class Cell(NamedTuple):
    """Prompts of one kind."""

    length: int
    """Tokens of a prompt with its answer."""
    needles: int
    """Numbers that are hidden."""
    queries: int
    """Numbers that are asked for."""
    depth: float
    """The depth of the first number that is asked for: 0 is the beginning of the text, 1 its end."""
    seed: int
    """The seed of the prompts."""


def measure_retrieval(
    model: PreTrainedModel,
    haystack: Haystack,
    options: RetrievalOptions,
    *,
    rows: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, all_: None,
) -> dict[Cell, list[bool]]:
    """Asks a model for needles.

    Args:
        model: a causal model of ``transformers``.
        haystack: the text, in the model's tokens.
        options: see :class:`RetrievalOptions`.
        rows: a file of JSON lines, to which each cell is appended when it is done; cells that it has are not asked
            again.
        on_progress: called with prompts done and prompts in all.

    Returns:
        For each length, task and depth, whether each sample was answered rightly.

    Raises:
        ConfigError: lengths beyond the model's, or too short for the needles.
        CheckpointError: a line of ``rows`` that was changed after it was written.
    """
    from diffattn.model.loading import positions_of

    cells = [
        Cell(length, needles, queries, depth, options.seed)
        for length in options.fitted(positions_of(model.config)).lengths
        for needles, queries in options.tasks
        for depth in options.depths
    ]
    done = {cell: correct for cell, correct in _read(rows) if len(correct) == options.samples}
    left = sum(cell not in done for cell in cells) * options.samples
    answered = 0
    for cell in cells:
        if cell in done:
            continue
        prompts = [_prompt(haystack, cell, sample) for sample in range(options.samples)]
        correct: list[bool] = []
        for start in range(0, len(prompts), options.batch_size):
            batch = prompts[start : start + options.batch_size]
            correct += answered_rightly(model, haystack, batch)
            answered += len(batch)
            on_progress(answered, left)
        done[cell] = correct
        if rows is not None:
            append_row(rows, cell._asdict() | {"correct": correct})
    return {cell: done[cell] for cell in cells}


def answered_rightly(model: PreTrainedModel, haystack: Haystack, prompts: list[NeedlePrompt]) -> list[bool]:
    """Tells for each prompt if the greedy answer holds the numbers; prompts have one length, so that none is padded."""
    import torch

    from diffattn.data.needles import is_answer

    tokenizer = haystack.tokenizer
    ids = torch.tensor([prompt.ids for prompt in prompts], device=model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=haystack.answer_tokens(len(prompts[0].answers)),
        do_sample=False,
        pad_token_id=pad,
    )
    texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [is_answer(text, prompt.answers) for text, prompt in zip(texts, prompts, strict=True)]


def _prompt(haystack: Haystack, cell: Cell, sample: int) -> NeedlePrompt:
    """Returns one prompt of a cell."""
    import numpy as np

    # Each prompt has its own seed, so adding or removing a cell leaves the others unchanged.
    stream = (cell.seed, cell.length, cell.needles, cell.queries, round(1000 * cell.depth), sample)
    return haystack.prompt(
        np.random.default_rng(stream),
        length=cell.length,
        depth=cell.depth,
        needles=cell.needles,
        queries=cell.queries,
        answered=True,
    )


def _read(rows: Path | None) -> Iterator[tuple[Cell, list[bool]]]:
    """Yields the cells that a file has; a line that was cut counts as none, so that its cell is asked again.

    Raises:
        CheckpointError: a line that was changed after it was written.
    """
    lines = rows.read_bytes().split(b"\n") if rows is not None and rows.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or SEAL not in row:
            continue
        if not unbroken(row):
            raise CheckpointError(
                f"{rows} line {number} was changed after it was written: its seal does not fit the rest",
                "the line as it was",
                "remove it, and its prompts are asked again",
            )
        yield Cell(*(row[name] for name in Cell._fields)), row["correct"]


def _measure(subject: StudiedModel, options: RetrievalOptions) -> Iterator[Point]:
    """Yields the exact answers of each cell."""
    from diffattn.data.needles import Haystack

    haystack = Haystack(subject.documents, subject.tokenizer)
    answers = measure_retrieval(subject.model, haystack, options, rows=subject.rows, on_progress=subject.on_progress)
    for cell, correct in answers.items():
        hidden = "1 needle" if cell.needles == 1 else f"{cell.needles} needles"
        panel = f"{hidden}, {cell.queries} asked for"
        yield Point(panel, cell.depth, [float(right) for right in correct], cell.length)


STUDY = Study(
    name="retrieval",
    title="Retrieval of numbers from a long text",
    sentence="Measure how often a model finds numbers hidden in a long text.",
    source="arXiv 2410.05258v2, section 3.4, Table 2 and Figure 5",
    options=RetrievalOptions,
    measure=_measure,
    axes=Axes(x="depth of the first needle", y="exact answers", by="tokens", logarithmic=False),
)
