"""Learning in context: classification from demonstrations in the prompt, where an answer can only be a label.

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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffattn.errors import ConfigError, DataError
from diffattn.files import parse_json
from diffattn.probes.options import MOST_SAMPLES, StudyOptions
from diffattn.probes.study import Point, StudiedModel, Study
from diffattn.results.study import Axes

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

ORDERS = ("random", "by class")


@dataclass(frozen=True, kw_only=True)
class IclOptions(StudyOptions):
    """The options of ``diffattn eval icl``."""

    shots: tuple[int, ...] = (4, 8, 16, 32)
    """Examples in a prompt; several numbers are tried one after another."""
    queries: int = 100
    """Texts to classify at each number of examples."""
    permutations: int = 5
    """Orders of the examples that are tried: so many random ones, and so many by class."""
    seed: int = 0
    """Random seed for the examples and their orders."""
    data: str | None = None
    """File of JSON lines with texts and labels, or a data set's id (id:config:split). Default: a made-up task."""
    labels: int = 4
    """Classes of the made-up task, 2 to 10."""
    text_column: str = "text"
    """Field of --data that holds the text."""
    label_column: str = "label"
    """Field of --data that holds the class."""

    def __post_init__(self) -> None:
        self.check_bounds(shots=(1, 100_000), queries=(1, MOST_SAMPLES), permutations=(1, 10_000))


class Example(NamedTuple):
    """A text and its label."""

    text: str
    label: str


class Permutations(NamedTuple):
    """The accuracy of every order of one kind, and the best minus the worst."""

    accuracy: list[float]
    spread: float


class Accuracy(NamedTuple):
    """The classifications of a model that were right."""

    labels: list[str]
    """The labels to choose between."""
    by_shots: dict[int, list[bool]]
    """Tells for each number of demonstrations and each query whether the answer was right."""
    permutations: dict[str, Permutations]
    """The orders of the most demonstrations, by their kind: ``random`` and ``by class``."""


def synthetic_task(labels: int, *, examples: int, seed: int, words: int = 4) -> list[Example]:
    """Returns a task that no text has taught: each label has key words of its own, and an example holds one of them.

    The words are made of syllables, the labels are ``0`` and on; the seed decides which word belongs to which label.

    Raises:
        ConfigError: fewer than 2 or more than 10 labels.
    """
    if not 2 <= labels <= 10:
        raise ConfigError(f"labels is {labels}", "2 to 10, so that each is one digit", "change --labels")
    import numpy as np

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
    """Reads examples from a file of JSON lines, or from a data set: ``id``, ``id:config`` or ``id:config:split``.

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
                f"{where} has no {text!r} and {label!r} ({error})", "both in each row",
                "name the fields with --text-column and --label-column",
            ) from None  # fmt: skip
        if not isinstance(given, str) or not isinstance(choice, str | int) or isinstance(choice, bool) or choice == "":
            raise DataError(
                f"{where}: the label is {choice!r}", "a single choice, a word or a number",
                "take one of several, or leave the row out",
            )  # fmt: skip
        examples.append(Example(" ".join(given.split()), str(choice)))
    if not examples:
        raise DataError(f"{source} holds no examples", f"rows with {text!r} and {label!r}", "give another --data")
    return examples


def _rows(source: str, label: str) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a file or a data set, each with the words for where it stands."""
    path = Path(source)
    if not path.exists() and path.suffix not in (".json", ".jsonl"):
        from diffattn.data.sources import load_rows

        rows = load_rows(source)
        names = getattr(rows.features.get(label), "names", None) or []
        for number, row in enumerate(rows):
            named = isinstance(row.get(label), int) and 0 <= row[label] < len(names)
            yield f"{source}: row {number}", row | {label: names[row[label]]} if named else row
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read ({error})", "a file of JSON lines", "check the path") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"{source}: line {number}", parse_json(line)
            except ValueError as error:
                given = f"{source}: line {number} is no JSON ({error})"
                raise DataError(given, "a JSON object on each line", "correct the line") from None


