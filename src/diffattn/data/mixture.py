"""Mixes real text with passages in which something earlier has to be looked up, to train models for the studies.

Blocks are cut into pieces that do not see each other, and the kind of each piece is drawn at random:

- text, as in other training;
- repeats: a sequence of random tokens, or of random digits, again and again, so that each token can be found after its
  last occurrence;
- needles: whole documents of ``diffattn.data.needles``, so that no question is cut off from its text:

      <|endoftext|> … text. The magic number of Lima is 48219. More text …

      What is the magic number of Lima? The magic number of Lima is 48219.<|endoftext|>

Pieces have 16 tokens at first and the whole context in the end (staged training, Press et al. 2021, arXiv 2012.15832):
a short piece holds little else than what has to be found. A small model that gets the whole context from the start has
not learned to look anything up after millions of tokens (docs/studies.md). The held-out text is not changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from diffattn.data.blocks import TrainingOrder
from diffattn.data.needles import Haystack, Needle, question
from diffattn.data.packing import PreparedData
from diffattn.data.text import split_by_document
from diffattn.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from diffattn.data.text import Corpus, Document

# This number is part of the digest and has to change whenever the samples change.
_FORMAT = 3
# The most characters of text around the needles: encoding more takes a minute and does not make the blocks more varied.
_HAYSTACK_CHARACTERS = 4_000_000


class Stage(NamedTuple):
    """A stage of a run, with its own length of pieces and its own share of needles."""

    until: float
    """The share of the run's steps at which the stage ends."""
    piece: int | None
    """The number of tokens that see each other; None for the whole context."""
    needles: float
    """The share of needles among the pieces that are not text; the other ones are repeats."""


STAGES = (
    Stage(0.30, 16, 0.0),
    Stage(0.40, 32, 0.0),
    Stage(0.46, 64, 0.0),
    Stage(0.56, 128, 0.5),
    Stage(0.66, 256, 0.6),
    Stage(0.76, 512, 0.7),
    Stage(1.00, None, 0.7),
)


def check_share(share: float) -> None:
    """Raises a ``ConfigError`` unless this can be a share of the training tokens: 0 to below 1."""
    if not 0 <= share < 1:
        raise ConfigError(f"needles is {share}", "a share of the training tokens, 0 to below 1", "pass 0.5, say")


def with_needles(
    data: PreparedData, corpus: Corpus, *, share: float, most_needles: int = 12, most_queries: int = 2
) -> PreparedData:
    """Returns the data with repeats and needles in its training blocks, in pieces that grow over a run.

    Args:
        data: the result of ``prepare_data``.
        corpus: the corpus that ``data`` was prepared from; its training documents give the text around the needles.
        share: the share of the training tokens that are repeats or needles, 0 to below 1; 0 changes nothing.
        most_needles: the most needles that a document hides; a short document hides fewer.
        most_queries: the most needles that one question asks for; the questions of a document ask for all its needles.

    Raises:
        ConfigError: a share out of range, or a context too short for a needle and its question.
        DataError: text without the end of a sentence.

    Source: the prompts are those of ``diffattn.data.needles``, the mixture and its stages are ours.
    """
    check_share(share)
    if share == 0:
        return data
    mixture = Mixture(
        share, most_needles, most_queries, _haystack(split_by_document(corpus).train, data.tokenizer),
        vocab_size=data.facts["vocab_size"],
    )  # fmt: skip
    mixture.needles(np.random.default_rng(0), data.train.context)
    made = [_FORMAT, data.facts["digest"], share, most_needles, most_queries, STAGES]
    facts = data.facts | {
        "digest": hashlib.sha256(json.dumps(made).encode()).hexdigest(),
        "needles": {"share": share, "most_needles": most_needles, "most_queries": most_queries},
    }
    return dataclasses.replace(data, mixture=mixture, facts=facts)


