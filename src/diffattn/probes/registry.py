"""The studies of ``diffattn eval`` as data: what measures a model, its options, the words on its axes.

A study measures a model as *points*: a panel (what is measured), a place on its axis, and one value per sample. Where
a panel has two axes, ``by`` is the place on the second.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffattn.data.needles import Haystack
from diffattn.data.text import Document
from diffattn.data.tokenizer import encode_documents
from diffattn.errors import ConfigError, DataError
from diffattn.model.loading import positions_of
from diffattn.probes.harness import measure_standard
from diffattn.probes.icl import Example, measure_icl, read_examples, synthetic_task
from diffattn.probes.long_context import measure_long_context, with_rope_base
from diffattn.probes.low_bit import measure_low_bit
from diffattn.probes.noise import NOISE, SPANS, measure_noise
from diffattn.probes.options import (
    IclOptions,
    LongContextOptions,
    LowBitOptions,
    NoiseOptions,
    OutlierOptions,
    RetrievalOptions,
    StandardOptions,
    fitted,
)
from diffattn.probes.outliers import measure_outliers
from diffattn.probes.retrieval import measure_retrieval


class Point(NamedTuple):
    """One measured thing: its ``panel``, its place ``x`` on the panel's axis, one value per sample."""

    panel: str
    x: float
    values: list[float]
    by: float | None = None


class Given(NamedTuple):
    """One run as a study meets it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    documents: tuple[Document, ...]
    on_progress: Callable[[int, int], None]
    # Where a study may keep what it has done of the run, a file of its own.
    rows: Path | None = None


@dataclass(frozen=True)
class Study:
    """A study as data: what runs it, and the words on its axes; its options are in ``options.py``."""

    measure: Callable[[Given, Any], Iterator[Point]]
    x: str
    y: str
    logarithmic: bool = False
    by: str = ""


def _noise_maps(given: Given, options: NoiseOptions) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is measured of each map, with what goes before its panels' names."""
    result = measure_noise(
        given.model, Haystack(given.documents, given.tokenizer), options, on_progress=given.on_progress
    )
    # First the map that meets the values, which every model has; then a differential model's two apart.
    *apart, used = result["maps"]
    yield "", result["maps"][used]
    for name in apart:
        yield f"{name}: ", result["maps"][name]


def _noise(given: Given, options: NoiseOptions) -> Iterator[Point]:
    columns = {"answer": [SPANS.index("answer")], "noise": [SPANS.index(name) for name in NOISE]}
    for name, found in _noise_maps(given, options):
        shares = np.array(found["shares"])
        for what, spans in columns.items():
            for depth, values in zip(options.depths, shares[..., spans].sum(-1), strict=True):
                yield Point(f"{name}{what}", depth, values.tolist())


def _noise_by_head(given: Given, options: NoiseOptions) -> Iterator[Point]:
    for name, found in _noise_maps(given, options):
        for what, layers in found["by_head"].items():
            for layer, heads in enumerate(layers):
                for head, share in enumerate(heads):
                    yield Point(f"{name}{what}", head, [share], layer)


def _retrieval(given: Given, options: RetrievalOptions) -> Iterator[Point]:
    rows = measure_retrieval(
        given.model,
        Haystack(given.documents, given.tokenizer),
        options,
        rows=given.rows,
        on_progress=lambda done, all_, _: given.on_progress(done, all_),
    )
    for row in rows:
        hidden = "1 needle" if row["needles"] == 1 else f"{row['needles']} needles"
        panel = f"{hidden}, {row['queries']} asked for"
        yield Point(panel, row["depth"], [float(right) for right in row["correct"]], row["length"])


def _icl(given: Given, options: IclOptions) -> Iterator[Point]:
    examples = _examples(options)
    result = measure_icl(given.model, given.tokenizer, examples, options, on_progress=given.on_progress)
    for shots, right in result["accuracy"].items():
        yield Point("accuracy", int(shots), [float(value) for value in right])
    for kind, entry in result["permutations"].items():
        yield Point(f"best − worst order, {kind}", max(options.shots), [entry["spread"]])


