"""``transformers serve`` for one model of ours: its handlers and its continuous batch, behind one thin layer.

The handlers of ``transformers.cli.serving`` turn chats into prompts and texts into OpenAI's answers and events. They
load only classes that ``transformers`` itself has, check no key, know no context length and answer a mistake in their
own ways; so the layer here gives them the model, and refuses what cannot be served before they see it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jinja2
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import CBWorkerDeadError, GenerationState
from transformers.utils import logging as transformers_logging

from diffattn.errors import CheckpointError
from diffattn.model.loading import Device, Dtype, load
from diffattn.serve import openai_request
from diffattn.serve.batching import Batch, Running
from diffattn.serve.openai_request import RequestError

# Of a request's body. A prompt of a million tokens has a few MB.
LONGEST_BODY = 32 * 2**20
# Open answers end at once with an error event; this is for connections that do not take it.
_SHUTDOWN_SECONDS = 3


class _State(GenerationState):
    """Every request goes into the one batch."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(continuous_batching=True)
        self._batch = batch

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        return True

    def get_manager(self, model_id: str, use_cb: bool = False) -> Batch:
        return self._batch


class _OneModel:
    """What both handlers do here in place of choosing, loading and configuring a model by themselves."""

    def __init__(self, name: str, model: PreTrainedModel, batch: Batch) -> None:
        super().__init__(ModelManager(device="cpu"), _State(batch))  # type: ignore[call-arg]
        self._served = (name, model, batch.tokenizer)

    def _validate_request(self, body: dict[str, Any]) -> None:
        """``openai_request.read`` has."""

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, PreTrainedModel, PreTrainedTokenizerBase]:
        return self._served

    def _build_generation_config(self, body: dict[str, Any], model_generation_config: Any, use_cb: bool) -> Running:
        return Running(body["asked"], None)


class _Chat(_OneModel, ChatCompletionHandler):
    pass


class _Completion(_OneModel, CompletionHandler):
    pass