class Mixture:
    """The mixture: ``mixture(order, batch_size)`` gives its samples from those of the text."""

    def __init__(
        self, share: float, most_needles: int, most_queries: int, haystack: Haystack, *, vocab_size: int
    ) -> None:
        self.share, self.most_needles, self.most_queries, self.haystack = share, most_needles, most_queries, haystack
        # Early repeats use few different tokens, since a model first has to learn which token a vector stands for. The
        # tokens of a needle are among them, and a quarter of all repeats are digits: a model looks up only tokens that
        # it has seen repeated.
        tokenizer, told = haystack.tokenizer, [Needle("Lima", "48219")]
        ids = tokenizer([*map(str, range(10)), f" {told[0].sentence}\n\n{question(told)}"], add_special_tokens=False)
        self._digits = np.unique([each[-1] for each in ids["input_ids"][:10]])
        first = np.array(list(dict.fromkeys([*self._digits.tolist(), *ids["input_ids"][10]])))
        others = np.random.default_rng(0).permutation(vocab_size)
        self._alphabet = np.concatenate([first, others[~np.isin(others, first)]])

    def __call__(self, order: TrainingOrder, batch_size: int) -> MixedOrder:
        return MixedOrder(self, order, batch_size)

    def repeats(self, random: np.random.Generator, length: int) -> npt.NDArray[np.int64]:
        """Returns ``length`` tokens: a random sequence of a sixth to a half of them, repeated.

        The sequence draws from at most 16 · ``length`` different tokens.
        """
        fewest, most = max(3, length // 6), max(4, length // 2)
        period = int(np.exp(random.uniform(np.log(fewest), np.log(most))))
        alphabet = self._digits if random.random() < 0.25 else self._alphabet[: 16 * length]
        once = alphabet[random.integers(0, len(alphabet), period)]
        return np.tile(once, length // period + 1)[:length]

    def needles(self, random: np.random.Generator, length: int) -> npt.NDArray[np.int64]:
        """Returns one, two or four whole documents of ``length`` tokens together; only one if more do not fit."""
        for count in (int(random.choice((1, 1, 2, 4))), 1):
            share = length // count
            lengths = [share] * (count - 1) + [length - share * (count - 1)]
            try:
                documents = [
                    self.haystack.document(
                        random, length=each, most_needles=self.most_needles, most_queries=self.most_queries
                    )
                    for each in lengths
                ]
            except ConfigError:
                if count == 1:
                    raise
                continue
            return np.array([token for document in documents for token in document], np.int64)
        raise AssertionError


class MixedOrder(Dataset[dict[str, torch.Tensor]]):
    """The samples of a run on a mixture; a sample depends only on the order's seed, its length and the index.

    Args:
        mixture: the mixture to draw from.
        order: the blocks of text; a piece of text is a part of the block that the sample would be without the mixture.
        batch_size: the number of samples in a step, which all belong to one stage.

    ``mixed[i]`` is ``{"input_ids": int64 (pieces, tokens of a piece), "labels": the same}``; pieces times tokens is the
    context.
    """

    def __init__(self, mixture: Mixture, order: TrainingOrder, batch_size: int) -> None:
        self.mixture, self.order, self.batch_size = mixture, order, batch_size

    def __len__(self) -> int:
        return len(self.order)

    def stage(self, index: int) -> Stage:
        """The stage of a sample, which is that of the first sample of its step."""
        done = index // self.batch_size * self.batch_size / len(self)
        return next(stage for stage in STAGES if done < stage.until)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        context, stage = self.order.blocks.context, self.stage(index)
        length = stage.piece if stage.piece is not None and context % stage.piece == 0 else context
        random = np.random.default_rng((self.order.seed, index))
        ids = self.order[index]["input_ids"].view(-1, length)
        for piece in ids:
            if random.random() < self.mixture.share:
                piece.copy_(torch.from_numpy(self._looked_up(random, length, stage.needles)))
        return {"input_ids": ids, "labels": ids}

    def _looked_up(self, random: np.random.Generator, length: int, needles: float) -> npt.NDArray[np.int64]:
        if random.random() < needles:
            # With a small vocabulary a question can have more tokens than a short piece.
            with contextlib.suppress(ConfigError):
                return self.mixture.needles(random, length)
        return self.mixture.repeats(random, length)


def _haystack(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> Haystack:
    """Returns the haystack of the first documents, as many as have the wanted number of characters."""
    lengths = np.cumsum([len(document.text) for document in documents])
    return Haystack(list(islice(documents, int((lengths < _HAYSTACK_CHARACTERS).sum()) + 1)), tokenizer)