class Choices:
    """The labels of a task as tokens: a tree, along which an answer can only be one of them."""

    def __init__(self, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.labels = sorted(set(labels))
        if len(self.labels) < 2:
            given = f"the examples have {len(self.labels)} label"
            raise DataError(given, "at least 2 to choose between", "give other examples with --data")
        end = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
        self.ids = {
            label: [*tokenizer(f" {label}", add_special_tokens=False)["input_ids"], *end] for label in self.labels
        }

    def best(self, model: PreTrainedModel, shown: list[int], queries: Sequence[list[int]]) -> list[str]:
        """Returns the label that the model says after ``shown`` and each of the queries: greedy along the tree.

        Demonstrations and queries are token ids. The part that all queries share is read once.
        """
        import torch
        from transformers import DynamicCache

        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            if shown:
                model(input_ids=_row(model, shown), past_key_values=cache, use_cache=True, logits_to_keep=1)
            return [self._said(model, copy.deepcopy(cache), query) for query in queries]

    def _said(self, model: PreTrainedModel, cache: DynamicCache, given: list[int]) -> str:
        """Returns one label: token by token the likeliest of those with which some label goes on."""
        said: list[int] = []
        possible = self.labels
        while len(possible) > 1:
            outputs = model(input_ids=_row(model, given), past_key_values=cache, use_cache=True, logits_to_keep=1)
            following = sorted({self.ids[label][len(said)] for label in possible})
            said.append(following[int(outputs.logits[0, -1, following].argmax())])
            given = said[-1:]
            possible = [label for label in possible if self.ids[label][: len(said)] == said]
        return possible[0]


def _row(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Returns token ids as one row, on the model's device."""
    import torch

    return torch.tensor([ids], device=model.device)


def measure_icl(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    options: IclOptions,
    *,
    on_progress: Callable[[int, int], None] = lambda done, all_: None,
) -> Accuracy:
    """Measures the accuracy by the number of demonstrations, and over their permutations.

    Args:
        model: a causal model of ``transformers``.
        tokenizer: the model's own.
        examples: demonstrations and queries are drawn from these and never share one.
        options: see :class:`IclOptions`.
        on_progress: called with prompts done and prompts in all.

    Raises:
        ConfigError: a prompt beyond the model's positions.
        DataError: too few examples.
    """
    import numpy as np

    from diffattn.model.loading import positions_of

    most = max(options.shots)
    if len(examples) < most + options.queries:
        raise DataError(
            f"{len(examples)} examples given",
            f"{most + options.queries}, for {most} shots and {options.queries} queries",
            "give more, or ask for fewer --shots or --queries",
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
            f"{most} demonstrations and a question take {longest} tokens",
            f"at most {limit}, the model's max_position_embeddings",
            "ask for fewer --shots",
        )
    all_, done = options.queries * (len(options.shots) + 2 * options.permutations), 0

    def right(demonstrations: Sequence[Example]) -> list[bool]:
        nonlocal done
        said = choices.best(model, shown_ids(demonstrations, tokenizer), given)
        done += len(queries)
        on_progress(done, all_)
        return [label == query.label for label, query in zip(said, queries, strict=True)]

    accuracy = {shots: right(pool[:shots]) for shots in options.shots}
    permutations: dict[str, Permutations] = {}
    for kind in ORDERS:
        each = [float(np.mean(right(demonstrations))) for demonstrations in orders[kind]]
        permutations[kind] = Permutations(each, max(each) - min(each))
    return Accuracy(choices.labels, accuracy, permutations)


def shown_ids(demonstrations: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the demonstrations as tokens, behind the marks that the tokenizer puts before a document."""
    from diffattn.data.tokenizer import document_marks

    shown = "".join(f"input: {text}\nlabel: {label}\n\n" for text, label in demonstrations)
    return [*document_marks(tokenizer)[0], *tokenizer(shown, add_special_tokens=False)["input_ids"]]


def query_ids(query: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns a query as tokens, up to the word after which its label comes."""
    return list(tokenizer(f"input: {query.text}\nlabel:", add_special_tokens=False)["input_ids"])


def _permuted(examples: Sequence[Example], kind: str, random: np.random.Generator) -> list[Example]:
    """Returns the examples in an order of this kind."""
    shuffled = [examples[index] for index in random.permutation(len(examples))]
    if kind == "random":
        return shuffled
    labels = sorted({example.label for example in examples})
    rank = dict(zip(labels, random.permutation(len(labels)), strict=True))
    return sorted(shuffled, key=lambda example: rank[example.label])


def _examples(options: IclOptions) -> list[Example]:
    """Returns the examples that are asked for: those of ``data``, or of the made-up task."""
    if options.data is not None:
        return read_examples(options.data, text=options.text_column, label=options.label_column)
    return synthetic_task(options.labels, examples=max(options.shots) + options.queries, seed=options.seed)


def _measure(subject: StudiedModel, options: IclOptions) -> Iterator[Point]:
    """Yields the accuracy at each number of demonstrations, and how much it depends on their order."""
    examples = _examples(options)
    found = measure_icl(subject.model, subject.tokenizer, examples, options, on_progress=subject.on_progress)
    for shots, right in found.by_shots.items():
        yield Point("accuracy", shots, [float(value) for value in right])
    for kind, entry in found.permutations.items():
        yield Point(f"best − worst order, {kind}", max(options.shots), [entry.spread])


STUDY = Study(
    name="icl",
    title="In-context learning",
    sentence="Measure how well a model learns from examples in its prompt, and from their order.",
    source="arXiv 2410.05258v2, section 3.5, Figures 6 and 7",
    options=IclOptions,
    measure=_measure,
    axes=Axes(x="demonstrations", y="accuracy", by="", logarithmic=True),
)
