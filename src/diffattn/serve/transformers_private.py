"""The names of ``transformers`` that the server uses although the library does not promise to keep them.

They are of two kinds: the engine that batches requests continuously, and what ``transformers serve`` makes of messages
and of the text of an answer. Both are wrapped here, so that a release that renames them is met in this one file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.cli.serving.utils import BaseHandler, Modality
from transformers.cli.serving.utils import ReasoningText as ReasoningText
from transformers.cli.serving.utils import ToolCall as ToolCall
from transformers.cli.serving.utils import build_response_parser as build_response_parser
from transformers.cli.serving.utils import response_events_to_chunks as response_events_to_chunks
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import GenerationOutput as GenerationOutput
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.logits_process import LogitsProcessorList

from diffattn.private_names import PrivateName
from diffattn.serve.sampling import Sampling, shape_logits


def template_messages(messages: list[Any]) -> list[Any]:
    """Returns the messages of a chat in the form that a chat template of a text model reads."""
    converted: list[Any] = BaseHandler.get_processor_inputs_from_messages(messages, Modality.LLM)
    return converted


class Engine:
    """The continuous batch of one model, which runs in a thread of its own; each request brings its own sampling.

    Args:
        model: a model that makes one attention call per layer.
        batching: the sizes of the batch and of its cache.
    """

    def __init__(self, model: PreTrainedModel, batching: ContinuousBatchingConfig) -> None:
        options = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1)
        self.manager: Any = model.init_continuous_batching(options, batching)
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_RequestSampling()]))
        # One line of the batch's input, which stays empty.
        processors.tensors_required = 1
        self.manager.logit_processor = processors

    def try_out(self, seconds: int) -> str | None:
        """Starts the engine and has it generate one token.

        Returns:
            None, or the reason why nothing was generated within so many seconds.
        """
        self.manager.start()
        self.manager.add_request([0], request_id="start", max_new_tokens=1)
        first = None
        for _ in range(seconds):
            first = self.manager.get_result(timeout=1)
            if first is not None or not self.is_running():
                break
        failure = self.failure() or (first.error if first is not None else None)
        if failure is not None:
            return " ".join(str(failure).split())
        done = first is not None and first.status == RequestStatus.FINISHED
        return None if done else "it generates nothing"

    def failure(self) -> Any:
        """Returns the error that ended the engine, or None."""
        return self.manager.background_thread_status.fatal_error

    def is_running(self) -> bool:
        """Returns whether the engine's thread is alive."""
        running: bool = self.manager.is_running()
        return running

    def add(
        self,
        name: str,
        prompt: list[int],
        on_output: Callable[[GenerationOutput], None],
        *,
        max_new_tokens: int,
        ends: list[int],
        sampling: Sampling,
    ) -> bool:
        """Adds a request whose outputs are given to ``on_output`` on this event loop; False from a stopping engine."""
        # Before the request, whose first token may come at once.
        self.manager.register_result_handler(name, on_output)
        accepted = self.manager.add_request(
            prompt, request_id=name, max_new_tokens=max_new_tokens, streaming=True, eos_token_id=ends,
            sampling=sampling,
        )  # fmt: skip
        return accepted is not None

    def cancel(self, name: str, seconds: float) -> None:
        """Cancels a request; one more token of it, which may still come, is taken for so many seconds."""
        self.manager.cancel_request(name)
        # The engine keeps the way of a cancelled request's output.
        handlers = self.manager.output_router.result_handlers
        asyncio.get_running_loop().call_later(seconds, handlers.pop, name, None)

    def request_stop(self) -> None:
        """Ends the engine's thread after the step that it is in."""
        status = self.manager.background_thread_status
        status.request_stop(status.HARD_STOP, 0)

    def forget_outputs(self) -> None:
        """Drops every output that the engine still has: nobody waits for it, and the event loop may be gone by then."""
        self.manager.output_router.result_handlers.clear()

    def join(self, seconds: float) -> None:
        """Waits until the engine's thread has ended, for so many seconds at most."""
        self.manager.join(0.0, seconds)


