"""Reads a text of any size once, to know its documents, and holds a part of them out; what it finds is on the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from diffattn.data.documents import Piece, TextDigest, pieces_of
from diffattn.data.sources import files_of, sources_of
from diffattn.data.text import Corpus, Text, check_fraction, last_end, one_text_note, open_text
from diffattn.errors import CheckpointError, DataError
from diffattn.files import file_facts, shown, write_json
from diffattn.sealed import SEAL, read_sealed, sealed

SIDES = ("train", "validation")
"""The two parts of a text: the one to train on, and the held-out one."""
# What is known of a document: the SHA-256 of its text, and its size in UTF-8.
_RECORD = np.dtype([("sha256", "V32"), ("bytes", "<u8"), ("characters", "<u8")])
# The documents that are looked at together.
_TOGETHER = 1 << 20
# Only so many characters before the place where a single document would be cut are searched for the end of a paragraph.
_NEAR = 1 << 22
_DOCUMENTS, _FACTS = "documents.bin", "survey.json"


@dataclass(frozen=True)
class TextSource:
    """One source of a text, or all of them where none has a weight."""

    name: str
    read: Callable[[], Iterator[Piece]]
    weight: float | None = None
    files: Sequence[Path] | None = None
    """The files that it is read from, where they are known."""
    asked: tuple[str, ...] = ()
    """The options that decide, beside the files, which text is in them."""

    def facts(self) -> list[list[object]] | None:
        """Returns the facts by which files are known to be those that were read before."""
        if self.files is None:
            return None
        found = [(str(path.resolve()), path.stat()) for path in self.files]
        return [[path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] for path, stat in found]


def text_sources(
    text: str | Path | Sequence[str | Path] | Corpus | Text, text_column: str, on_note: Callable[[str], None]
) -> tuple[str, list[TextSource]]:
    """Returns the name of a text, and its sources: each by itself if they have weights, else all as one."""
    if isinstance(text, Corpus):
        documents = text.documents
        return text.name, [TextSource(text.name, lambda: chain.from_iterable(map(pieces_of, documents)))]
    given = [] if isinstance(text, Text) else sources_of(text)
    opened = text if isinstance(text, Text) else open_text(text, text_column=text_column, on_note=on_note)
    files = [files_of(source.given) for source in given] or [None] * len(opened.parts)
    if opened.parts[0].weight is not None:
        return opened.name, [
            TextSource(part.name, part.pieces, part.weight, some, (part.name, text_column))
            for part, some in zip(opened.parts, files, strict=True)
        ]
    every = None if None in files else [path for some in files for path in some or ()]
    names = tuple(part.name for part in opened.parts)
    return opened.name, [TextSource(opened.name, opened.pieces, None, every, (*names, text_column))]


@dataclass(frozen=True)
class Survey:
    """The result of one reading of a text."""

    digest: str
    """The digest of the text, that of its ``Corpus``."""
    documents: npt.NDArray[np.void]
    """A record of each document, mapped from a file: ``sha256``, ``bytes`` and ``characters``."""
    equal: bool
    """True if all documents are equal."""

    @classmethod
    def make(cls, folder: Path, pieces: Iterable[Piece], on_read: Callable[[int], None]) -> Survey:
        """Reads a text and writes what it finds into a folder.

        Args:
            folder: an existing folder.
            pieces: the text.
            on_read: called again and again with the bytes of text that were read.
        """
        digest, own = TextDigest(), hashlib.sha256()
        size = characters = read = count = 0
        first, equal = b"", True
        with (folder / _DOCUMENTS).open("wb") as file:
            for piece in pieces:
                digest.add(piece)
                data = piece.text.encode()
                own.update(data)
                size, characters, read = size + len(data), characters + len(piece.text), read + len(data)
                on_read(read)
                if piece.last:
                    key = own.digest()
                    file.write(key + size.to_bytes(8, "little") + characters.to_bytes(8, "little"))
                    first, count = first or key, count + 1
                    equal = equal and key == first
                    own, size, characters = hashlib.sha256(), 0, 0
        facts = {"digest": digest.hexdigest(), "equal": equal, **file_facts(folder / _DOCUMENTS)}
        write_json(folder / _FACTS, sealed(facts))
        return cls._open(folder, facts)

    @classmethod
    def read(cls, folder: Path) -> Survey | None:
        """Returns what was found before, or None if it is not there or not whole."""
        try:
            facts = read_sealed(folder / _FACTS, way_out="read the text again")
            kept = file_facts(folder / _DOCUMENTS)
        except (CheckpointError, OSError):
            return None
        return cls._open(folder, facts) if SEAL in facts and facts["sha256"] == kept["sha256"] else None

    @classmethod
    def _open(cls, folder: Path, facts: dict[str, object]) -> Survey:
        documents = np.memmap(folder / _DOCUMENTS, dtype=_RECORD, mode="r")
        return cls(str(facts["digest"]), documents, bool(facts["equal"]))

    def verified(self, name: str, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Yields a text that is read again; raises a ``DataError`` if it is not the one that was read before."""
        own, number = hashlib.sha256(), 0
        for piece in pieces:
            own.update(piece.text.encode())
            if piece.last:
                if number >= len(self.documents) or own.digest() != self.documents["sha256"][number].tobytes():
                    raise _changed(name, shown(piece.name))
                own, number = hashlib.sha256(), number + 1
            yield piece
        if number < len(self.documents):
            raise _changed(name, "a document is gone")


