"""The continuous batch of ``transformers`` with what a server's requests need beyond it.

On its own it gives every request the options of the first, knows no stop texts, and hands out tokens and no text. Here
each answer has its own options, its text ends before a stop text, and its tokens' probabilities come with it.
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets
from dataclasses import dataclass
from typing import Any

from transformers import ContinuousBatchingConfig, PreTrainedModel, PreTrainedTokenizerBase

from diffattn.errors import CheckpointError, UnsupportedError
from diffattn.model.options import DECODING
from diffattn.serve.answer_text import Text
from diffattn.serve.openai_request import Asked
from diffattn.serve.request_error import RequestError, stopping
from diffattn.serve.sampling import Likelihoods, Sampling
from diffattn.serve.transformers_private import Engine, GenerationOutput, response_events_to_chunks

# OpenAI's interface gives so many tokens where a completion does not say how long it may become.
COMPLETION_TOKENS = 16
# Queries of one step on a CPU: a longer prompt is read in several, between which the other requests go on.
_CPU_STEP = 512
_CPU_PAGE = 32
# Keys and values for as many tokens, if a quarter of the free memory holds them.
_CPU_CACHE_TOKENS = 65_536
_START_SECONDS = 300
# The engine may end the step that it is in; a process that ends need not wait for a longer one.
_STOP_SECONDS = 1
# This is longer than the engine needs for the step that it is in when a request is cancelled.
_LATE_SECONDS = 60


@dataclass(frozen=True)
class Token:
    """One token of an answer."""

    id: int
    """The token's id."""
    offset: int
    """Characters of the answer before its text."""
    logprob: float
    """The natural logarithm of its probability."""
    likeliest: list[tuple[int, float]]
    """The likeliest tokens in its place, each with its log-probability."""


@dataclass(frozen=True)
class Piece:
    """A part of one answer that has just come."""

    index: int
    """The answer's place in its request."""
    items: list[Any]
    """Texts (some of them ``ReasoningText``), and each ``ToolCall`` that is whole."""
    tokens: list[Token]
    """The tokens that these are made of."""


@dataclass(frozen=True)
class End:
    """The news that one answer is whole."""

    index: int
    """The answer's place in its request."""
    reason: str
    """``"stop"`` or ``"length"``."""
    tokens: int
    """Tokens that were generated."""


@dataclass(frozen=True)
class Failure:
    """The news that the engine could not go on with an answer."""

    error: RequestError
    """The error that the client is told."""


