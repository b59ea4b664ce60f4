"""A request's prompts as token ids: refused by their bytes where they cannot fit, before anything is spent on them.

What is here runs beside the event loop: the tokenizer of a long text takes seconds, a template may take as long.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from diffattn.serve import openai_request
from diffattn.serve.openai_request import Asked
from diffattn.serve.request_error import RequestError, check_text
from diffattn.serve.transformers_private import template_messages

# A normaliser may make a text shorter: NFKC turns letters of 4 bytes into letters of 1.
_NORMALISED = 4
# A text is encoded at once up to this many bytes for each token of the context. Prose has 4 or 5 to a token.
_DENSE = 4
# Characters of a longer text that are encoded at a time, to see whether the whole is worth it.
_PIECE = 2**16
# JSON may write a byte of text with six, as \u0041, and says other things beside the prompts.
_ESCAPED = 6
_BESIDE = 2**20
# The most bytes of any request. A prompt of a million tokens has a few MB.
LONGEST_BODY = 32 * 2**20
# A client reads no answer while it still sends, so what is too long is taken, and thrown away, up to here.
_LONGEST_SENT = 2 * LONGEST_BODY


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request, ready for the engine."""

    ids: list[int]
    """The token ids that the engine is given."""
    text: str | None = None
    """The text that ``echo`` gives back; None where it was not asked for."""


