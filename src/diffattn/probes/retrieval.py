"""Multi-needle retrieval: how often a model copies the magic numbers that were hidden in a long text.

Source: arXiv 2410.05258v2, section 3.4, Table 2 and Figure 5 (N needles, R of them asked for, 5 depths × 50 samples,
exact match).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from diffattn.data.needles import Haystack, NeedlePrompt, is_answer
from diffattn.errors import CheckpointError
from diffattn.files import parse_json
from diffattn.model.loading import positions_of
from diffattn.probes.options import RetrievalOptions, fitted
from diffattn.sealed import SEAL, append_row, unbroken


class Cell(NamedTuple):
    """Prompts of one kind: length in tokens with the answer, N, R, and the depth of the first needle asked for."""

    length: int
    needles: int
    queries: int
    depth: float
    seed: int


def measure_retrieval(
    model: PreTrainedModel,
    haystack: Haystack,
    options: RetrievalOptions,
    *,
    rows: Path | None = None,
    on_progress: Callable[[int, int, float], None] = lambda done, all_, seconds_left: None,
) -> list[dict[str, Any]]:
    """Ask a model for needles.

    Args:
        model: a causal model of ``transformers``.
        haystack: the text, in the model's tokens.
        options: see :class:`RetrievalOptions`.
        rows: a file of JSON lines, to which each cell is appended when it is done; what it has is not done again.
        on_progress: called with prompts done, prompts in all, and an estimate of the seconds left.

    Returns:
        One row per length, task and depth: ``length``, ``needles``, ``queries``, ``depth``, ``seed``, and ``correct``,
        one truth value per sample.

    Raises:
        ConfigError: lengths beyond the model's, or too short for the needles.
        CheckpointError: a line of ``rows`` that was changed after it was written.
    """
    cells = [
        Cell(length, needles, queries, depth, options.seed)
        for length in fitted(options, positions_of(model.config)).lengths
        for needles, queries in options.tasks
        for depth in options.depths
    ]
    done = {cell: correct for cell, correct in _read(rows) if len(correct) == options.samples}
    left = sum(cell not in done for cell in cells) * options.samples
    began, answered = time.monotonic(), 0
    for cell in cells:
        if cell in done:
            continue
        prompts = [_prompt(haystack, cell, sample) for sample in range(options.samples)]
        correct: list[bool] = []
        for start in range(0, len(prompts), options.batch_size):
            batch = prompts[start : start + options.batch_size]
            correct += answered_rightly(model, haystack, batch)
            answered += len(batch)
            on_progress(answered, left, (time.monotonic() - began) / answered * (left - answered))
        done[cell] = correct
        if rows is not None:
            append_row(rows, cell._asdict() | {"correct": correct})
    return [cell._asdict() | {"correct": done[cell]} for cell in cells]


@torch.no_grad()
def answered_rightly(model: PreTrainedModel, haystack: Haystack, prompts: list[NeedlePrompt]) -> list[bool]:
    """Whether the greedy answers hold the numbers; prompts have one length, so that none is padded."""
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
    """Of a stream of its own, so that a cell more or less does not change the others."""
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
    """What a file has; nothing where there is none. A line that was cut is asked again.

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
                f"{rows} line {number} was changed after it was written: its seal does not fit the rest; remove the "
                "line, and its prompts are asked again"
            )
        yield Cell(*(row[name] for name in Cell._fields)), row["correct"]
