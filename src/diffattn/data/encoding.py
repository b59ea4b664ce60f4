"""Encodes documents of any length: short texts as they are, long ones in windows; the tokens are those of the whole.

Encoding takes a hundred times the memory of the text. A document is therefore cut between words where its tokenizer
takes every word by itself, as ours do. Another tokenizer may treat the beginning and the end of a text in its own way
(a space before it, half a word after it), so that parts cannot just be joined. There each window begins where a token
of the one before it begins, well before that one's end, and the two are joined in the middle of a long stretch in which
both have the same tokens:

    window 1   |a b c d e f g h x|
    window 2         |y e f g h i j k …        joined at f|g

If they never agree (because one token covers the whole text, say), the window is made longer, at last as long as the
text. A Unigram model's windows are joined only between words: among equally likely ways to cut a word it chooses by the
rounding error of a sum over all that comes before in the word, however far away.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from diffattn.data.documents import PIECE, Document, Piece, pieces_of
from diffattn.data.tokenizer import WORD_BOUNDARY, document_marks, plain_backend
from diffattn.errors import DataError, one_line
from diffattn.files import shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Lengths in characters: a window, the part that two windows share, and the stretch in which both have to be equal.
WINDOW, OVERLAP, AGREED = 1 << 18, 1 << 14, 1 << 12
# The characters that travel to a process together, and those after which a document is cut between words, so that the
# threads of one process share the work.
UNIT, CUT = 1 << 19, 1 << 16
# The most characters of a text that is encoded as a whole.
WHOLE = 1 << 20


class Place(NamedTuple):
    """A place in a text at which its encoding can go on."""

    document: int
    """The number of the document, from 0."""
    start: int
    """The character of the document at which encoding begins again."""
    taken: int
    """The character before which its tokens are not taken, since they are there already."""


class Template(NamedTuple):
    """A conversation in the words of a tokenizer's chat template, in which special tokens count as special."""

    text: str


# A text, the ids of a mark or of a window, or a conversation.
Part = str | list[int] | Template


class Unit(NamedTuple):
    """Parts of documents that are encoded together."""

    parts: list[Part]
    end: Place
    """The place behind them."""
    characters: int
    """The characters of text that they stand for."""


class PartEncoder:
    """Turns parts of documents into ids; another process makes it anew from the same two arguments.

    Args:
        content: the JSON of the tokenizer's backend.
        before: the ids before each document.
    """

    def __init__(self, content: str, before: list[int]) -> None:
        self.content, self.before = content, before
        self.plain, self.special = plain_backend(content), plain_backend(content)
        self.special.encode_special_tokens = False

    def __call__(self, parts: list[Part]) -> npt.NDArray[np.uint32]:
        """Returns the ids of the parts, one after the other."""
        texts = [part for part in parts if isinstance(part, str) and len(part) <= WHOLE]
        encodings = iter(self.plain.encode_batch_fast(texts, add_special_tokens=False))
        found: list[list[int]] = []
        for part in parts:
            if isinstance(part, Template):
                ids = self.special.encode(part.text, add_special_tokens=False).ids
                # Some templates write the first token of a text themselves.
                found += [self.before, ids[len(self.before) :] if ids[: len(self.before)] == self.before else ids]
            elif isinstance(part, list):
                found.append(part)
            elif len(part) <= WHOLE:
                found.append(next(encodings).ids)
            else:
                found += [run.ids for run in long_ids(self.plain, [part])]
        return np.fromiter(chain.from_iterable(found), np.uint32, sum(map(len, found)))


