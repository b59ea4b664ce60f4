"""Encodes a long text in windows that overlap; the tokens are the same as those of the whole text.

Encoding takes a hundred times the memory of the text, so a long one is encoded in windows. A tokenizer may treat the
beginning and the end of a text in its own way (a space before it, half a word after it), so windows cannot just be
joined. Each window therefore begins where a token of the one before it begins, well before that one's end,
and the two are joined in the middle of a long stretch in which both have the same tokens:

    window 1   |a b c d e f g h x|
    window 2         |y e f g h i j k …        joined at f|g

If they never agree (because one token covers the whole text, say), the window is made longer, at last as long as the
text. A Unigram model's windows are joined only between words: among equally likely ways to cut a word it chooses by the
rounding error of a sum over all that comes before in the word, however far away.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Lengths in characters: a window, the part that two windows share, and the stretch in which both have to be equal.
WINDOW, OVERLAP, AGREED = 1 << 20, 1 << 14, 1 << 12


def long_ids(
    backend: Tokenizer, text: str, *, window: int = WINDOW, overlap: int = OVERLAP, agreed: int = AGREED
) -> Iterator[list[int]]:
    """Encodes a text of any length without special tokens.

    Args:
        backend: a tokenizer that neither truncates nor pads a text.
        text: any text.
        window, overlap, agreed: lengths in characters; smaller ones than the defaults are for tests.

    Returns:
        The token ids in several lists, in order.
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
        yield current.ids[current.index(taken) : current.index(joint)]
        current, taken = following, joint
    yield current.ids[current.index(taken) :]


class _Window:
    """A part of a text and its tokens; positions are counted from the beginning of the text."""

    def __init__(self, backend: Tokenizer, text: str, start: int, size: int) -> None:
        from tokenizers.models import Unigram

        encoding = backend.encode(text[start : start + size], add_special_tokens=False)
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
