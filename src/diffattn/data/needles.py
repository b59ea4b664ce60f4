"""Hides needles in a haystack: magic numbers of cities in real text, to train on and to ask for.

    … text. The magic number of Lima is 48219. More text … The magic number of Oslo is 70035. …

    What is the magic number of Oslo? The magic number of Oslo is 70035.

N needles are hidden, and R of them are asked for at once. A needle stands between sentences. The first one that is
asked for lies at a given depth, which is the share of the text before it; the others lie anywhere.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from diffattn.data.text import Document
from diffattn.data.tokenizer import document_marks
from diffattn.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CITIES = (
    "Accra", "Algiers", "Amman", "Ankara", "Athens", "Baku", "Bamako", "Bangkok", "Berlin", "Bern", "Bogota",
    "Brussels", "Bucharest", "Budapest", "Cairo", "Canberra", "Caracas", "Chennai", "Copenhagen", "Dakar",
    "Damascus", "Delhi", "Denver", "Dhaka", "Doha", "Dresden", "Dublin", "Durban", "Geneva", "Hamburg", "Hanoi",
    "Harare", "Havana", "Helsinki", "Houston", "Istanbul", "Jakarta", "Kabul", "Kampala", "Kigali", "Kingston",
    "Lagos", "Lima", "Lisbon", "London", "Luanda", "Lusaka", "Madrid", "Manila", "Maputo", "Milan", "Minsk",
    "Mumbai", "Munich", "Nairobi", "Naples", "Osaka", "Oslo", "Ottawa", "Panama", "Paris", "Perth", "Prague",
    "Quito", "Riga", "Rome", "Santiago", "Seoul", "Sofia", "Sydney", "Taipei", "Tallinn", "Tehran", "Tirana",
    "Tokyo", "Toronto", "Tunis", "Turin", "Vienna", "Vilnius", "Warsaw", "Zagreb", "Zurich",
)  # fmt: skip
DIGITS = 5
_BEFORE_NUMBER = "The magic number of {} is"
# The number of sentences that are encoded together.
_AT_ONCE = 10_000
# The end of a sentence: its mark, the end of a quotation, and the white space after it.
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+")


class Needle(NamedTuple):
    """A city and its magic number."""

    city: str
    number: str

    @property
    def sentence(self) -> str:
        return f"{_BEFORE_NUMBER.format(self.city)} {self.number}."


@dataclass(frozen=True)
class NeedlePrompt:
    """A prompt with needles in its text and a question at its end."""

    ids: list[int]
    """The tokens; they end where the model has to continue."""
    spans: dict[str, tuple[int, int]]
    """Half-open ranges of tokens without gaps: ``bos`` (empty if the tokenizer has no such token), the text ``before``
    the first needle asked for, that needle's sentence (``answer``), the text ``behind`` it, and the ``query``."""
    answers: tuple[str, ...]
    """The numbers that are asked for, in order."""


def draw_needles(random: np.random.Generator, count: int) -> list[Needle]:
    """Returns different cities, each with a random number of five digits.

    Raises:
        ConfigError: more needles than there are cities.
    """
    if not 1 <= count <= len(CITIES):
        raise ConfigError(
            f"{count} needles", f"1 to {len(CITIES)}, one for each city that is known", "ask for fewer needles"
        )
    cities = random.choice(len(CITIES), count, replace=False)
    numbers = random.integers(10 ** (DIGITS - 1), 10**DIGITS, count)
    return [Needle(CITIES[city], str(number)) for city, number in zip(cities, numbers, strict=True)]


def question(asked: Sequence[Needle]) -> str:
    """Returns the question for some needles and the beginning of its answer.

    >>> question([Needle("Oslo", "70035"), Needle("Lima", "48219")])
    'What are the magic numbers of Oslo and Lima? The magic number of Oslo is'
    """
    cities = [needle.city for needle in asked]
    listed = " and ".join([", ".join(cities[:-1]), cities[-1]] if len(cities) > 1 else cities)
    verb, ending = ("are", "s") if len(cities) > 1 else ("is", "")
    return f"What {verb} the magic number{ending} of {listed}? {_BEFORE_NUMBER.format(cities[0])}"


