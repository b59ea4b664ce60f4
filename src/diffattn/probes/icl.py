"""Many-shot in-context learning: classification from demonstrations in the prompt, with the answer held to the labels.

    input: …
    label: 3

    input: …
    label:

Accuracy against the number of demonstrations, and its spread over permutations of the same ones: in random orders, and
by class, all of one label before the next.

Source: arXiv 2410.05258v2, section 3.5, Figures 6 and 7 (constrained decoding; TREC, TREC-fine, Banking-77, Clinc-150).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from diffattn.data.text import load_rows
from diffattn.data.tokenizer import document_marks
from diffattn.errors import ConfigError, DataError
from diffattn.files import parse_json
from diffattn.model.loading import positions_of
from diffattn.probes.options import IclOptions

ORDERS = ("random", "by class")


class Example(NamedTuple):
    """A text and its label."""

    text: str
    label: str


def synthetic_task(labels: int, *, examples: int, seed: int, words: int = 4) -> list[Example]:
    """A task that no text has taught: each label has key words of its own, and an example holds one of them.

    The words are made of syllables, the labels are ``0`` and on; what belongs to what is drawn from the seed.
    """
    if not 2 <= labels <= 10:
        raise ConfigError(f"{labels} labels asked for; wanted 2 to 10, so that each is one digit")
    random = np.random.default_rng(seed)
    syllables = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
    drawn = random.permutation(len(syllables) ** 2)[: labels * words + 40]
    made = [syllables[index // len(syllables)] + syllables[index % len(syllables)] for index in drawn]
    keys, filler = made[: labels * words], made[labels * words :]
    task = []
    for number in range(examples):
        label = number % labels
        text = [filler[int(index)] for index in random.integers(0, len(filler), 4)]
        text.insert(int(random.integers(0, 5)), keys[label * words + int(random.integers(0, words))])
        task.append(Example(" ".join(text), str(label)))
    return [task[index] for index in random.permutation(examples)]


def read_examples(source: str, *, text: str = "text", label: str = "label") -> list[Example]:
    """Examples from a file of JSON lines, or from a ``datasets`` id (``id``, ``id:config`` or ``id:config:split``).

    A label that a data set numbers is called by its name.

    Raises:
        DataError: no file or data set, no rows, or a row without text and one label: says which.
    """
    examples = []
    for where, row in _rows(source, label):
        try:
            given, choice = row[text], row[label]
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"{where} has no {text!r} and {label!r} ({error}); both are wanted in each row: name the fields"
            ) from None
        if not isinstance(given, str) or not isinstance(choice, str | int) or isinstance(choice, bool) or choice == "":
            raise DataError(
                f"{where}: the label is {choice!r}; a single choice is wanted, a word or a number: take one of "
                "several, or leave the row out"
            )
        examples.append(Example(" ".join(given.split()), str(choice)))
    if not examples:
        raise DataError(f"{source} holds no examples; rows with {text!r} and {label!r} are wanted")
    return examples


def _rows(source: str, label: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file or a data set, each with the words for where it stands."""
    path = Path(source)
    if not path.exists() and path.suffix not in (".json", ".jsonl"):
        rows = load_rows(source)
        names = getattr(rows.features.get(label), "names", None) or []
        for number, row in enumerate(rows):
            named = isinstance(row.get(label), int) and 0 <= row[label] < len(names)
            yield f"{source}: row {number}", row | {label: names[row[label]]} if named else row
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read ({error}); a file of JSON lines is wanted") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"{source}: line {number}", parse_json(line)
            except ValueError as error:
                raise DataError(f"{source}: line {number} is no JSON ({error}); an object is wanted on each") from None


