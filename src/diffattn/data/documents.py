"""The document, which is the unit of text, the pieces in which it is read, and the text of a conversation."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

PIECE = 2**22
"""The most characters of a piece of text."""
SEPARATOR = "<|endoftext|>"
# A message of a conversation, whose values may be anything until it is read.
Message = dict[str, object]


@dataclass(frozen=True)
class Document:
    """A named text. Whole documents are held out, and in a token file a separator follows each."""

    name: str
    text: str
    """The text, or that of :func:`chat_text` for a conversation. It decides the split and all counts, and tokenizers
    without a chat template read it."""
    chat: str = ""
    """The conversation as JSON, a list of ``{"role": …, "content": …}``; empty for other text."""


class Piece(NamedTuple):
    """A document, or a part of one that has more than ``PIECE`` characters; its parts follow each other."""

    name: str
    """The name of the document."""
    text: str
    """A part of the document's text, of at most ``PIECE`` characters; that of a conversation is never parted."""
    chat: str = ""
    """The conversation as JSON; empty for other text."""
    last: bool = True
    """False if the next piece belongs to the same document."""


def pieces_of(document: Document) -> Iterator[Piece]:
    """Yields a document in pieces.

    >>> [piece.last for piece in pieces_of(Document("long", "a" * (PIECE + 1)))]
    [False, True]
    """
    size = len(document.text)
    if size <= PIECE or document.chat:
        yield Piece(document.name, document.text, document.chat)
        return
    for start in range(0, size, PIECE):
        yield Piece(document.name, document.text[start : start + PIECE], last=start + PIECE >= size)


def documents_of(pieces: Iterable[Piece]) -> Iterator[Document]:
    """Yields whole documents, each of which has to fit into memory.

    >>> [document.text for document in documents_of([Piece("a", "on", last=False), Piece("a", "e"), Piece("b", "two")])]
    ['one', 'two']
    """
    texts: list[str] = []
    for piece in pieces:
        texts.append(piece.text)
        if piece.last:
            yield Document(piece.name, texts[0] if len(texts) == 1 else "".join(texts), piece.chat)
            texts = []


class TextDigest:
    """The SHA-256 of the documents' names, lengths and bytes, taken piece by piece.

    >>> digest = TextDigest()
    >>> digest.add(Piece("x", "ab"))
    >>> digest.hexdigest() == hashlib.sha256(b"1 2 xab").hexdigest()
    True
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        # The length of a document stands before its bytes, so that those of a long one wait on the disk.
        self._begun: tempfile.SpooledTemporaryFile[bytes] | None = None

    def add(self, piece: Piece) -> None:
        """Adds the next piece, whose text can be written as UTF-8."""
        data = piece.text.encode()
        if self._begun is None and piece.last:
            self._begin(piece, len(data))
            self._hash.update(data)
        else:
            if self._begun is None:
                self._begun = tempfile.SpooledTemporaryFile(4 * PIECE)  # noqa: SIM115
            self._begun.write(data)
            if not piece.last:
                return
            self._begin(piece, self._begun.tell())
            self._begun.seek(0)
            while data := self._begun.read(PIECE):
                self._hash.update(data)
            self._begun.close()
            self._begun = None
        self._hash.update(piece.chat.encode())

    def _begin(self, piece: Piece, length: int) -> None:
        title = piece.name.encode("utf-8", "surrogateescape")
        self._hash.update(b"%d %d " % (len(title), length) + title)

    def hexdigest(self) -> str:
        """Returns the digest of what was added, in hexadecimal digits."""
        return self._hash.hexdigest()


def weighted_digest(digests: Iterable[str], weights: Iterable[float]) -> str:
    """Returns the digest of several texts with weights, from the digest of each; their names are not part of it."""
    return hashlib.sha256(json.dumps([list(digests), list(map(float, weights))]).encode()).hexdigest()


# The names of a message's fields, and other names of the speakers than those that chat templates know.
_FIELDS = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant"}


def is_chat(value: object) -> TypeGuard[list[Message]]:
    """Returns whether a value of a row is a list of messages.

    >>> is_chat([{"role": "user", "content": "Hi"}]), is_chat(["Hi"])
    (True, False)
    """
    return isinstance(value, list) and bool(value) and all(_fields(message) is not None for message in value)


def read_chat(value: list[Message]) -> str:
    """Returns messages as the JSON of a :class:`Document`.

    Raises:
        ValueError: a message without text; its text says which.
    """
    messages = []
    for number, message in enumerate(value, 1):
        names = _fields(message)
        assert names is not None
        role, content = (message[name] for name in names)
        if isinstance(content, list):
            # A message to a model that also sees pictures has several parts.
            parts = [part.get("text") if isinstance(part, dict) else part for part in content]
            texts = [part for part in parts if isinstance(part, str)]
            content = "".join(texts) if len(texts) == len(parts) else None
        if not isinstance(content, str) or not isinstance(role, str):
            raise ValueError(f"message {number} of the conversation holds no text")
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return json.dumps(messages)


def chat_text(chat: str) -> str:
    r"""Returns a conversation as plain text: speaker, colon and words of each message, with blank lines between them.

    >>> chat_text('[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]')
    'user: Hi\n\nassistant: Hello!'
    """
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in json.loads(chat))


def _fields(message: object) -> tuple[str, str] | None:
    if not isinstance(message, dict):
        return None
    return next((names for names in _FIELDS if message.keys() >= set(names)), None)
