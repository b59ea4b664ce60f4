"""Checks that a tokenizer gives text back: the text is encoded, decoded and compared before it is first used.

A tokenizer that drops unknown characters, lower-cases or strips reads another text than the one that it gets. Its model
is then measured on less text, and the bits per byte of that rest would look better than they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from diffattn.data.documents import Document, Piece
from diffattn.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_LOST = 0.01
"""The share of a text's bytes that a tokenizer may lose without ``--lossy-tokenizer``."""
# The number of pieces that are tried, and their characters: evenly spread over a long text, all of a short one.
_PIECES, _CHARACTERS = 64, 4096


class RoundTrip(NamedTuple):
    """The outcome of encoding and decoding a text."""

    tried: int
    """The bytes of text that were tried."""
    lost: int
    """The bytes that did not come back."""
    given: str = ""
    """The text at the first difference; empty if there is none."""
    returned: str = ""
    """The text that came back there."""

    @property
    def share(self) -> float:
        """The share of the bytes that are lost, from 0 to 1."""
        return self.lost / self.tried if self.tried else 0.0

    def __str__(self) -> str:
        share = f"{self.share:.1%}" if self.share >= 0.001 else "less than 0.1%"
        tried = f"of {self.tried:,} bytes of the text that were tried, {share} do not come back"
        return f"{tried} ({self.given!r} becomes {self.returned!r})"


def round_trip(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document | Piece], characters: int | None = None
) -> RoundTrip:
    """Encodes pieces of text, decodes them, and counts the bytes that did not come back.

    The loss of a piece is the larger of two numbers: the bytes of the text that are missing, in their order, in what
    came back, and the bytes that came back and are not in the text. A space before the piece does not count, since many
    tokenizers put one before every text or remove one.

    Args:
        tokenizer: any tokenizer; special tokens that are spelled out count as text if the tokenizer can do that.
        documents: the text. All of it is tried up to 262,144 characters, else that many, evenly spread. The choice is
            always the same.
        characters: the number of its characters. Default: they are counted, so that the documents are read twice.

    Returns:
        The bytes that were tried and lost, and the first difference.

    >>> from diffattn.data.tokenizer import train_tokenizer
    >>> round_trip(train_tokenizer([], 257), [Document("a", "Naïve 🦁")])
    RoundTrip(tried=11, lost=0, given='', returned='')
    """
    again = _again(tokenizer)
    characters = sum(len(document.text) for document in documents) if characters is None else characters
    tried = lost = 0
    first: tuple[str, str] | None = None
    for piece in _pieces(documents, characters):
        given, returned = piece.removeprefix(" "), again(piece).removeprefix(" ")
        tried += len(piece.encode())
        if given != returned:
            lost += _lost(given.encode(), returned.encode("utf-8", "replace"))
            first = first or _difference(given, returned)
    return RoundTrip(tried, min(lost, tried), *(first or ("", "")))


def check_round_trip(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    lossy: bool = False,
    on_note: Callable[[str], None] = lambda line: None,
) -> float:
    """Tries a tokenizer by :func:`round_trip` and passes what it loses to :func:`accept`, whose share it returns."""
    return accept(tokenizer, round_trip(tokenizer, documents), lossy=lossy, on_note=on_note)


def accept(
    tokenizer: PreTrainedTokenizerBase,
    found: RoundTrip,
    *,
    lossy: bool = False,
    on_note: Callable[[str], None] = lambda line: None,
) -> float:
    """Reports what a tokenizer loses of a text, and refuses a tokenizer that loses more than ``MOST_LOST``.

    Args:
        tokenizer: the tokenizer.
        found: the result of :func:`round_trip`.
        lossy: accept any loss.
        on_note: called with a line if anything is lost.

    Returns:
        The share of the bytes that are lost.

    Raises:
        ConfigError: a loss above ``MOST_LOST`` unless ``lossy``.
    """
    which = f"the tokenizer of {tokenizer.name_or_path}" if tokenizer.name_or_path else "the tokenizer"
    if found.share > MOST_LOST and not lossy:
        raise ConfigError(
            f"{which} loses text: {found}",
            f"a loss of at most {MOST_LOST:.0%}",
            "take another tokenizer, or pass --lossy-tokenizer to use the rest of the text",
        )
    if found.lost:
        on_note(f"{which} loses text: {found}; bits per byte count all bytes of the text")
    return found.share


def _again(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """Returns a function that encodes and decodes a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda text: tokenizer.decode(
            tokenizer(text, add_special_tokens=False)["input_ids"], clean_up_tokenization_spaces=False
        )
    from diffattn.data.tokenizer import plain_backend

    backend = plain_backend(backend.to_str())
    # An unknown word is lost; the token that stands for it is not part of the text.
    unknown = tokenizer.unk_token_id

    def again(text: str) -> str:
        ids = backend.encode(text, add_special_tokens=False).ids
        return backend.decode([index for index in ids if index != unknown], skip_special_tokens=False)

    return again


def _pieces(documents: Iterable[Document | Piece], characters: int) -> Iterator[str]:
    """Yields the pieces of text that are tried, at equal distances over all documents in a row."""
    every = max(_CHARACTERS, -(-characters // _PIECES))
    start = 0
    for document in documents:
        end = start + len(document.text)
        for position in range(start - start % every, end, every):
            piece = document.text[max(0, position - start) : max(0, position + _CHARACTERS - start)]
            if piece:
                yield piece
        start = end


def _lost(given: bytes, returned: bytes) -> int:
    """The number of bytes outside the longest common subsequence of two texts.

    Source: Hyyrö, "Bit-parallel LCS-length computation revisited", 2004: a row of the table is one whole number.
    """
    positions: dict[int, int] = {}
    for position, byte in enumerate(given):
        positions[byte] = positions.get(byte, 0) | 1 << position
    every = (1 << len(given)) - 1
    row = every
    for byte in returned:
        found = row & positions.get(byte, 0)
        row = ((row + found) | (row - found)) & every
    common = len(given) - row.bit_count()
    return max(len(given), len(returned)) - common


def _difference(given: str, returned: str) -> tuple[str, str]:
    """Returns a few characters of both texts from the word on in which they first differ."""
    unequal = (index for index, (mine, theirs) in enumerate(zip(given, returned, strict=False)) if mine != theirs)
    same = next(unequal, min(len(given), len(returned)))
    start = max(0, given.rfind(" ", max(0, same - 12), same) + 1 or same - 3)
    return given[start : start + 16], returned[start : start + 16]
