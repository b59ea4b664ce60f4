"""The text of an answer whose tokens come one by one, cut before a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Text:
    """The text of one answer as its tokens come: whole characters only, and nothing from a stop text on.

    >>> from diffattn.data.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer([], 257)
    >>> text = Text(tokenizer.decode, stop=("b",))
    >>> [text.feed(token, last=False) for token in tokenizer.encode("aéb!")], text.stopped
    (['a', '', 'é', '', ''], True)
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str]) -> None:
        self.stopped = False
        # Characters that have come, also those that wait.
        self.length = 0
        self._decode = decode
        self._stops = stop
        self._tokens: list[int] = []
        # Text up to `_read` is out. What is decoded begins a little earlier, at `_start`, since a decoder may treat the
        # first token of all in its own way.
        self._start = self._read = 0
        self._held = ""

    def feed(self, token: int | None, *, last: bool) -> str:
        """Returns the text that may be sent now that a token has come; it is empty after a stop text.

        Args:
            token: the token's id; None where only the end has come.
            last: no other token will follow.
        """
        if self.stopped:
            return ""
        if token is not None:
            self._tokens.append(token)
        fresh = self._characters(last)
        self._held += fresh
        self.length += len(fresh)
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._held[: min(ends)]
        out = len(self._held) - (0 if last else self._begins_a_stop())
        text, self._held = self._held[:out], self._held[out:]
        return text

    def _characters(self, last: bool) -> str:
        before = self._decode(self._tokens[self._start : self._read])
        text = self._decode(self._tokens[self._start :])
        # This sign stands for a character whose bytes have not all come.
        if len(text) <= len(before) or (text.endswith("\ufffd") and not last):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return text[len(before) :]

    def _begins_a_stop(self) -> int:
        """Returns the length of the longest end of the held text with which a stop text begins."""
        longest = min(len(self._held), max((len(stop) for stop in self._stops), default=0))
        ends = (size for size in range(longest, 0, -1) if any(s.startswith(self._held[-size:]) for s in self._stops))
        return next(ends, 0)
