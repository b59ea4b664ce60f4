"""The document, which is the unit of text, and the text of a conversation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TypeGuard

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