class _RequestSampling(ContinuousBatchingLogitsProcessor):
    """Shapes each row of a batch's logits as its request asks, which ``add_request(..., sampling=...)`` gave."""

    supported_kwargs: dict[str, type] = MappingProxyType({"sampling": Sampling})  # type: ignore[assignment]
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._requests: list[Any] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        # A tensor of numbers cannot hold a request; the engine that runs without graphs calls this, then __call__.
        self._requests = [request.state for request in requests_with_new_token]
        return torch.zeros(0, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        for row, state in enumerate(self._requests):
            sampling = state.logit_processor_kwargs.get("sampling")
            if sampling is None or (sampling.plain and sampling.likelihoods is None):
                continue
            # What an evicted request had answered is part of its new prompt; the output keeps the two apart.
            answer = state.to_generation_output().generated_tokens
            if sampling.likelihoods is not None:
                sampling.likelihoods.note(len(answer), scores[row])
            scores[row] = shape_logits(scores[row], sampling, answer)
        return scores


_TESTED = ">=5.20,<5.25"
_UTILS = "transformers.cli.serving.utils"
_BATCHING = "transformers.generation.continuous_batching"
_ENGINE = f"{_BATCHING}.continuous_api"
_CHAT = (
    "chats: the server does not start",
    "the library documents how messages and tool calls are read, outside of its own server",
)
_BATCH = (
    "the server does not start, or an answer ends in an error",
    "the engine is documented with a way to follow, cancel and end requests",
)
_SAMPLING = (
    "temperature, seeds and penalties of a request are ignored without an error",
    "a request of the engine can bring logits processors of its own",
)
NAMES = (
    *(
        PrivateName(f"{_UTILS}:{name}", _TESTED, *_CHAT)
        for name in (
            "BaseHandler.get_processor_inputs_from_messages", "Modality.LLM", "ReasoningText", "ToolCall.arguments",
            "ToolCall.name", "build_response_parser", "response_events_to_chunks",
        )
    ),
    *(
        PrivateName(f"{_ENGINE}:ContinuousBatchingManager.{name}", _TESTED, *_BATCH)
        for name in (
            "add_request", "background_thread_status", "batch_processor", "cancel_request", "get_result", "is_running",
            "join", "output_router", "register_result_handler", "start",
        )
    ),
    *(
        PrivateName(f"{_ENGINE}:BackgroundThreadStatus.{name}", _TESTED, *_BATCH)
        for name in ("HARD_STOP", "fatal_error", "request_stop")
    ),
    PrivateName(f"{_ENGINE}:OutputRouter.result_handlers", _TESTED, *_BATCH),
    PrivateName(f"{_BATCHING}.requests:GenerationOutput.is_finished", _TESTED, *_BATCH),
    PrivateName(f"{_BATCHING}.requests:RequestStatus.FINISHED", _TESTED, *_BATCH),
    PrivateName(f"{_ENGINE}:ContinuousBatchingManager.logit_processor", _TESTED, *_SAMPLING),
    *(
        PrivateName(f"{_BATCHING}.cb_logits_processors:ContinuousBatchingLogitsProcessor.{name}", _TESTED, *_SAMPLING)
        for name in ("fill_defaults", "ignored_kwargs", "prepare_tensor_args", "supported_kwargs")
    ),
    PrivateName(
        f"{_BATCHING}.cb_logits_processors:ContinuousBatchingLogitsProcessorList.tensors_required", _TESTED, *_SAMPLING
    ),
    *(
        PrivateName(f"{_BATCHING}.requests:RequestState.{name}", _TESTED, *_SAMPLING)
        for name in ("logit_processor_kwargs", "to_generation_output")
    ),
)  # fmt: skip