class DocumentParts:
    """Cuts documents into units for a :class:`PartEncoder`, of at least ``UNIT`` characters but the last.

    Args:
        tokenizer: one from ``train_tokenizer``, or any other.

    Raises:
        ConfigError: the same as ``document_marks``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.before, self.behind = document_marks(tokenizer)
        self._tokenizer = tokenizer
        self._backend = plain_backend(tokenizer.backend_tokenizer.to_str())
        self._apart = _words_apart(self._backend)
        self._parts: list[Part] = []
        self._characters = 0

    def encoder(self) -> PartEncoder:
        """Returns what encodes the parts."""
        return PartEncoder(self._tokenizer.backend_tokenizer.to_str(), self.before)

    def document(self, pieces: Iterator[Piece], place: Place) -> Iterator[Unit]:
        """Yields the units that are full with one document.

        Args:
            pieces: those of the document, from its beginning on.
            place: the place in it to begin at.

        Raises:
            DataError: a conversation that the template refuses.
        """
        first = next(pieces)
        if first.chat and self._tokenizer.chat_template:
            self._add(Template(self._rendered(first)), len(first.text))
        else:
            if not place.start:
                self._add(self.before)
            texts = _from(place.start, (piece.text for piece in chain([first], pieces)))
            yield from self._windows(texts, place) if place.taken > place.start else self._cut(texts, place)
        end = Place(place.document + 1, 0, 0)
        self._add([self.behind])
        if self._characters >= UNIT:
            yield self.rest(end)

    def rest(self, end: Place) -> Unit:
        """Returns a unit of all parts that were not yielded, which end at a place."""
        unit = Unit(self._parts, end, self._characters)
        self._parts, self._characters = [], 0
        return unit

    def _add(self, part: Part, characters: int = 0) -> None:
        self._parts.append(part)
        self._characters += characters

    def _cut(self, texts: Iterator[str], place: Place) -> Iterator[Unit]:
        held, start, gone = "", 0, place.start
        for text in texts:
            held, gone, start = held[start:] + text, gone + start, 0
            while self._apart and (found := WORD_BOUNDARY.search(held, start + CUT)) is not None:
                self._add(held[start : found.start()], found.start() - start)
                start = found.start()
                if self._characters >= UNIT:
                    yield self.rest(Place(place.document, gone + start, gone + start))
            if len(held) - start > PIECE:
                at = gone + start
                yield from self._windows(chain([held[start:]], texts), Place(place.document, at, at))
                return
        self._add(held[start:], len(held) - start)

    def _windows(self, texts: Iterator[str], place: Place) -> Iterator[Unit]:
        before = place.taken
        for run in long_ids(self._backend, texts, taken=place.taken - place.start):
            taken = place.start + run.taken
            self._add(run.ids, taken - before)
            before = taken
            if self._characters >= UNIT and not run.last:
                yield self.rest(Place(place.document, place.start + run.start, taken))

    def _rendered(self, piece: Piece) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(json.loads(piece.chat), tokenize=False)
        except (TemplateError, TypeError) as error:
            raise DataError(
                f"{shown(piece.name)}: the tokenizer's chat template refuses this conversation ({one_line(error)})",
                "a conversation that fits the template",
                "change the conversation, or leave it out",
            ) from None
        return str(text)


def _from(start: int, texts: Iterator[str]) -> Iterator[str]:
    """Yields texts without their first characters."""
    for text in texts:
        if start < len(text):
            yield text[start:]
        start = max(0, start - len(text))


def encode_documents(
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str | Document],
    *,
    on_encoded: Callable[[int], None] = lambda characters: None,
) -> Iterator[list[int]]:
    """Encodes documents between their marks; ``<|endoftext|>`` spelled inside a document stays plain text.

    The ids are those of each document as one text, however long it is.

    Args:
        tokenizer: one from ``train_tokenizer``, or any other.
        texts: the documents. A conversation is encoded as the tokenizer's chat template writes it, if there is one;
            special tokens that the template spells count as special.
        on_encoded: called again and again with the number of characters that are done.

    Returns:
        The token ids in lists of any length, in order.

    Raises:
        ConfigError: the same as ``document_marks``.
        DataError: a conversation that the template refuses.

    >>> from diffattn.data.tokenizer import train_tokenizer
    >>> list(encode_documents(train_tokenizer([], 257), ["", "!"]))
    [[0, 1, 0]]
    """
    parts, done = DocumentParts(tokenizer), 0
    encode = parts.encoder()

    def units() -> Iterator[Unit]:
        for text in texts:
            document = text if isinstance(text, Document) else Document("", text)
            yield from parts.document(pieces_of(document), Place(0, 0, 0))
        yield parts.rest(Place(0, 0, 0))

    for unit in units():
        yield encode(unit.parts).tolist()
        done += unit.characters
        on_encoded(done)


def _words_apart(backend: Tokenizer) -> bool:
    """Returns whether the tokenizer, like ours, encodes words one by one, so that a text may be cut between them."""
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    words = backend.pre_tokenizer
    return (
        isinstance(backend.model, BPE)
        and isinstance(words, ByteLevel)
        and words.use_regex
        # A prefix space would be put before every piece.
        and not words.add_prefix_space
        and backend.normalizer is None
        # An added token that is not special may hold a space.
        and all(token.special for token in backend.get_added_tokens_decoder().values())
    )


class Run(NamedTuple):
    """Some ids of a long text, and where its encoding may begin again; positions are in characters."""

    ids: list[int]
    start: int
    """The start of the window that goes on."""
    taken: int
    """The end of the text that the ids stand for."""
    last: bool
    """True at the end of the text."""


def long_ids(
    backend: Tokenizer,
    texts: Iterable[str],
    *,
    taken: int = 0,
    window: int = WINDOW,
    overlap: int = OVERLAP,
    agreed: int = AGREED,
) -> Iterator[Run]:
    """Encodes a text of any length without special tokens.

    Args:
        backend: a tokenizer that neither truncates nor pads a text.
        texts: any text in parts of any length, or what is left of it from the ``start`` of a run on.
        taken: the character before which tokens are left out.
        window, overlap, agreed: lengths in characters; smaller ones than the defaults are for tests.

    Returns:
        The token ids in several runs, in order.
    """
    text = _Parts(iter(texts))
    current = _Window(backend, text, 0, window)
    while text.goes_on(current.end):
        begins = current.starts(current.end - overlap, current.end - agreed)
        following = _Window(backend, text, begins[0], window) if begins else None
        joint = None if following is None else _joint(current, following, agreed)
        if following is None or joint is None:
            current = _Window(backend, text, current.start, 2 * (current.end - current.start))
            continue
        yield Run(current.ids[current.index(taken) : current.index(joint)], following.start, joint, False)
        current, taken = following, joint
        text.forget(current.start)
    yield Run(current.ids[current.index(taken) :], current.start, text.read, True)


class _Parts:
    """A text that is read part by part, of which only what is needed is held."""

    def __init__(self, parts: Iterator[str]) -> None:
        self._parts, self._held, self._origin = parts, "", 0

    @property
    def read(self) -> int:
        """The end of what was read."""
        return self._origin + len(self._held)

    def get(self, start: int, size: int) -> str:
        """Returns characters, fewer at the end of the text."""
        while self.read < start + size and (more := next(self._parts, None)) is not None:
            self._held += more
        return self._held[start - self._origin : start - self._origin + size]

    def goes_on(self, position: int) -> bool:
        """Returns whether the text has a character at a position."""
        return self.get(position, 1) != ""

    def forget(self, end: int) -> None:
        """Drops what is before a position, if it is much."""
        if end - self._origin > len(self._held) // 2:
            self._held, self._origin = self._held[end - self._origin :], end


class _Window:
    """A part of a text and its tokens; positions are counted from the beginning of the text."""

    def __init__(self, backend: Tokenizer, text: _Parts, start: int, size: int) -> None:
        from tokenizers.models import Unigram

        encoding = backend.encode(text.get(start, size), add_special_tokens=False)
        self.start, self.end = start, start + size
        self.ids: list[int] = encoding.ids
        self._words: list[int | None] | None = encoding.word_ids if isinstance(backend.model, Unigram) else None
        self._ranges: list[tuple[int, int]] = encoding.offsets

    def index(self, start: int) -> int:
        """The index of the first token that does not start before a position in the text."""
        return bisect_left(self._ranges, start - self.start, key=lambda found: found[0])

    def may_begin(self, start: int) -> bool:
        """Returns whether windows may be joined at a position where a token starts."""
        index = self.index(start)
        return self._words is None or index == 0 or self._words[index] != self._words[index - 1]

    def starts(self, first: int, end: int) -> list[int]:
        """The positions at which tokens start, from one position in the text up to another."""
        return [self.start + begin for begin, _ in self._ranges[self.index(first) : self.index(end)]]

    def tokens(self, first: int, end: int) -> dict[int, list[tuple[int, int]]]:
        """The ids and ends of these tokens by their start; tokens of parts of one character have the same start."""
        found: dict[int, list[tuple[int, int]]] = {}
        for index in range(self.index(first), self.index(end)):
            begin, stop = self._ranges[index]
            found.setdefault(self.start + begin, []).append((self.ids[index], self.start + stop))
        return found


def _joint(before: _Window, behind: _Window, agreed: int) -> int | None:
    """A position in the middle of the longest stretch in which both have the same tokens; None if it is too short."""
    known, new = before.tokens(behind.start, before.end), behind.tokens(behind.start, before.end)
    # A stretch ends where the two have different tokens, or where only one of them has a token.
    starts = sorted(known.keys() | new.keys())
    best, first = (0, 0, 0), 0
    for index, start in enumerate(starts):
        if known.get(start) != new.get(start):
            first = index + 1
        else:
            best = max(best, (start - starts[first], first, index))
    length, first, last = best
    if length < agreed:
        return None
    middle = (first + last) // 2
    nearest = sorted(range(first, last), key=lambda index: abs(index - middle))
    return next((starts[index] for index in nearest if behind.may_begin(starts[index])), None)
