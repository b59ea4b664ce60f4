"""Whether a tokenizer gives text back: encoded, decoded and compared, when the two first meet.

A tokenizer that drops what it does not know, lower-cases or strips reads another text than the one that is given. Its
model is then measured on less, and bits per byte of what is left would look better than they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from diffattn.data.text import Document
from diffattn.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_LOST = 0.01
"""The share of a text's bytes that a tokenizer may lose without being asked for by name."""
# What is tried: pieces of so many characters, evenly spread over the text; a short text whole.
_PIECES, _CHARACTERS = 64, 4096


class RoundTrip(NamedTuple):
    """What came of encoding and decoding: ``lost`` of ``tried`` bytes, and the first place where they differ."""

    tried: int
    lost: int
    given: str = ""
    returned: str = ""

    @property
    def share(self) -> float:
        """From 0, all of it came back, to 1."""
        return self.lost / self.tried if self.tried else 0.0

    def __str__(self) -> str:
        share = f"{self.share:.1%}" if self.share >= 0.001 else "less than 0.1%"
        tried = f"of {self.tried:,} bytes of the text that were tried, {share} do not come back"
        return f"{tried} ({self.given!r} becomes {self.returned!r})"


def round_trip(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> RoundTrip:
    """Encode pieces of text, decode them, and count the bytes that did not come back.

    Of each piece, what is lost is the larger of two numbers: the bytes of the text that are not, in their order, in
    what came back, and the bytes that came back and are not in the text. A space before the piece does not count: many
    tokenizers set one before every text or take one away.

    Args:
        tokenizer: any; spelled special tokens are taken for text where it can do so.
        documents: all of 262,144 characters, or so many evenly spread over longer text. The choice is always the same.
    Returns: a :class:`RoundTrip`.

    >>> from diffattn.data.tokenizer import train_tokenizer
    >>> round_trip(train_tokenizer([], 257), [Document("a", "Naïve 🦁")])
    RoundTrip(tried=11, lost=0, given='', returned='')
    """
    again = _again(tokenizer)
    tried = lost = 0
    first: tuple[str, str] | None = None
    for piece in _pieces(documents):
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
    """Say what a tokenizer loses of a text, and refuse one that loses more than ``MOST_LOST``.

    Args:
        tokenizer, documents: as for :func:`round_trip`.
        lossy: any loss is taken.
        on_note: called with a line where anything is lost.
    Returns: the share of the bytes that are lost.
    Raises: `ConfigError` for a loss above ``MOST_LOST`` unless ``lossy``.
    """
    found = round_trip(tokenizer, documents)
    which = f"the tokenizer of {tokenizer.name_or_path}" if tokenizer.name_or_path else "the tokenizer"
    if found.share > MOST_LOST and not lossy:
        raise ConfigError(
            f"{which} loses text: {found}; wanted at most {MOST_LOST:.0%}: take another tokenizer, or say "
            "--lossy-tokenizer to go on with what is left"
        )
    if found.lost:
        on_note(f"{which} loses text: {found}; bits per byte are of all bytes of the text")
    return found.share


def _again(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """Encoding and decoding in one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda text: tokenizer.decode(
            tokenizer(text, add_special_tokens=False)["input_ids"], clean_up_tokenization_spaces=False
        )
    from diffattn.data.tokenizer import plain_backend

    backend = plain_backend(tokenizer)
    # An unknown word is lost, and its sign is not of the text.
    unknown = tokenizer.unk_token_id

    def again(text: str) -> str:
        ids = backend.encode(text, add_special_tokens=False).ids
        return backend.decode([index for index in ids if index != unknown], skip_special_tokens=False)

    return again


def _pieces(documents: Sequence[Document]) -> Iterator[str]:
    """What lies in the ranges that are tried, where all documents stand behind each other."""
    every = max(_CHARACTERS, -(-sum(len(document.text) for document in documents) // _PIECES))
    start = 0
    for document in documents:
        end = start + len(document.text)
        for place in range(start - start % every, end, every):
            piece = document.text[max(0, place - start) : max(0, place + _CHARACTERS - start)]
            if piece:
                yield piece
        start = end


def _lost(given: bytes, returned: bytes) -> int:
    """Bytes beside the longest common subsequence of two texts.

    Source: Hyyrö, "Bit-parallel LCS-length computation revisited", 2004: a row of the table is one whole number.
    """
    places: dict[int, int] = {}
    for place, byte in enumerate(given):
        places[byte] = places.get(byte, 0) | 1 << place
    every = (1 << len(given)) - 1
    row = every
    for byte in returned:
        found = row & places.get(byte, 0)
        row = ((row + found) | (row - found)) & every
    common = len(given) - row.bit_count()
    return max(len(given), len(returned)) - common


def _difference(given: str, returned: str) -> tuple[str, str]:
    """A few characters of both from the word on in which they first differ."""
    unequal = (place for place, (mine, theirs) in enumerate(zip(given, returned, strict=False)) if mine != theirs)
    same = next(unequal, min(len(given), len(returned)))
    start = max(0, given.rfind(" ", max(0, same - 12), same) + 1 or same - 3)
    return given[start : start + 16], returned[start : start + 16]