class Stream:
    """One answer on its way from the engine to the queue that a client is served from.

    Args:
        batch: the engine.
        name: the answer's name in the engine.
        index: the answer's place in its request.
        queue: takes ``Piece``, then ``End``; or ``Failure``.
        asked: the request.
        likelihoods: what the engine notes for each token, or None.
        parser: reads reasoning and tool calls; None for a model whose tokenizer describes none.
    """

    def __init__(
        self,
        batch: Batch,
        name: str,
        index: int,
        queue: asyncio.Queue[Piece | End | Failure],
        asked: Asked,
        likelihoods: Likelihoods | None,
        parser: Any,
    ) -> None:
        self.ended = False
        self._batch = batch
        self._name = name
        self._index = index
        self._queue = queue
        self._likelihoods = likelihoods
        self._parser = parser
        self._count = 0
        self._sent = 0
        # Tokens whose text has not been sent.
        self._waiting: list[Token] = []
        # A parser of tool calls reads the special tokens too.
        skip = parser is None
        self._text = Text(lambda ids: batch.tokenizer.decode(ids, skip_special_tokens=skip), asked.stop)
        if parser is not None:
            self._put(response_events_to_chunks(parser.initial_events))

    def put(self, output: GenerationOutput) -> None:
        """Takes what the engine has generated so far; called on the event loop, for each token."""
        if self.ended:
            return
        done = output.is_finished()
        fresh = output.generated_tokens[self._count :]
        for at, token in enumerate(fresh):
            if self._likelihoods is not None:
                self._waiting.append(Token(token, self._text.length, *self._likelihoods.take(self._count, token)))
            self._count += 1
            self._send(self._text.feed(token, last=done and at == len(fresh) - 1))
            if self._text.stopped:
                break
        if output.error is not None:
            failed = f"the engine failed ({output.error})"
            self._fail(RequestError(failed, "an answer", "see the server's log, and send it again", status=500))
        elif self._text.stopped or done:
            stopped = self._text.stopped or output.generated_tokens[self._count - 1] in self._batch.ends
            if self._text.stopped:
                # The front of a token that is cut in two was sent; tokens behind the cut are no part of the answer.
                self._waiting = [token for token in self._waiting if token.offset < self._sent]
            self._put(self._last_events(), flush=True)
            self._queue.put_nowait(End(self._index, "stop" if stopped else "length", self._count))
            self._end(cancel=not done)

    def cancel(self) -> None:
        """Frees the answer's place in the batch, from the next step on, since the client has left."""
        if not self.ended:
            self._end(cancel=True)

    def stop(self) -> None:
        """Tells the client at once that the server is to stop, whatever step the engine is in."""
        if not self.ended:
            self._fail(stopping())

    def _fail(self, error: RequestError) -> None:
        self._queue.put_nowait(Failure(error))
        self._end()

    def _send(self, text: str) -> None:
        if text:
            self._sent += len(text)
            self._put([text] if self._parser is None else response_events_to_chunks(self._parser.feed(text)))

    def _last_events(self) -> list[Any]:
        if self._parser is None:
            return []
        try:
            return response_events_to_chunks(self._parser.finalize()[1])
        # The answer ends within a tool call.
        except (ValueError, RuntimeError):
            return []

    def _put(self, items: list[Any], *, flush: bool = False) -> None:
        if items or (flush and self._waiting):
            self._queue.put_nowait(Piece(self._index, items, self._waiting))
            self._waiting = []

    def _end(self, *, cancel: bool = False) -> None:
        self.ended = True
        self._batch.forget(self._name, cancel=cancel)


