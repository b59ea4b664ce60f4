"""A study as a record: its name, its options, the function that measures a model, and the words on its chart.

A study measures a model as *points*: a panel (what is measured), a setting on the panel's axis, and one value for each
sample. Where a panel has two axes, ``by`` is the setting on the second. This file and those of the studies import
torch, numpy and the like only where they measure, so that the command line lists studies and options at once.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from diffattn.errors import ConfigError, DataError
from diffattn.probes.options import StudyOptions
from diffattn.results.study import Axes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from diffattn.data.documents import Document

Options = TypeVar("Options", bound=StudyOptions)


class Point(NamedTuple):
    """One measured thing at one setting."""

    panel: str
    """The measured quantity; the points of one panel are drawn together."""
    x: float
    """The setting on the panel's axis."""
    values: list[float]
    """One value for each sample."""
    by: float | None = None
    """The setting on the panel's second axis; None where it has none."""


@dataclass(frozen=True, kw_only=True)
class StudiedModel:
    """The model that a study measures, with what it is measured on."""

    model: PreTrainedModel
    """A causal model of ``transformers``, ours or another, on its device and in evaluation mode."""
    tokenizer: PreTrainedTokenizerBase
    """The model's own tokenizer."""
    documents: tuple[Document, ...]
    """The held-out documents of the text."""
    on_progress: Callable[[int, int], None]
    """A function that is called with the steps that are done, and with those in all."""
    rows: Path | None = None
    """A file of its own in which a study may keep what it has done of the run; None where nothing is kept."""

    def blocks(self, length: int) -> Iterator[Tensor]:
        """Yields the held-out text in the model's own tokens, in blocks of one length; documents follow one another."""
        import torch

        from diffattn.data.encoding import encode_documents

        rest: list[int] = []
        documents = (dataclasses.replace(document, text=document.text.rstrip()) for document in self.documents)
        for run in encode_documents(self.tokenizer, documents):
            rest += run
            whole = len(rest) // length * length
            yield from torch.tensor(rest[:whole]).view(-1, length)
            rest = rest[whole:]

    def first_blocks(self, count: int, length: int) -> list[Tensor]:
        """Returns the first blocks of the held-out text.

        Raises:
            ConfigError: fewer than one is asked for.
            DataError: the text has fewer.
        """
        if count < 1:
            raise ConfigError(f"samples is {count}", "at least 1", "change --samples")
        found = list(itertools.islice(self.blocks(length), count))
        if len(found) < count:
            raise DataError(
                f"the held-out text has {len(found)} blocks of {length} tokens", str(count),
                "give more text, or ask for fewer samples",
            )  # fmt: skip
        return found


@dataclass(frozen=True, kw_only=True)
class Study(Generic[Options]):
    """One study; a file of this room, or of a plug-in, has its record."""

    name: str
    """The word behind ``diffattn eval``."""
    title: str
    """A few words for a heading."""
    sentence: str
    """One sentence that says what is measured, such as ``Measure the loss of …``; lists and the help begin with it."""
    source: str
    """The paper that the study is of, or where the idea is from."""
    options: type[Options]
    """The options of the study: a frozen dataclass whose fields, with the sentences below them, are those of the
    command line."""
    measure: Callable[[StudiedModel, Options], Iterator[Point]]
    """The function that measures one model; it is given options that fit the models."""
    axes: Axes
    """The words on the axes of its chart."""