def _changed(name: str, what: str) -> DataError:
    return DataError(
        f"{name}: the text changed while it was prepared ({what})", "a text that stays as it is", "start again"
    )


@dataclass(frozen=True)
class Sides:
    """The split of a text: the documents that are held out, and the numbers of each of the two sides."""

    held_out: npt.NDArray[np.bool_]
    """True for each document that is held out. A document that is cut in two counts as two."""
    cut: int | None
    """The character at which the only document is cut in two; None where whole documents are held out."""
    note: str
    """A sentence about an unusual split, or an empty text."""
    documents: dict[str, int]
    bytes: dict[str, int]
    characters: dict[str, int]

    def side(self, document: int) -> str:
        """Returns the side of a document."""
        return SIDES[int(self.held_out[document])]

    def pieces(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Yields the text, with a document that is cut in two as two."""
        if self.cut is None:
            yield from pieces
            return
        start = 0
        for piece in pieces:
            at = self.cut - start
            if 0 < at <= len(piece.text):
                yield Piece(f"{piece.name} (head)", piece.text[:at])
                if at == len(piece.text):
                    start += at
                    continue
                piece = piece._replace(text=piece.text[at:])
                start += at
            start += len(piece.text)
            half = "head" if start < self.cut else "tail"
            yield piece._replace(name=f"{piece.name} ({half})", chat="")
            if piece.last:
                break
        # The rest is read too, so that it is known whether it is still the same.
        for _ in pieces:
            pass


def sides_of(name: str, survey: Survey, pieces: Callable[[], Iterator[Piece]], fraction: float) -> Sides:
    """Holds documents out exactly as :func:`diffattn.data.text.split_by_document` does, in bounded memory.

    Args:
        name: the name of the text, for errors.
        survey: what is known of its documents.
        pieces: reads the text anew; called only where all documents are equal, so that one of them is cut in two.
        fraction: the share of the bytes to hold out, above 0 and at most 0.5.

    Raises:
        ConfigError: a fraction out of range.
        DataError: a text of one character.
    """
    check_fraction(fraction)
    if survey.equal:
        return _two_halves(survey, survey.verified(name, pieces()), fraction)
    held_out = _held_out(survey.documents, fraction)
    found = {kind: dict.fromkeys(SIDES, 0) for kind in ("documents", "bytes", "characters")}
    for start in range(0, len(held_out), _TOGETHER):
        some, held = survey.documents[start : start + _TOGETHER], held_out[start : start + _TOGETHER]
        for side, chosen in zip(SIDES, (~held, held), strict=True):
            found["documents"][side] += int(chosen.sum())
            for kind in ("bytes", "characters"):
                found[kind][side] += int(some[kind][chosen].sum())
    return Sides(held_out, None, "", **found)


def _held_out(documents: npt.NDArray[np.void], fraction: float) -> npt.NDArray[np.bool_]:
    """Visits the documents in the order of their SHA-256, and marks those that are held out."""
    parts = range(0, len(documents), _TOGETHER)
    total = sum(int(documents["bytes"][start : start + _TOGETHER].sum()) for start in parts)
    held_out, taken = np.zeros(len(documents), np.bool_), 0
    # The order is taken bucket by bucket, by the first two bytes, so that only one bucket is in memory.
    buckets = min(1 << 16, 1 << (len(documents) // _TOGETHER).bit_length())
    for bucket in range(buckets):
        if taken >= fraction * total:
            break
        chosen: list[npt.NDArray[np.int64]] = []
        for start in parts:
            keys = documents["sha256"][start : start + _TOGETHER]
            heads = np.ascontiguousarray(keys).view(">u2").reshape(len(keys), -1)[:, 0]
            chosen.append(start + np.flatnonzero(heads.astype(np.int64) * buckets >> 16 == bucket))
        index = np.concatenate(chosen)
        if not len(index):
            continue
        keys = np.ascontiguousarray(documents["sha256"][index]).view(">u8").reshape(len(index), -1)
        order = np.lexsort(keys.T[::-1])
        index, keys = index[order], keys[order]
        first = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]).any(axis=1)))
        sizes = np.add.reduceat(documents["bytes"][index], first)
        for begin, end, size in zip(first, np.append(first[1:], len(index)), sizes.tolist(), strict=True):
            if taken < fraction * total and taken + size <= total / 2:
                held_out[index[begin:end]] = True
                taken += size
    return held_out


def _two_halves(survey: Survey, pieces: Iterable[Piece], fraction: float) -> Sides:
    """Cuts the first document in two."""
    size, characters = (int(survey.documents[kind][0]) for kind in ("bytes", "characters"))
    # The tail holds at least the fraction, and a boundary is searched only in the second half of the text.
    most = int(size * (1 - fraction))
    near, start, before, name = "", 0, 0, ""
    for piece in pieces:
        name, data = piece.name, piece.text.encode()
        room = most - before - len(near.encode())
        near += piece.text if len(data) <= room else data[:room].decode(errors="ignore")
        if len(near) > 2 * _NEAR:
            before += len(near[:-_NEAR].encode())
            start += len(near) - _NEAR
            near = near[-_NEAR:]
        if len(data) > room or piece.last:
            break
    if characters < 2:
        raise DataError(f"{name}: only one character", "text for training and for a held-out part", "give more text")
    target = min(max(1, start + len(near)), characters - 1)
    # A first character that is longer than what may be left of it stays whole.
    near = near or piece.text[:1]
    near = near[: target - start]
    half = min(characters // 2, target)
    cut, kind = last_end(near, max(0, half - start))
    head = before + len(near[:cut].encode())
    note = one_text_note(len(survey.documents), size - head, kind)
    numbers = {"train": start + cut, "validation": characters - start - cut}
    return Sides(
        np.array([False, True]), start + cut, note, {"train": 1, "validation": 1},
        {"train": head, "validation": size - head}, numbers,
    )  # fmt: skip


def in_sample(document: bytes, part: int, share: float) -> bool:
    """Returns whether a part of a document is in a sample that has about a share of all text.

    The choice depends on the SHA-256 of the document and the number of the part, not on the order of the documents.

    >>> in_sample(b"", 0, 1.0), in_sample(b"", 0, 0.0)
    (True, False)
    """
    chosen = hashlib.sha256(document + json.dumps(part).encode()).digest()
    return int.from_bytes(chosen[:8], "big") < share * 2**64
