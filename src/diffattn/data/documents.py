"""A document: the unit of text, and what a conversation is as text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeGuard

SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Document:
    """A named text: the unit that is held out, and that a separator follows in a token file.

    ``chat`` is a conversation as JSON, a list of ``{"role": …, "content": …}``, or empty. ``text`` is then what
    :func:`chat_text` makes of it, by which it is split, counted and read by tokenizers without a chat template.
    """

    name: str
    text: str
    chat: str = ""


# Names of the fields of a message, and of who speaks, beside those that templates take.
_FIELDS = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant"}


def is_chat(value: object) -> TypeGuard[list[dict[str, Any]]]:
    """Whether a value of a row is a list of messages.

    >>> is_chat([{"role": "user", "content": "Hi"}]), is_chat(["Hi"])
    (True, False)
    """
    return isinstance(value, list) and bool(value) and all(_fields(message) is not None for message in value)


def read_chat(value: list[dict[str, Any]]) -> str:
    """Messages as the JSON of a :class:`Document`.

    Raises:
        ValueError: a message without text; says which.
    """
    messages = []
    for number, message in enumerate(value, 1):
        names = _fields(message)
        assert names is not None
        role, content = (message[name] for name in names)
        if isinstance(content, list):
            # Parts, as of a model that also sees pictures.
            parts = [part.get("text") if isinstance(part, dict) else part for part in content]
            texts = [part for part in parts if isinstance(part, str)]
            content = "".join(texts) if len(texts) == len(parts) else None
        if not isinstance(content, str) or not isinstance(role, str):
            raise ValueError(f"message {number} of the conversation holds no text")
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return json.dumps(messages)


def chat_text(chat: str) -> str:
    r"""A conversation as plain text: who speaks, a colon, what is said; a blank line between two messages.

    >>> chat_text('[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]')
    'user: Hi\n\nassistant: Hello!'
    """
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in json.loads(chat))


def _fields(message: object) -> tuple[str, str] | None:
    if not isinstance(message, dict):
        return None
    return next((names for names in _FIELDS if message.keys() >= set(names)), None)
