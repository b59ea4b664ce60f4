"""Real text mixed with passages in which something earlier has to be looked up, for models that are to be studied.

Blocks are cut into pieces that do not see each other, and each piece is of a kind, drawn by share:

- text, as everywhere;
- repeats: random tokens, or random digits, again and again from the first on, so that each is found behind its last
  occurrence;
- needles: whole documents of ``diffattn.data.needles``, no question parted from its text:

      <|endoftext|> … text. The magic number of Lima is 48219. More text …

      What is the magic number of Lima? The magic number of Lima is 48219.<|endoftext|>

Pieces are of 16 tokens at first and of the whole context at last (staged training, Press et al. 2021, arXiv
2012.15832): in a short piece little stands beside what is to be found, and a small model that is given the whole
context at once has not learned to look anything up after millions of tokens (docs/studies.md). Held-out text stays as
it is.
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

from diffattn.data.needles import Haystack, Needle, question
from diffattn.data.packing import PreparedData, TrainingOrder
from diffattn.data.text import split_by_document
from diffattn.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from diffattn.data.text import Corpus, Document

# Part of the digest: changes when the samples do.
_FORMAT = 3
# Characters of text around the needles: more takes a minute to encode, and no block shows what it is of.
_HAYSTACK_CHARACTERS = 4_000_000


class Stage(NamedTuple):
    """A part of a run."""

    until: float
    """The share of the run's steps at which it ends."""
    piece: int | None
    """Tokens that see each other; None: the whole context."""
    needles: float
    """Of the pieces that are no text, the share with needles; the others repeat."""


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
    """Raise a `ConfigError` unless this can be a share of the training tokens: 0 to below 1."""
    if not 0 <= share < 1:
        raise ConfigError(f"needles is {share}; wanted the share of the training tokens, 0 to below 1")


def with_needles(
    data: PreparedData, corpus: Corpus, *, share: float, most_needles: int = 12, most_queries: int = 2
) -> PreparedData:
    """The data with repeats and needles in its training blocks, in pieces that grow over a run.

    Args:
        data: of ``prepare_data``.
        corpus: what ``data`` was prepared from; the text around the needles is of the documents that it trains on.
        share: of the training tokens that are repeats or needles, 0 to below 1; 0 leaves the data as they are.
        most_needles: a document hides 1 to so many, fewer where it is short.
        most_queries: and asks for 1 to so many at once, until all are asked for.

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
    """How blocks of text become samples of the mixture: ``mixture(order, batch_size)``."""

    def __init__(
        self, share: float, most_needles: int, most_queries: int, haystack: Haystack, *, vocab_size: int
    ) -> None:
        self.share, self.most_needles, self.most_queries, self.haystack = share, most_needles, most_queries, haystack
        # Few different tokens at first: most of what is learned there is which token a vector stands for. Those of a
        # needle are among them, and a quarter of all repeats is of digits: what is never repeated is not looked up.
        tokenizer, told = haystack.tokenizer, [Needle("Lima", "48219")]
        ids = tokenizer([*map(str, range(10)), f" {told[0].sentence}\n\n{question(told)}"], add_special_tokens=False)
        self._digits = np.unique([each[-1] for each in ids["input_ids"][:10]])
        first = np.array(list(dict.fromkeys([*self._digits.tolist(), *ids["input_ids"][10]])))
        others = np.random.default_rng(0).permutation(vocab_size)
        self._alphabet = np.concatenate([first, others[~np.isin(others, first)]])

    def __call__(self, order: TrainingOrder, batch_size: int) -> MixedOrder:
        return MixedOrder(self, order, batch_size)

    def repeats(self, random: np.random.Generator, length: int) -> npt.NDArray[np.int64]:
        """Random tokens, repeated to ``length``; a period is a sixth to a half of it, of 16 · length different tokens
        at most."""
        fewest, most = max(3, length // 6), max(4, length // 2)
        period = int(np.exp(random.uniform(np.log(fewest), np.log(most))))
        alphabet = self._digits if random.random() < 0.25 else self._alphabet[: 16 * length]
        once = alphabet[random.integers(0, len(alphabet), period)]
        return np.tile(once, length // period + 1)[:length]

    def needles(self, random: np.random.Generator, length: int) -> npt.NDArray[np.int64]:
        """Whole documents of ``length`` tokens together: one, two or four; one where several have no room."""
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
    """The samples of a run on a mixture; a sample depends on the order's seed, its length and the index alone.

    Arguments:
        mixture: what is drawn.
        order: the blocks of text; a piece that is text is that piece of the block that the sample would be without the
            mixture.
        batch_size: samples of a step, which are all of one stage.
    `mixed[i]` is `{"input_ids": int64 (pieces, tokens of a piece), "labels": the same}`; pieces times tokens is the
    context.
    """

    def __init__(self, mixture: Mixture, order: TrainingOrder, batch_size: int) -> None:
        self.mixture, self.order, self.batch_size = mixture, order, batch_size

    def __len__(self) -> int:
        return len(self.order)

    def stage(self, index: int) -> Stage:
        """The stage of a sample, that of the first of its step."""
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
            # A small vocabulary spells a question in more tokens than a short piece has.
            with contextlib.suppress(ConfigError):
                return self.mixture.needles(random, length)
        return self.mixture.repeats(random, length)


def _haystack(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> Haystack:
    """The first documents, as many as make the characters that are wanted."""
    lengths = np.cumsum([len(document.text) for document in documents])
    return Haystack(list(islice(documents, int((lengths < _HAYSTACK_CHARACTERS).sum()) + 1)), tokenizer)