class Choices:
    """The labels of a task as tokens: a tree, along which an answer can only be one of them."""

    def __init__(self, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.labels = sorted(set(labels))
        if len(self.labels) < 2:
            raise DataError(f"the examples have {len(self.labels)} label; wanted at least 2 to choose between")
        end = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
        self.ids = {
            label: [*tokenizer(f" {label}", add_special_tokens=False)["input_ids"], *end] for label in self.labels
        }

    @torch.no_grad()
    def best(self, model: PreTrainedModel, shown: list[int], queries: Sequence[list[int]]) -> list[str]:
        """The label said after ``shown`` and each of the queries, which are token ids: greedy along the tree.

        What all queries share is read once.
        """
        cache = DynamicCache(config=model.config)
        if shown:
            model(input_ids=self._row(model, shown), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return [self._said(model, copy.deepcopy(cache), query) for query in queries]

    def _said(self, model: PreTrainedModel, cache: DynamicCache, given: list[int]) -> str:
        """Token by token, of those with which some label goes on, the likeliest."""
        said: list[int] = []
        possible = self.labels
        while len(possible) > 1:
            outputs = model(input_ids=self._row(model, given), past_key_values=cache, use_cache=True, logits_to_keep=1)
            following = sorted({self.ids[label][len(said)] for label in possible})
            said.append(following[int(outputs.logits[0, -1, following].argmax())])
            given = said[-1:]
            possible = [label for label in possible if self.ids[label][: len(said)] == said]
        return possible[0]

    def _row(self, model: PreTrainedModel, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=model.device)


def measure_icl(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    options: IclOptions,
    *,
    on_progress: Callable[[int, int], None] = lambda done, all_: None,
) -> dict[str, Any]:
    """Accuracy by the number of demonstrations, and over their permutations.

    Args:
        model: a causal model of ``transformers``.
        tokenizer: its own.
        examples: demonstrations and queries are drawn from these and never share one.
        options: see :class:`IclOptions`.
        on_progress: called with prompts done and prompts in all.

    Returns:
        ``labels``; ``accuracy``, for each number of demonstrations one truth value per query; ``permutations``, for
        each of the two kinds of order the accuracy of every permutation, and best − worst, as ``spread``.

    Raises:
        ConfigError: a prompt beyond the model's positions.
        DataError: too few examples.
    """
    most = max(options.shots)
    if len(examples) < most + options.queries:
        raise DataError(
            f"{len(examples)} examples given; {most} demonstrations and {options.queries} queries want "
            f"{most + options.queries}: give more, or ask for fewer shots or queries"
        )
    choices = Choices([example.label for example in examples], tokenizer)
    random = np.random.default_rng(options.seed)
    order = random.permutation(len(examples))
    queries = [examples[index] for index in order[: options.queries]]
    pool = [examples[index] for index in order[options.queries :]]
    orders = {kind: [_permuted(pool[:most], kind, random) for _ in range(options.permutations)] for kind in ORDERS}
    given = [query_ids(query, tokenizer) for query in queries]
    limit, shown = positions_of(model.config), len(shown_ids(pool[:most], tokenizer))
    longest = shown + max(map(len, given)) + max(map(len, choices.ids.values()))
    if limit is not None and longest > limit:
        raise ConfigError(
            f"{most} demonstrations and a question take {longest} tokens; wanted at most {limit}, the model's "
            "max_position_embeddings: ask for fewer shots"
        )
    all_, done = options.queries * (len(options.shots) + 2 * options.permutations), 0

    def right(demonstrations: Sequence[Example]) -> list[bool]:
        nonlocal done
        said = choices.best(model, shown_ids(demonstrations, tokenizer), given)
        done += len(queries)
        on_progress(done, all_)
        return [label == query.label for label, query in zip(said, queries, strict=True)]

    accuracy = {str(shots): right(pool[:shots]) for shots in options.shots}
    permutations: dict[str, Any] = {}
    for kind in ORDERS:
        each = [float(np.mean(right(demonstrations))) for demonstrations in orders[kind]]
        permutations[kind] = {"accuracy": each, "spread": max(each) - min(each)}
    return {"labels": choices.labels, "accuracy": accuracy, "permutations": permutations}


def shown_ids(demonstrations: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The demonstrations as tokens, behind what the tokenizer puts before a document."""
    shown = "".join(f"input: {text}\nlabel: {label}\n\n" for text, label in demonstrations)
    return [*document_marks(tokenizer)[0], *tokenizer(shown, add_special_tokens=False)["input_ids"]]


def query_ids(query: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A query as tokens, up to where its label is to come."""
    return list(tokenizer(f"input: {query.text}\nlabel:", add_special_tokens=False)["input_ids"])


def _permuted(examples: Sequence[Example], kind: str, random: np.random.Generator) -> list[Example]:
    shuffled = [examples[index] for index in random.permutation(len(examples))]
    if kind == "random":
        return shuffled
    labels = sorted({example.label for example in examples})
    place = dict(zip(labels, random.permutation(len(labels)), strict=True))
    return sorted(shuffled, key=lambda example: place[example.label])