class App:
    """The HTTP interface of one model, ``app`` of which is the ASGI application.

    Args:
        names: under which clients may ask for the model; answers have the first.
        model, batch: the model and the engine that runs it.
        key: that a client has to send, or None.
        on_ready: called once requests are taken.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        model: PreTrainedModel,
        batch: Batch,
        key: str | None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.names = names
        self.batch = batch
        self.key = key
        self.created = int(time.time())
        self._chat = _Chat(names[0], model, batch)
        self._completion = _Completion(names[0], model, batch)

        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            on_ready()
            yield
            batch.stop()

        self.app = FastAPI(openapi_url=None, lifespan=lifespan)
        routes = APIRouter(prefix="/v1", dependencies=[Depends(self._check_key)])
        routes.add_api_route("/chat/completions", self.chat_completions, methods=["POST"], response_model=None)
        routes.add_api_route("/completions", self.completions, methods=["POST"], response_model=None)
        routes.add_api_route("/models", self.models, methods=["GET"], response_model=None)
        self.app.include_router(routes)
        self.app.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        self.app.add_exception_handler(RequestError, self._refuse)
        self.app.add_exception_handler(HTTPException, self._refuse)
        self.app.add_exception_handler(CBWorkerDeadError, self._refuse)
        self.app.add_exception_handler(Exception, self._refuse)

    async def chat_completions(self, request: Request) -> Response:
        asked = openai_request.read(await _body(request), chat=True)
        self._check_model(asked.model)
        if not self.batch.tokenizer.chat_template:
            raise RequestError(
                f"the model {self.names[0]!r} has no chat template: ask /v1/completions, or add a chat_template to its "
                "tokenizer",
                param="messages",
            )
        try:
            return await self._answer(request, self._chat, asked)
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template refuses the messages: {error}", param="messages") from error

    async def completions(self, request: Request) -> Response:
        asked = openai_request.read(await _body(request), chat=False)
        self._check_model(asked.model)
        return await self._answer(request, self._completion, asked)

    async def models(self) -> Response:
        served = {"id": self.names[0], "object": "model", "created": self.created, "owned_by": "diffattn"}
        return JSONResponse({"object": "list", "data": [served | {"max_model_len": self.batch.context}]})

    async def health(self) -> Response:
        """200 while requests are taken, with how many are being answered."""
        alive = self.batch.is_alive()
        body = {"status": "ok" if alive else "unhealthy", "requests": len(self.batch.live)}
        return JSONResponse(body, status_code=200 if alive else 503)

    async def _answer(self, request: Request, handler: Any, asked: openai_request.Asked) -> Response:
        # Never a name that the client chose: two requests of one name would share their keys and values.
        name = f"{'chatcmpl' if handler is self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        body = {"asked": asked, "stream": asked.stream, **asked.content}
        work = asyncio.ensure_future(handler.handle_request(body, name))
        while not (await asyncio.wait({work}, timeout=0.5))[0]:
            # Where the answer is streamed, this is the response's own part.
            if await request.is_disconnected():
                work.cancel()
        if work.cancelled():
            return Response(status_code=499)
        response = work.result()
        if isinstance(response, StreamingResponse):
            response.body_iterator = _events(response.body_iterator)
        return response

    def _check_model(self, name: str) -> None:
        if name not in self.names:
            raise RequestError(
                f"The model {name[:200]!r} does not exist; this server has {self.names[0]!r}.",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip

    async def _check_key(self, request: Request) -> None:
        if self.key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.key.encode()):
            return
        what = "Incorrect API key provided." if given else "You didn't provide an API key: Authorization: Bearer KEY."
        raise RequestError(what, status=401, code="invalid_api_key")

    async def _refuse(self, request: Request, error: Exception) -> Response:
        """The answer to every mistake, theirs and ours, in the words of OpenAI's interface."""
        if isinstance(error, HTTPException):
            error = RequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
        elif isinstance(error, CBWorkerDeadError):
            error = RequestError(f"the engine has ended: {error}", status=503)
        elif not isinstance(error, RequestError):
            error = RequestError(f"{type(error).__name__} in the server; its log has more", status=500)
        headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
        return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _body(request: Request) -> bytes:
    # A page that a browser shows may send any other type to this machine without being asked whether it may.
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise RequestError(f"the content type is {kind[:80]!r}; application/json is wanted", status=415)
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > LONGEST_BODY:
            raise RequestError(f"the body is longer than {LONGEST_BODY:,} bytes", status=413)
        parts.append(part)
    return b"".join(parts)


async def _events(events: Any) -> AsyncIterator[str]:
    """The handlers' events, and the mark that OpenAI's clients wait for."""
    try:
        async for event in events:
            yield event
    finally:
        await events.aclose()
    yield "data: [DONE]\n\n"


class _Server(uvicorn.Server):
    """One that ends open answers when it is told to stop, in place of waiting for them."""

    batch: Batch

    def handle_exit(self, sig: int, frame: Any) -> None:
        status = self.batch.engine.background_thread_status
        status.request_stop(status.HARD_STOP, 0)
        super().handle_exit(sig, frame)


def serve(
    folder: Path,
    names: tuple[str, ...],
    listener: socket.socket,
    *,
    key: str | None,
    dtype: Dtype,
    device: Device,
    context: int,
    on_ready: Callable[[str], None],
) -> None:
    """Load the model and answer on ``listener`` until a signal ends it; see ``diffattn.serve.engines.serve``.

    ``on_ready`` is given what runs, for a person, once requests are answered.
    """
    transformers_logging.disable_progress_bar()
    model, tokenizer = load(folder, dtype, device, "sdpa")
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"the tokenizer in {str(folder)!r} has {len(tokenizer):,} tokens and the model {rows:,}; the model's own "
            "tokenizer is wanted there"
        )
    # The handlers log every request as a warning.
    transformers_logging.set_verbosity_error()
    batch = Batch(model, tokenizer, context)
    what = f"{model.device.type}, {str(model.dtype).removeprefix('torch.')}"
    app = App(names, model, batch, key, lambda: on_ready(what)).app
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=_SHUTDOWN_SECONDS, server_header=False
    )
    server = _Server(config)
    server.batch = batch
    try:
        server.run(sockets=[listener])
    finally:
        batch.stop()
