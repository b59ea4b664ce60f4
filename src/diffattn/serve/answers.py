"""The answers to one request in the words of OpenAI's interface, whole or as events.

Several prompts, and ``n`` answers to each, are as many answers of the engine. They share one queue, and each has its
``index``: answers to the first prompt come first. Source: OpenAI's API reference, "The completion object", "The chat
completion object" and their chunks.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffattn.serve.batching import Batch, End, Failure, Piece, Stream, Token
from diffattn.serve.openai_request import Asked
from diffattn.serve.prompts import Prompt
from diffattn.serve.transformers_private import ReasoningText, ToolCall


@dataclass
class _Choice:
    """The part of one answer that has come."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, object]] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    end: End | None = None

    @property
    def reason(self) -> str | None:
        if self.end is None:
            return None
        return "tool_calls" if self.calls else self.end.reason


class Answers:
    """The answers to one request, which are begun at once.

    Args:
        batch: the engine.
        model: the name of the model in the answers.
        asked, prompts: the request.
        parsers: one for each answer: of reasoning and tool calls, or None.

    Raises:
        RequestError: status 503: the engine has ended.
    """

    def __init__(self, batch: Batch, model: str, asked: Asked, prompts: list[Prompt], parsers: list[Any]) -> None:
        self._batch = batch
        self._asked = asked
        self._prompts = prompts
        # Never a name that the client chose: two requests of one name would share their keys and values.
        self._id = f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": self._id, "created": int(time.time()), "model": model}
        self._queue: asyncio.Queue[Piece | End | Failure] = asyncio.Queue()
        self._choices = [_Choice() for _ in parsers]
        self._streams: list[Stream] = []
        try:
            for index, parser in enumerate(parsers):
                self._streams.append(
                    batch.start(
                        self._prompt(index).ids, asked, f"{self._id}-{index}", self._queue, index=index, parser=parser
                    )
                )
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Frees the places of what is not answered yet."""
        for stream in self._streams:
            stream.cancel()

    async def whole(self) -> dict[str, object]:
        """Returns everything in one object, once it is there.

        Raises:
            RequestError: status 500 or 503: the engine failed or stops.
        """
        try:
            async for news in self._news():
                if isinstance(news, Failure):
                    raise news.error
        finally:
            self.cancel()
        choices = [self._whole(index, choice) for index, choice in enumerate(self._choices)]
        kind = "chat.completion" if self._asked.is_chat else "text_completion"
        return self._head | {"object": kind, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """Yields server-sent events, the last of which is the mark that OpenAI's clients wait for.

        Whoever sends them calls :meth:`cancel` once they are sent, or the client has left.
        """
        for index in range(len(self._choices)):
            if self._asked.is_chat:
                yield self._event(index, {"delta": {"role": "assistant", "content": ""}})
            elif self._asked.echo:
                yield self._event(index, {"text": self._prompt(index).text})
        async for news in self._news():
            if isinstance(news, Failure):
                yield _data(news.error.body)
                break
            if isinstance(news, Piece):
                for change in self._changes(news):
                    yield self._event(news.index, change)
            elif isinstance(news, End):
                last = all(choice.end is not None for choice in self._choices)
                # Whoever says nothing gets the counts in the last chunk, as transformers serve sends them.
                usage = {"usage": self._usage()} if last and self._asked.usage is None else {}
                yield self._event(news.index, {"delta": {}} if self._asked.is_chat else {"text": ""}, **usage)
        else:
            if self._asked.usage:
                yield _data(self._head | {"object": self._chunk, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    async def _news(self) -> AsyncIterator[Piece | End | Failure]:
        """Yields what comes, once it is noted in the choices, until all have ended."""
        while any(choice.end is None for choice in self._choices):
            news = await self._queue.get()
            if isinstance(news, Piece):
                choice = self._choices[news.index]
                choice.tokens += news.tokens
                for item in news.items:
                    if isinstance(item, ToolCall):
                        function = {"name": item.name, "arguments": item.arguments}
                        name = f"{self._id}-{news.index}_tool_call_{len(choice.calls)}"
                        choice.calls.append({"id": name, "type": "function", "function": function})
                    else:
                        (choice.reasoning if isinstance(item, ReasoningText) else choice.text).append(item)
            elif isinstance(news, End):
                self._choices[news.index].end = news
            yield news

    def _whole(self, index: int, choice: _Choice) -> dict[str, object]:
        text = "".join(choice.text)
        common: dict[str, object] = {
            "index": index,
            "logprobs": self._logprobs(index, choice.tokens),
            "finish_reason": choice.reason,
        }
        if not self._asked.is_chat:
            return common | {"text": (self._prompt(index).text or "") + text}
        message: dict[str, object] = {"role": "assistant", "content": text}
        if choice.reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        if choice.calls:
            message["tool_calls"] = choice.calls
        return common | {"message": message}

    def _changes(self, piece: Piece) -> list[dict[str, object]]:
        """Returns what a piece adds to its choice: one part of a chunk for each of its texts and calls."""
        logprobs = self._logprobs(piece.index, piece.tokens)
        if not self._asked.is_chat:
            return [{"text": "".join(piece.items), "logprobs": logprobs}]
        deltas: list[dict[str, object]] = []
        calls = self._choices[piece.index].calls
        at = len(calls) - sum(isinstance(item, ToolCall) for item in piece.items)
        for item in piece.items:
            if isinstance(item, ToolCall):
                deltas.append({"tool_calls": [{"index": at, **calls[at]}]})
                at += 1
            else:
                deltas.append({"reasoning_content" if isinstance(item, ReasoningText) else "content": str(item)})
        changes: list[dict[str, object]] = [{"delta": delta} for delta in deltas or [{}]]
        changes[0]["logprobs"] = logprobs
        return changes

    def _event(self, index: int, change: dict[str, object], **beside: object) -> str:
        choice = {"index": index, "logprobs": None, "finish_reason": self._choices[index].reason} | change
        return _data(self._head | {"object": self._chunk, "choices": [choice]} | beside)

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self._asked.is_chat else "text_completion"

    def _prompt(self, index: int) -> Prompt:
        return self._prompts[index // self._asked.n]

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(prompt.ids) for prompt in self._prompts)
        completion = sum(choice.end.tokens for choice in self._choices if choice.end is not None)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _logprobs(self, index: int, tokens: list[Token]) -> dict[str, object] | None:
        if self._asked.logprobs is None or not tokens:
            return None
        if self._asked.is_chat:
            return {"content": [self._chat_token(token) for token in tokens]}
        before = len(self._prompt(index).text or "")
        return {
            "tokens": [self._spell(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [before + token.offset for token in tokens],
        }

    def _top(self, token: Token) -> dict[str, float]:
        """Returns log-probabilities by text, the likeliest first; the token that was taken is always among them."""
        top: dict[str, float] = {}
        for each, logprob in [*token.likeliest, (token.id, token.logprob)]:
            # Two tokens may have one text: halves of characters.
            top.setdefault(self._spell(each), logprob)
        return top

    def _chat_token(self, token: Token) -> dict[str, object]:
        def said(each: int, logprob: float) -> dict[str, object]:
            text = self._spell(each)
            whole = "\N{REPLACEMENT CHARACTER}" not in text
            return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

        return said(token.id, token.logprob) | {"top_logprobs": [said(*each) for each in token.likeliest]}

    def _spell(self, token: int) -> str:
        text: str = self._batch.tokenizer.decode([token])
        return text


def _data(content: Mapping[str, object]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