def answer(asked: Sequence[Needle]) -> str:
    """Returns the text after the question: a sentence for each needle, with its city, as it stands in the text.

    >>> answer([Needle("Oslo", "70035"), Needle("Lima", "48219")])
    ' 70035. The magic number of Lima is 48219.'
    """
    return " ".join([f" {asked[0].number}.", *(needle.sentence for needle in asked[1:])])


def is_answer(text: str, answers: Sequence[str]) -> bool:
    """Returns whether the first numbers of a text are those asked for, in order.

    >>> is_answer(" 70035. That of Lima is 48219. 1", ["70035", "48219"]), is_answer(" 700351", ["70035"])
    (True, False)
    """
    return re.findall(r"\d+", text)[: len(answers)] == list(answers)


def sentences(text: str) -> list[str]:
    """Returns a text cut after each sentence; joined, the parts are the text again.

    >>> sentences("One. Two! Three")
    ['One. ', 'Two! ', 'Three']
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True) if end > start]


class Haystack:
    """Real text as tokens, cut after each sentence, from which prompts of any length are made.

    Args:
        documents: the text; it has to be longer than the longest prompt.
        tokenizer: the tokenizer of the model that will read it.

    Raises:
        DataError: text without the end of a sentence.
    """

    def __init__(self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        marks, self._behind = document_marks(tokenizer)
        # If nothing stands before a document, prompts begin with the tokenizer's first token of a text, if it has one.
        bos = tokenizer.bos_token_id
        self._before = marks or ([] if bos is None else [bos])
        parts = [" ".join(part.split()) for document in documents for part in sentences(document.text)]
        parts = [part for part in parts if part]
        if len(parts) < 2:
            raise DataError("the haystack has less than two sentences", "text of several sentences", "give more text")
        # An array, since a list of a novel's tokens takes ten times the memory.
        flat, lengths = array("i"), []
        for start in range(0, len(parts), _AT_ONCE):
            texts = [f" {part}" for part in parts[start : start + _AT_ONCE]]
            for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
                flat.extend(ids)
                lengths.append(len(ids))
        self._tokens, self._ends = np.array(flat), np.cumsum(lengths)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer_tokens(self, queries: int) -> int:
        """The most tokens of an answer to this many questions, whatever their cities and numbers."""
        return queries * self._longest_sentence

    @cached_property
    def _longest_sentence(self) -> int:
        # At most a token for each digit, one for the space before them and one for the full stop.
        before = [f" {_BEFORE_NUMBER.format(city)}" for city in CITIES]
        return max(map(len, self.tokenizer(before, add_special_tokens=False)["input_ids"])) + DIGITS + 2

    def prompt(
        self,
        random: np.random.Generator,
        *,
        length: int,
        depth: float,
        needles: int = 1,
        queries: int = 1,
        answered: bool = False,
    ) -> NeedlePrompt:
        """Returns a prompt of exactly ``length`` tokens; the haystack's last sentence may be cut off for that.

        Args:
            random: the generator that draws the part of the text, the cities, the numbers and the other needles'
                positions.
            length: the number of tokens of the prompt, with its question.
            depth: the share of the text before the first needle asked for, from 0 to 1.
            needles, queries: the numbers N and R; R is at most N.
            answered: True if ``length`` includes the answer, so that the prompt is shorter by it.

        Raises:
            ConfigError: numbers that do not fit: no needle in the context, or more questions than needles.
        """
        if not 1 <= queries <= needles:
            raise ConfigError(
                f"{queries} of {needles} needles are asked for", "at least 1 and at most all", "correct the numbers"
            )
        if not 0 <= depth <= 1:
            raise ConfigError(f"depth is {depth}", "0, the beginning of the text, to 1, its end", "correct it")
        drawn = draw_needles(random, needles)
        before = self._before
        query = self._encode(f"\n\n{question(drawn[:queries])}")
        hidden = [self._encode(f" {needle.sentence}") for needle in drawn]
        taken = len(before) + len(query) + sum(map(len, hidden)) + (self.answer_tokens(queries) if answered else 0)
        room = length - taken
        if room < 1:
            raise ConfigError(
                f"a length of {length} tokens, of which {needles} needles and their question"
                f"{' and answer' if answered else ''} take {taken}",
                f"a length of at least {taken + 1}",
                "take a longer context or fewer needles",
            )
        text = self._cut(random, room)
        # Needles stand between sentences; the first one as near as possible to its depth.
        gaps = np.array([0, *np.cumsum([len(ids) for ids in text])])
        at = [int(np.abs(gaps - depth * room).argmin()), *random.integers(0, len(gaps), needles - 1).tolist()]
        ids, span = list(before), (0, 0)
        for gap in range(len(gaps)):
            for index in [index for index in range(needles) if at[index] == gap]:
                if index == 0:
                    span = (len(ids), len(ids) + len(hidden[0]))
                ids += hidden[index]
            ids += text[gap] if gap < len(text) else []
        ends = [0, len(before), *span, len(ids), len(ids) + len(query)]
        names = ("bos", "before", "answer", "behind", "query")
        spans = {name: (ends[i], ends[i + 1]) for i, name in enumerate(names)}
        return NeedlePrompt(ids + query, spans, tuple(needle.number for needle in drawn[:queries]))

    def document(self, random: np.random.Generator, *, length: int, most_needles: int, most_queries: int) -> list[int]:
        """Returns a training document of exactly ``length`` tokens: text, needles in it, and questions for all of them.

        Args:
            random: the generator that draws everything, also the number of needles.
            length: the number of tokens, with the marks before and after a document.
            most_needles: the most needles; there are fewer if they would take more than half of the document.
            most_queries: the most needles that one question asks for.

        Raises:
            ConfigError: a length without room for one needle and its question.
        """
        drawn = draw_needles(random, int(random.integers(1, most_needles + 1)))
        before = self._before
        asked, hidden, questions = list(drawn), list[list[int]](), list[list[int]]()
        while asked:
            together = asked[: int(random.integers(1, most_queries + 1))]
            tokens = self._encode(f"\n\n{question(together)}") + self._encode(answer(together))
            told = [self._encode(f" {needle.sentence}") for needle in together]
            if questions and sum(map(len, [*hidden, *questions, *told, tokens])) > length // 2:
                break
            hidden, asked = hidden + told, asked[len(together) :]
            questions.append(tokens)
        order = random.permutation(len(questions))
        room = length - len(before) - 1 - sum(map(len, [*hidden, *questions]))
        if room < 1:
            raise ConfigError(
                f"a document of {length} tokens, of which a needle and its question take {length - room}",
                f"a context of at least {length - room + 1}",
                "take a longer context",
            )
        text = self._cut(random, room)
        for sentence in hidden:
            text.insert(int(random.integers(0, len(text) + 1)), sentence)
        parts = [before, *text, *(questions[index] for index in order), [self._behind]]
        return [token for part in parts for token in part]

    def _cut(self, random: np.random.Generator, room: int) -> list[list[int]]:
        """Returns ``room`` tokens of whole sentences, from a random one on; the last one may be cut off."""
        total = int(self._ends[-1])
        if room > total:
            raise ConfigError(
                f"a haystack of {room} tokens from a text of {total}",
                f"at most {total}",
                "give more text or a shorter length",
            )
        latest = int(np.searchsorted(self._ends, total - room, side="right"))
        start = int(random.integers(0, latest + 1)) if latest else 0
        if total - (int(self._ends[start - 1]) if start else 0) < room:
            start = latest
        first = int(self._ends[start - 1]) if start else 0
        ends = [first, *self._ends[start : int(np.searchsorted(self._ends, first + room, side="left"))].tolist()]
        if ends[-1] < first + room:
            ends.append(first + room)
        return [self._tokens[begin:end].tolist() for begin, end in pairwise(ends)]