class Prompts:
    """Reads the prompts of one model's requests.

    Args:
        tokenizer: the model's, a fast one.
        name: the model's name, for errors.
        context: tokens that prompt and answer may have together.
        rows: rows of the model's embedding; a token's id is below it.
        tools: whether the engine reads the calls of tools that an answer makes.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, name: str, context: int, rows: int, *, tools: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._backend: Any = tokenizer.backend_tokenizer
        # A tokenizer.json may cut off what is too long, which would be a prompt that nobody wrote.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._name = name
        self._context = context
        self._rows = rows
        self._tools = tools
        longest = max(len(token.encode("utf-8", "replace")) for token in tokenizer.get_vocab())
        self.longest_text = context * longest * (1 if self._backend.normalizer is None else _NORMALISED)

    @property
    def longest_body(self) -> int:
        """The most bytes of a request whose one prompt may fit; a longer body is not even parsed."""
        return min(LONGEST_BODY, _ESCAPED * self.longest_text + _BESIDE)

    async def body(self, kind: str, parts: AsyncIterator[bytes]) -> bytes:
        """Returns the body of a request, of which too long a one is thrown away as it comes.

        Args:
            kind: the header content-type.
            parts: the body, piece by piece.

        Raises:
            RequestError: status 415 for another type than JSON, 413 or 400 for too long a body.
        """
        # A page that a browser shows may send any other type to this machine without being asked whether it may.
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise RequestError(
                f"the content type is {kind[:80]!r}",
                "application/json",
                "send it in the header content-type",
                status=415,
            )
        held: list[bytes] = []
        size = 0
        async for part in parts:
            size += len(part)
            if size <= self.longest_body:
                held.append(part)
            else:
                held.clear()
            if size > _LONGEST_SENT:
                break
        if size > self.longest_body:
            raise self.too_long(size)
        return b"".join(held)

    def read(self, raw: bytes, *, chat: bool, names: tuple[str, ...]) -> tuple[Asked, list[Prompt]]:
        """Reads the request in a body of JSON, for one of the models ``names``, and its prompts, which all fit.

        Raises:
            RequestError: what cannot be served, as :func:`openai_request.read`; 404 for another model.
        """
        asked = openai_request.read(raw, chat=chat)
        if asked.model not in names:
            raise self.unknown_model(asked.model)
        if chat:
            prompts = [Prompt(self._encode(self._chat_text(asked), "messages", special=False))]
        else:
            prompts = [self._completion(given, asked) for given in asked.prompts]
        for prompt in prompts:
            self._check(prompt.ids, asked)
        if asked.logit_bias and max(asked.logit_bias) >= self._rows:
            raise RequestError(
                f"logit_bias names token {max(asked.logit_bias)}", f"a token id below {self._rows}",
                "leave other ids out", param="logit_bias",
            )  # fmt: skip
        return asked, prompts

    def unknown_model(self, name: str) -> RequestError:
        """Returns the answer to a request for another model."""
        return RequestError(
            f"model is {name[:200]!r}", f"{self._name!r}, the one that this server has", "ask for that one",
            status=404, param="model", code="model_not_found",
        )  # fmt: skip

    def too_long(self, size: int) -> RequestError:
        """Returns the answer to a body of ``size`` bytes, which was not read."""
        return RequestError(
            f"the body has {size:,} bytes and more",
            f"at most {self.longest_body:,}, enough for a context of {self._context:,} tokens",
            "shorten the prompt, or send several requests",
            status=413 if size > LONGEST_BODY else 400,
            code="context_length_exceeded",
        )

    def _completion(self, given: str | list[int], asked: Asked) -> Prompt:
        if isinstance(given, str):
            return Prompt(self._encode(given, "prompt", special=True), given if asked.echo else None)
        if len(given) <= self._context and max(given) >= self._rows:
            raise RequestError(
                f"prompt has the token id {str(max(given))[:20]}", f"an id from 0 to {self._rows - 1:,}",
                "encode the prompt with the model's own tokenizer", param="prompt",
            )  # fmt: skip
        text = self._tokenizer.decode(given, skip_special_tokens=True) if asked.echo else None
        return Prompt(given, text)

    def _chat_text(self, asked: Asked) -> str:
        if not self._tokenizer.chat_template:
            raise RequestError(
                f"messages are given and the model {self._name!r} has no chat template", "a prompt",
                "ask /v1/completions, or add a chat_template to the model's tokenizer", param="messages",
            )  # fmt: skip
        tools = asked.content.get("tools")
        text = self._written(asked, tools)
        if tools and text == self._written(asked, None):
            raise RequestError(
                f"tools are given, and the chat template of {self._name!r} does not tell the model of them",
                "a model whose template does", "leave tools out", param="tools",
            )  # fmt: skip
        if tools and not self._tools:
            raise RequestError(
                "tools are given", "none, since this engine does not know how the model writes a call of one",
                "leave tools out, or start the server with --engine transformers", param="tools",
            )  # fmt: skip
        return text

    def _written(self, asked: Asked, tools: list[dict[str, Any]] | None) -> str:
        """Returns the messages as the chat template writes them."""
        content = asked.content
        try:
            text: Any = self._tokenizer.apply_chat_template(
                template_messages(content["messages"]),
                add_generation_prompt=True,
                tools=tools,
                tokenize=False,
                **content.get("chat_template_kwargs", {}),
            )
        # A template is a program of the model's, which fails in its own ways over what a client gave it.
        except Exception as error:
            raise RequestError(
                f"the chat template refuses the messages ({type(error).__name__}: {str(error)[:500]})",
                "messages that it can write", "correct the messages, or the model's template", param="messages",
            ) from error  # fmt: skip
        return check_text(text, "messages")

    def _encode(self, text: str, param: str, *, special: bool) -> list[int]:
        size = len(text.encode())
        if size > self.longest_text:
            raise RequestError(
                f"{param} has {size:,} bytes",
                f"at most {self.longest_text:,}, all that a context of {self._context:,} tokens can stand for",
                "shorten the prompt",
                param=param,
                code="context_length_exceeded",
            )
        if size > _DENSE * self._context:
            count = 0
            for start in range(0, len(text), _PIECE):
                count += len(self._ids(text[start : start + _PIECE], special=False))
                # The pieces of a text that was cut may have a few tokens more or less than the whole.
                if count > 2 * self._context:
                    raise self._no_room(f"more than {self._context:,}", param)
        return self._ids(text, special=special)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        # This is the only way of the tokenizer that lets other threads run and keeps no offsets.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
        return ids

    def _check(self, prompt: list[int], asked: Asked) -> None:
        param = "messages" if asked.is_chat else "prompt"
        if not prompt:
            raise RequestError("the prompt has no tokens", "a text to go on from", "write one", param=param)
        room = self._context - len(prompt)
        if room < 1 or room < (asked.max_tokens or 0):
            raise self._no_room(f"{len(prompt):,}", param, asked.max_tokens)
        if max(prompt) >= self._rows:
            raise RequestError(
                f"the prompt has token {max(prompt)}", f"a token id below {self._rows}",
                "serve the model with its own tokenizer", status=500,
            )  # fmt: skip

    def _no_room(self, count: str, param: str, wanted: int | None = None) -> RequestError:
        more = f" and {wanted:,} more are asked for" if wanted is not None else ""
        return RequestError(
            f"the prompt has {count} tokens{more}",
            f"at most {self._context:,} tokens in all, which is the context",
            "shorten the prompt, or ask for fewer tokens",
            param=param,
            code="context_length_exceeded",
        )