class Batch:
    """The engine of one model, started and tried, and the answers that are in it.

    Args:
        model: one that makes one attention call per layer.
        tokenizer: the model's.
        context: tokens that prompt and answer may have together.

    Raises:
        UnsupportedError: an engine that does not start here, with what it says.
        CheckpointError: a temperature or the like in generation_config.json that cannot be one.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.ends = _end_tokens(model, tokenizer)
        self.live: dict[str, Stream] = {}
        self.stopping = self._waited = False
        self._defaults = _defaults(model)
        self.engine = Engine(model, _engine_config(model, context))
        if (reason := self.engine.try_out(_START_SECONDS)) is not None:
            self.stop()
            raise UnsupportedError(
                f"continuous batching of transformers does not start here ({reason})", "an engine that generates",
                "try diffattn generate, or --engine vllm",
            )  # fmt: skip

    def is_alive(self) -> bool:
        return self.engine.failure() is None

    def start(
        self,
        prompt: list[int],
        asked: Asked,
        name: str,
        queue: asyncio.Queue[Piece | End | Failure],
        *,
        index: int = 0,
        parser: Any = None,
    ) -> Stream:
        """Begins one answer: the ``index``-th of its request, of which ``n`` belong to each prompt.

        Raises:
            RequestError: status 503: an engine that has ended or is about to.
        """
        fatal = self.engine.failure()
        if fatal is not None:
            raise RequestError(
                f"the engine has ended ({fatal})", "an engine that runs", "start the server again", status=503
            )
        sampling = self._sampling(prompt, asked, index % asked.n)
        stream = Stream(self, name, index, queue, asked, sampling.likelihoods, parser)
        self.live[name] = stream
        length = self._length(prompt, asked)
        if not self.engine.add(name, prompt, stream.put, max_new_tokens=length, ends=self.ends, sampling=sampling):
            stream.cancel()
            raise stopping()
        return stream

    def request_stop(self) -> None:
        """Ends every answer with an error, and the engine after the step that it is in; called on the event loop."""
        self.stopping = True
        self.engine.request_stop()
        for stream in list(self.live.values()):
            stream.stop()
        self.engine.forget_outputs()

    def stop(self) -> None:
        """Ends the engine; it is waited for no more a second time."""
        if not self.stopping:
            self.request_stop()
        if self.engine.is_running() and not self._waited:
            self._waited = True
            self.engine.join(_STOP_SECONDS)

    def forget(self, name: str, *, cancel: bool) -> None:
        self.live.pop(name, None)
        if cancel:
            self.engine.cancel(name, _LATE_SECONDS)

    def _length(self, prompt: list[int], asked: Asked) -> int:
        room = self.context - len(prompt)
        if asked.max_tokens is not None:
            return asked.max_tokens
        return room if asked.is_chat else min(room, COMPLETION_TOKENS)

    def _sampling(self, prompt: list[int], asked: Asked, nth: int) -> Sampling:
        given = {name: getattr(asked, name) for name in self._defaults if getattr(asked, name) is not None}
        chosen = self._defaults | given
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        return Sampling(
            temperature=chosen["temperature"],
            top_p=chosen["top_p"],
            top_k=min(chosen["top_k"], self.vocabulary),
            min_p=asked.min_p,
            # The n answers to a prompt are n draws.
            seed=seed + nth,
            frequency_penalty=asked.frequency_penalty,
            presence_penalty=asked.presence_penalty,
            repetition_penalty=asked.repetition_penalty,
            logit_bias=asked.logit_bias,
            prompt=prompt if asked.repetition_penalty != 1 else (),
            likelihoods=None if asked.logprobs is None else Likelihoods(asked.logprobs),
        )


def _defaults(model: PreTrainedModel) -> dict[str, float]:
    """Returns what a request gets that does not say: the model's own defaults, else those of OpenAI's interface."""
    defaults: dict[str, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    for name in defaults:
        own = getattr(model.generation_config, name)
        try:
            defaults[name] = defaults[name] if own is None else DECODING[name].read(own)
        except ValueError as wanted:
            raise CheckpointError(
                f"{name} is {own!r} in generation_config.json", str(wanted), "correct it there, or leave it out"
            ) from None
    return defaults


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that end an answer: the model's, and the tokenizer's, which ends a turn of a chat."""
    given = (model.generation_config.eos_token_id, tokenizer.eos_token_id)
    ends = {token for each in given if each is not None for token in ([each] if isinstance(each, int) else each)}
    return sorted(ends)


def _engine_config(model: PreTrainedModel, context: int) -> ContinuousBatchingConfig:
    # The sampling of each request needs to know the requests of each step, which neither a graph nor a step ahead can.
    fixed = {"use_cuda_graph": False, "use_async_batching": False}
    if model.device.type != "cpu":
        return ContinuousBatchingConfig(**fixed)
    heads = model.config.num_key_value_heads * model.config.head_dim
    token = 2 * model.config.num_hidden_layers * heads * model.dtype.itemsize
    free = _free_memory()
    tokens = max(context, min(_CPU_CACHE_TOKENS, free // 4 // token)) + _CPU_PAGE
    if tokens * token > free * 0.8:
        raise UnsupportedError(
            f"one text of {context:,} tokens needs {tokens * token / 1e9:.1f} GB for its keys and values",
            f"at most the {free / 1e9:.1f} GB that are free",
            "pass a smaller --max-context",
        )
    return ContinuousBatchingConfig(
        page_size=_CPU_PAGE, num_blocks=math.ceil(tokens / _CPU_PAGE), max_batch_tokens=_CPU_STEP, **fixed
    )


def _free_memory() -> int:
    """Returns the bytes that are free for a process, as Linux says; elsewhere half of the memory."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
