"""The texts that a page begins with: one hides a number among other sentences, and its end asks for it."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from diffattn.config_fields import shown
from diffattn.data.needles import Needle, question
from diffattn.errors import ConfigError, DataError

NEEDLE = Needle("Oslo", "70035")
# Before the hidden sentence, and behind it.
_BEFORE = (
    "The harbour was quiet in the morning.",
    "A ship from the north had brought wool and salt.",
    "Nobody in the market spoke of the war.",
)
_BEHIND = (
    "The captain drank his coffee and looked at the clouds.",
    "In the evening the people went home by the old road.",
    "It had rained for three days.",
)


@dataclass(frozen=True)
class Prompt:
    """A text that the page offers."""

    title: str
    """The name on its button."""
    text: str
    """The text, at whose end the models go on."""
    answer: str | None
    """The part of it that its end asks for."""


def ready_prompts(
    text: str | None, answer: str | None, tokenizer: PreTrainedTokenizerBase, longest: int
) -> list[Prompt]:
    """Returns the texts of a page; the first is what it begins with.

    Args:
        text: a text to begin with. Default: the hidden number, among as many sentences as the models can read.
        answer: a part of it, which its end asks for.
        tokenizer: that of the models.
        longest: tokens that a text may have.

    Raises:
        ConfigError: an empty text, one that is too long, or an answer without a text.
        DataError: an answer that is not in the text.
    """
    offered = [
        hidden_number(tokenizer, longest),
        Prompt("The beginning of a story", "Once upon a time there was", None),
    ]
    ready = [prompt for prompt in offered if prompt is not None]
    if text is None:
        if answer is not None:
            raise ConfigError(f"the answer {shown(answer)} without a text", "the text that it is in", "give --text too")
        return ready
    if not text.strip():
        raise ConfigError("the text is empty", "some words", "change --text")
    if answer is not None and (not answer.strip() or answer not in text):
        given = f"the answer {shown(answer)} is not in the text"
        raise DataError(given, "a part of the text, letter by letter", "copy it from the text")
    if (count := len(tokenizer(text)["input_ids"])) > longest:
        raise ConfigError(
            f"the text has {count:,} tokens", f"at most {longest:,}, so that the models can write behind it",
            "give a shorter text",
        )  # fmt: skip
    return [Prompt("Your text", text, answer), *ready]


def hidden_number(tokenizer: PreTrainedTokenizerBase, longest: int) -> Prompt | None:
    """Returns the text that hides a number, with fewer sentences around it where a model can read no more tokens.

    Of a model that cannot even read the hidden sentence and its question it returns None.
    """
    for count in range(len(_BEFORE), -1, -1):
        sentences = [*_BEFORE[:count], NEEDLE.sentence, *_BEHIND[:count], question([NEEDLE])]
        text = " ".join(sentences)
        if len(tokenizer(text)["input_ids"]) <= longest:
            return Prompt("A number hidden in noise", text, NEEDLE.number)
    return None


def answer_tokens(text: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Returns the first token of an answer in a text, and the one behind its last."""
    start = text.index(answer)
    end = start + len(answer)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    inside = [i for i, (first, behind) in enumerate(offsets) if first < end and behind > start]
    return inside[0], inside[-1] + 1