def _outliers(given: Given, options: OutlierOptions) -> Iterator[Point]:
    blocks = _blocks(given, fitted(options, positions_of(given.model.config)).context)
    batches = (torch.stack(batch) for batch in _batched(blocks, options.batch_size))
    result = measure_outliers(given.model, batches, tokens=options.tokens, on_progress=given.on_progress)
    for what in ("attention_logits", "hidden_states"):
        for name, value in result[what].items():
            panel = what.replace("_", " ")
            rank = name.removeprefix("top_")
            yield Point(
                f"{panel}, median" if rank == "median" else panel, 1 if rank == "median" else int(rank), [value]
            )


def _low_bit(given: Given, options: LowBitOptions) -> Iterator[Point]:
    context = fitted(options, positions_of(given.model.config)).context
    blocks = _first(_blocks(given, context), options.samples, context)
    result = measure_low_bit(
        given.model, [block[None] for block in blocks], bits=options.bits, on_progress=given.on_progress
    )
    for what, name in (("loss", "loss, nats per token"), ("accuracy", "next-token accuracy")):
        for bits, entry in result.items():
            yield Point(name, int(bits), entry[what])


def _long_context(given: Given, options: LongContextOptions) -> Iterator[Point]:
    model = given.model
    length = fitted(options, positions_of(model.config)).length
    if options.rope_base is not None:
        model = with_rope_base(model, options.rope_base)
    texts = _first(_blocks(given, length + 1), options.samples, length + 1)
    result = measure_long_context(model, texts, length=length, chunk=options.chunk, on_progress=given.on_progress)
    for index, position in enumerate(result["positions"]):
        yield Point("loss up to a position, nats per token", position, [losses[index] for losses in result["loss"]])


def _standard(given: Given, options: StandardOptions) -> Iterator[Point]:
    measured = measure_standard(given.model, given.tokenizer, given.documents, options)
    # How far it is within them, lm-eval shows itself.
    given.on_progress(len(options.tasks), len(options.tasks))
    for task, found in measured.items():
        for metric, values in found["values"].items():
            yield Point(f"{task}, {metric.replace('_', ' ')}", found["shots"], values)


STUDIES: dict[str, Study] = {
    "retrieval": Study(_retrieval, "depth of the first needle", "exact answers", by="tokens"),
    "noise": Study(_noise, "depth of the needle", "share of attention"),
    "noise_by_head": Study(_noise_by_head, "head", "share of attention", by="layer"),
    "icl": Study(_icl, "demonstrations", "accuracy", logarithmic=True),
    "outliers": Study(_outliers, "rank", "magnitude", logarithmic=True),
    "low_bit": Study(_low_bit, "bits of the attention logits", ""),
    "long_context": Study(_long_context, "position", "", logarithmic=True),
    "standard": Study(_standard, "demonstrations", ""),
}


def _examples(options: IclOptions) -> list[Example]:
    if options.data is not None:
        return read_examples(options.data, text=options.text_column, label=options.label_column)
    return synthetic_task(options.labels, examples=max(options.shots) + options.queries, seed=options.seed)


def _blocks(given: Given, length: int) -> Iterator[Tensor]:
    """The held-out text in the model's own tokens, in blocks of one length; each begins with a document or goes on."""
    rest: list[int] = []
    documents = (dataclasses.replace(document, text=document.text.rstrip()) for document in given.documents)
    for run in encode_documents(given.tokenizer, documents):
        rest += run
        whole = len(rest) // length * length
        yield from torch.tensor(rest[:whole]).view(-1, length)
        rest = rest[whole:]


def _first(blocks: Iterator[Tensor], count: int, length: int) -> list[Tensor]:
    if count < 1:
        raise ConfigError(f"samples is {count}; wanted at least 1")
    found = list(itertools.islice(blocks, count))
    if len(found) < count:
        raise DataError(
            f"the held-out text has {len(found)} blocks of {length} tokens; wanted {count}: give more text or ask for "
            "fewer"
        )
    return found


def _batched(blocks: Iterator[Tensor], size: int) -> Iterator[list[Tensor]]:
    if size < 1:
        raise ConfigError(f"batch_size is {size}; wanted at least 1")
    while batch := list(itertools.islice(blocks, size)):
        yield batch
