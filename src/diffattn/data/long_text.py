"""The tokens of a long text from windows that overlap, whatever the tokenizer: the same as those of the whole text.

Encoding takes a hundred times the memory of the text, so a long one is encoded in windows. A tokenizer may treat the
beginning and the end of a text in its own way (a space before it, half a word behind it), so that windows cannot just
be strung together. Each window therefore begins where a token of the one before it begins, well before that one's end,
and the two are joined in the middle of a long stretch of which both say the same:

    window 1   |a b c d e f g h x|
    window 2         |y e f g h i j k …        joined at f|g

Where they never agree (one token for the whole text, say), the window is made longer, at last as long as the text. A
Unigram model's windows are joined between words alone: of equally likely ways to cut a word it takes one by rounding
a sum over all that stands before in the word, however far away.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Characters: of a window, of what two share, and of the stretch in which they have to be equal.
WINDOW, OVERLAP, AGREED = 1 << 20, 1 << 14, 1 << 12


def long_ids(
    backend: Tokenizer, text: str, *, window: int = WINDOW, overlap: int = OVERLAP, agreed: int = AGREED
) -> Iterator[list[int]]:
    """Encode a text of any length without special tokens.

    Arguments:
        backend: encodes a text as it stands: it neither cuts nor fills it.
        text: any.
        window, overlap, agreed: in characters; the defaults are meant, smaller ones are for tests.
    Returns: token ids in runs, to be strung together.
    """
    taken = 0
    current = _Window(backend, text, 0, window)
    while current.end < len(text):
        begins = current.starts(current.end - overlap, current.end - agreed)
        following = _Window(backend, text, begins[0], window) if begins else None
        joint = None if following is None else _joint(current, following, agreed)
        if following is None or joint is None:
            current = _Window(backend, text, current.start, 2 * (current.end - current.start))
            continue
        yield current.ids[current.place(taken) : current.place(joint)]
        current, taken = following, joint
    yield current.ids[current.place(taken) :]


class _Window:
    """A part of a text and its tokens; places in the text are counted from its beginning."""

    def __init__(self, backend: Tokenizer, text: str, start: int, size: int) -> None:
        from tokenizers.models import Unigram

        encoding = backend.encode(text[start : start + size], add_special_tokens=False)
        self.start, self.end = start, start + size
        self.ids: list[int] = encoding.ids
        self._words: list[int | None] | None = encoding.word_ids if isinstance(backend.model, Unigram) else None
        self._ranges: list[tuple[int, int]] = encoding.offsets

    def place(self, start: int) -> int:
        """The first token that does not start before a place in the text."""
        return bisect_left(self._ranges, start - self.start, key=lambda found: found[0])

    def may_begin(self, start: int) -> bool:
        """Whether windows may be joined at a place where a token starts."""
        place = self.place(start)
        return self._words is None or place == 0 or self._words[place] != self._words[place - 1]

    def starts(self, first: int, end: int) -> list[int]:
        """Where tokens start, from one place in the text up to another."""
        return [self.start + begin for begin, _ in self._ranges[self.place(first) : self.place(end)]]

    def tokens(self, first: int, end: int) -> dict[int, list[tuple[int, int]]]:
        """Ids and ends of the tokens there, by where they start: those of parts of one character start together."""
        found: dict[int, list[tuple[int, int]]] = {}
        for place in range(self.place(first), self.place(end)):
            begin, stop = self._ranges[place]
            found.setdefault(self.start + begin, []).append((self.ids[place], self.start + stop))
        return found


def _joint(before: _Window, behind: _Window, agreed: int) -> int | None:
    """A place in the middle of the longest stretch in which both have the same tokens; None where it is too short."""
    known, new = before.tokens(behind.start, before.end), behind.tokens(behind.start, before.end)
    # Every start of either: a stretch ends where one has other tokens, or one that the other has not.
    starts = sorted(known.keys() | new.keys())
    best, first = (0, 0, 0), 0
    for place, start in enumerate(starts):
        if known.get(start) != new.get(start):
            first = place + 1
        else:
            best = max(best, (start - starts[first], first, place))
    length, first, last = best
    if length < agreed:
        return None
    middle = (first + last) // 2
    places = sorted(range(first, last), key=lambda place: abs(place - middle))
    return next((starts[place] for place in places if behind.may_begin(starts[place])), None)
