"""The continuous batch of ``transformers`` with what a server's requests need beyond it.

``CBGenerateManager`` gives every request the options of the first, knows no stop texts, and lets a prompt be longer
than the model's positions. Here each request has its own options, its text ends before a stop text, and one that
cannot be served is refused before it enters the batch.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import secrets
from dataclasses import dataclass
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.utils import CBGenerateManager, CBStreamer, CBWorkerDeadError, _StreamError
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from diffattn.errors import UnsupportedError
from diffattn.serve.answer_text import Text
from diffattn.serve.openai_request import Asked, RequestError
from diffattn.serve.sampling import Sampling, per_request

# What OpenAI's interface gives where a completion does not say how long it may become.
COMPLETION_TOKENS = 16
# Queries of one step on a CPU: a longer prompt is read in several, between which the other requests go on.
_CPU_STEP = 512
_CPU_PAGE = 32
# Keys and values for as many tokens, if a quarter of the free memory holds them.
_CPU_CACHE_TOKENS = 65_536
_START_SECONDS = 300
_STOP_SECONDS = 10
# Longer than the engine needs for the step that it is in when a request is cancelled.
_LATE_SECONDS = 60


@dataclass
class Running:
    """The options of a request as the handlers of ``transformers`` carry them from the body to the engine.

    They read ``max_new_tokens`` from it, to tell an answer that was cut off.
    """

    asked: Asked
    max_new_tokens: int | None


class _Stream(CBStreamer):
    """One answer on its way from the engine to the queue that a client is served from."""

    def __init__(self, batch: Batch, request_id: str, running: Running, parser: Any) -> None:
        self.queue: asyncio.Queue = asyncio.Queue()
        tokenizer = batch.tokenizer
        super().__init__(batch.engine, request_id, tokenizer._tokenizer, asyncio.get_running_loop(), self.queue, parser)
        self.tokens: list[int] = []
        self.ended = False
        self._batch = batch
        self._running = running
        # A parser of tool calls reads the special tokens too.
        skip = parser is None
        self._text = Text(lambda ids: tokenizer.decode(ids, skip_special_tokens=skip), running.asked.stop)

    def put(self, output: GenerationOutput) -> None:
        """Take what the engine has generated so far; called on the event loop, for each token."""
        if self.ended:
            return
        done = output.is_finished()
        fresh = output.generated_tokens[len(self.tokens) :]
        for at, token in enumerate(fresh):
            self.tokens.append(token)
            self.total_tokens += 1
            self._send(self._text.feed(token, last=done and at == len(fresh) - 1))
            if self._text.stopped:
                break
        if output.error is not None:
            # The handlers write it into JSON as it is.
            self._put(_StreamError(json.dumps(output.error)[1:-1]))
            self._end()
        elif self._text.stopped or done:
            if self._text.stopped or self.tokens[-1] in self._batch.ends:
                # So that the handlers say "stop", also where this was the last token that was allowed.
                self._running.max_new_tokens = None
            self.end()
            self._end(cancel=not done)

    def cancel(self) -> None:
        """The client has left: the place in the batch is free from the next step on."""
        if not self.ended:
            self._end(cancel=True)

    def _send(self, text: str) -> None:
        if not text:
            return
        if self._parser is None:
            self._put(text)
            return
        from transformers.cli.serving.utils import response_events_to_chunks

        for item in response_events_to_chunks(self._parser.feed(text)):
            self._put(item)

    def _put(self, item: Any) -> None:
        self.queue.put_nowait(item)

    def _end(self, *, cancel: bool = False) -> None:
        self.ended = True
        self._batch.forget(self._request_id, cancel=cancel)


class Batch(CBGenerateManager):
    """The engine of one model, started and tried, and the requests that are in it.

    Args:
        model: one that makes one attention call per layer.
        tokenizer: the model's.
        context: tokens that prompt and answer may have together.

    Raises:
        UnsupportedError: an engine that does not start here, with what it says.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.context = context
        self.ends = _end_tokens(model, tokenizer)
        self.live: dict[str, _Stream] = {}
        self._vocabulary = model.get_input_embeddings().num_embeddings
        self._defaults = model.generation_config
        self.engine = self._cb = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1), _engine_config(model, context)
        )
        self.engine.logit_processor = per_request()
        self.engine.start()
        self.engine.add_request([0], request_id="start", max_new_tokens=1)
        first = None
        for _ in range(_START_SECONDS):
            first = self.engine.get_result(timeout=1)
            if first is not None or not self.engine.is_running():
                break
        fatal = self.engine.background_thread_status.fatal_error or (first.error if first is not None else None)
        if fatal is not None or first is None or first.status != RequestStatus.FINISHED:
            self.stop()
            reason = " ".join(str(fatal).split()) if fatal is not None else "it generates nothing"
            raise UnsupportedError(f"continuous batching of transformers does not start here: {reason}")

    def init_cb(self, model: Any, gen_config: Any) -> None:
        """Nothing to do: the engine runs already."""

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[asyncio.Queue, CBStreamer]:
        stream = self._start(inputs["input_ids"], gen_config, request_id, response_parser)
        return stream.queue, stream

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        prompt = inputs["input_ids"]
        stream = self._start(prompt, gen_config, request_id, None)
        pieces: list[str] = []
        try:
            while (item := await stream.queue.get()) is not None:
                if isinstance(item, _StreamError):
                    raise RequestError(f"the engine failed: {item.msg}", status=500)
                pieces.append(item)
        finally:
            stream.cancel()
        return "".join(pieces), len(prompt), stream.tokens

    def stop(self) -> None:
        """End the engine and every request in it; takes a step of the model at most, and no more a second time."""
        if self.engine.batch_processor is not None:
            self.engine.stop(block=True, timeout=_STOP_SECONDS, hard_stop=True)

    def forget(self, request_id: str, *, cancel: bool) -> None:
        self.live.pop(request_id, None)
        if cancel:
            self.engine.cancel_request(request_id)
            # The engine keeps the way of a cancelled request's output, on which one more token may come.
            handlers = self.engine.output_router.result_handlers
            asyncio.get_running_loop().call_later(_LATE_SECONDS, handlers.pop, request_id, None)

    def _start(self, prompt: list[int], running: Running, request_id: str, parser: Any) -> _Stream:
        self._check_alive(request_id)
        running.max_new_tokens = self._room(prompt, running.asked)
        sampling = self._sampling(running.asked)
        stream = _Stream(self, request_id, running, parser)
        # Before the request, whose first token may come at once.
        self.engine.register_result_handler(request_id, stream.put)
        self.live[request_id] = stream
        accepted = self.engine.add_request(
            prompt, request_id=request_id, max_new_tokens=running.max_new_tokens, streaming=True,
            eos_token_id=self.ends, sampling=sampling,
        )  # fmt: skip
        if accepted is None:
            stream.cancel()
            raise CBWorkerDeadError("the engine is stopping")
        return stream

    def _room(self, prompt: list[int], asked: Asked) -> int:
        """How many tokens the answer may have."""
        if not prompt:
            raise RequestError("the prompt has no tokens; a text to go on from is wanted", param="prompt")
        if max(prompt) >= self._vocabulary:
            raise RequestError(f"the prompt has token {max(prompt)}; the model knows {self._vocabulary}", status=500)
        room = self.context - len(prompt)
        wanted = asked.max_tokens
        if room < 1 or (wanted is not None and wanted > room):
            more = f" and {wanted:,} more are asked for" if wanted is not None else ""
            raise RequestError(
                f"the context is {self.context:,} tokens; the prompt has {len(prompt):,}{more}: shorten the prompt "
                "or ask for fewer tokens",
                param="messages" if "messages" in asked.content else "prompt",
                code="context_length_exceeded",
            )
        if wanted is not None:
            return wanted
        return room if "messages" in asked.content else min(room, COMPLETION_TOKENS)

    def _sampling(self, asked: Asked) -> Sampling:
        def first(*values: Any) -> Any:
            return next(value for value in values if value is not None)

        if asked.logit_bias and max(asked.logit_bias) >= self._vocabulary:
            raise RequestError(
                f"logit_bias names token {max(asked.logit_bias)}; the model knows {self._vocabulary}",
                param="logit_bias",
            )
        return Sampling(
            temperature=first(asked.temperature, self._defaults.temperature, 1.0),
            top_p=first(asked.top_p, self._defaults.top_p, 1.0),
            top_k=min(first(asked.top_k, self._defaults.top_k, 0), self._vocabulary),
            seed=first(asked.seed, secrets.randbits(63)),
            frequency_penalty=asked.frequency_penalty,
            presence_penalty=asked.presence_penalty,
            logit_bias=asked.logit_bias,
        )


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the model's, and the tokenizer's, which ends a turn where the model was told to."""
    given = (model.generation_config.eos_token_id, tokenizer.eos_token_id)
    ends = {token for each in given if each is not None for token in ([each] if isinstance(each, int) else each)}
    return sorted(ends)


def _engine_config(model: PreTrainedModel, context: int) -> ContinuousBatchingConfig:
    # RequestSampling needs to know the requests of each step, which neither a graph nor a step ahead can.
    fixed: dict[str, Any] = {"use_cuda_graph": False, "use_async_batching": False}
    if model.device.type != "cpu":
        return ContinuousBatchingConfig(**fixed)
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    free = _free_memory()
    tokens = max(context, min(_CPU_CACHE_TOKENS, free // 4 // token)) + _CPU_PAGE
    if tokens * token > free * 0.8:
        raise UnsupportedError(
            f"one text of {context:,} tokens needs {tokens * token / 1e9:.1f} GB for its keys and values and "
            f"{free / 1e9:.1f} GB are free; wanted more memory or a shorter context: --max-context"
        )
    return ContinuousBatchingConfig(
        page_size=_CPU_PAGE, num_blocks=math.ceil(tokens / _CPU_PAGE), max_batch_tokens=_CPU_STEP, **fixed
    )


def _free_memory() -> int:
    """Bytes that a process can have without another being moved to disk: Linux says it, elsewhere half of all."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
