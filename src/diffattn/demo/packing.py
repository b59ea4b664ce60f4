"""Writes bytes as text that a page of UTF-16 holds at 15 bits in every two bytes; ``unpack.js`` reads it again.

Base64 spends a third more, and a page that carries a runtime and two models has no such room. The characters begin at
U+0100 and end before U+8100: none of them is a control character, half of a pair, the end of a line, or anything that
HTML changes or reads as markup.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass

import numpy as np

BITS = 15
FIRST = 0x100


@dataclass(frozen=True)
class Blob:
    """Bytes that were compressed and written as text."""

    text: str
    """One character for every 15 bits, the highest bit first."""
    packed: int
    """Bytes of the compressed content: the last character may hold up to 14 bits more."""
    size: int
    """Bytes of the content itself."""


def pack(content: bytes) -> Blob:
    """Compresses bytes with gzip and writes them as text.

    >>> pack(b"the same letters again, the same letters again").size
    46
    """
    # Without a time the same content gives the same page.
    compressed = gzip.compress(content, 9, mtime=0)
    bits = np.unpackbits(np.frombuffer(compressed, np.uint8))
    places = np.pad(bits, (0, -len(bits) % BITS)).reshape(-1, BITS)
    # Two bytes, of which the highest bit is 0.
    halves = np.packbits(np.pad(places, ((0, 0), (1, 0))), axis=1).astype(np.uint16)
    units = (halves[:, 0] << 8 | halves[:, 1]) + FIRST
    return Blob(units.astype("<u2").tobytes().decode("utf-16-le"), len(compressed), len(content))
