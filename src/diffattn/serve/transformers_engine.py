"""OpenAI's HTTP interface of one model of ours, over the continuous batch of ``transformers``.

The event loop only waits and passes on: bodies are read up to a bound, and what takes long (JSON, templates, tokens of
a prompt) runs in two threads, one of which has the small requests for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from diffattn.config_fields import dtype_name
from diffattn.errors import CheckpointError
from diffattn.model.loading import Device, Dtype, load
from diffattn.serve.answers import Answers
from diffattn.serve.batching import Batch
from diffattn.serve.hosts import CheckHosts, Hosts, check_key
from diffattn.serve.openai_request import Asked
from diffattn.serve.prompts import Prompt, Prompts
from diffattn.serve.request_error import RequestError, stopping
from diffattn.serve.transformers_private import build_response_parser

# A body of at most this many bytes is read in the thread for small requests, so that it never waits for a long prompt.
_SMALL_BODY = 2**16
# Open answers end at once with an error; this is for connections that do not take it.
_SHUTDOWN_SECONDS = 1
# A thread of Python's lets another that waits go on after so many seconds; 0.005 by default.
_TURN_SECONDS = 0.001


class App:
    """The HTTP interface of one model, ``app`` of which is the ASGI application.

    Args:
        names: the names under which clients may ask for the model; answers have the first.
        model, batch: the model and the engine that runs it.
        key: the key that a client has to send, or None.
        hosts: the names and addresses by which clients may call the server.
        on_ready: called once requests are taken.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        model: PreTrainedModel,
        batch: Batch,
        key: str | None,
        hosts: Hosts,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.names = names
        self.batch = batch
        self.key = key
        self.created = int(time.time())
        self._model = model
        self._prompts = Prompts(batch.tokenizer, names[0], batch.context, batch.vocabulary)
        self._small, self._large = ThreadPoolExecutor(1, "small requests"), ThreadPoolExecutor(1, "large requests")
        # The work that is read or answered whole, and is ended when the server is told to stop.
        self._working: set[asyncio.Future[Any]] = set()

        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            on_ready()
            yield
            batch.stop()
            for threads in (self._small, self._large):
                threads.shutdown(wait=False, cancel_futures=True)

        app = FastAPI(openapi_url=None, lifespan=lifespan)
        routes = APIRouter(prefix="/v1", dependencies=[Depends(self._check_key)])
        routes.add_api_route("/chat/completions", self.chat_completions, methods=["POST"], response_model=None)
        routes.add_api_route("/completions", self.completions, methods=["POST"], response_model=None)
        routes.add_api_route("/models", self.models, methods=["GET"], response_model=None)
        # A folder's path is a name too.
        routes.add_api_route("/models/{name:path}", self.model, methods=["GET"], response_model=None)
        app.include_router(routes)
        app.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        for error in (RequestError, HTTPException, ClientDisconnect, Exception):
            app.add_exception_handler(error, self._refuse)
        self.app = CheckHosts(app, hosts)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, name: str) -> Response:
        if name not in self.names:
            raise self._prompts.unknown_model(name)
        return JSONResponse(self._described())

    async def health(self) -> Response:
        """Answers with 200 while requests are taken, and says how many are being answered."""
        alive = self.batch.is_alive()
        body = {"status": "ok" if alive else "unhealthy", "requests": len(self.batch.live)}
        return JSONResponse(body, status_code=200 if alive else 503)

    def stop(self) -> None:
        """Ends everything that is being answered with an error that says why; called on the event loop."""
        self.batch.request_stop()
        for work in self._working:
            work.cancel()

    def _described(self) -> dict[str, object]:
        return {
            "id": self.names[0], "object": "model", "created": self.created, "owned_by": "diffattn",
            "max_model_len": self.batch.context,
        }  # fmt: skip

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        raw = await self._while_here(request, self._body(request))
        threads = self._small if len(raw) <= _SMALL_BODY else self._large
        asked, prompts, parsers = await self._while_here(
            request, asyncio.get_running_loop().run_in_executor(threads, self._read, raw, chat), leaves=True
        )
        answers = Answers(self.batch, self.names[0], asked, prompts, parsers)
        if asked.stream:
            return _Events(answers)
        # As with every other error, what went wrong is in the body; the client may have left by then.
        return JSONResponse(await self._while_here(request, answers.whole(), leaves=True))

    async def _while_here(self, request: Request, work: Any, *, leaves: bool = False) -> Any:
        """Returns the result of ``work``, which is cancelled once the client leaves or the server is to stop.

        Args:
            leaves: whether to watch for the client, which can only be done once its whole body has come.

        Raises:
            ClientDisconnect: the client has left.
            RequestError: status 503: the server stops.
        """
        work = asyncio.ensure_future(work)
        self._working.add(work)
        if self.batch.stopping:
            work.cancel()
        gone = asyncio.ensure_future(_left(request)) if leaves else None
        try:
            await asyncio.wait({work, gone} if gone else {work}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return await work
            raise ClientDisconnect
        except asyncio.CancelledError:
            if work.cancelled() and self.batch.stopping:
                raise stopping() from None
            raise
        finally:
            self._working.discard(work)
            for task in (work, gone):
                if task is not None and not task.done():
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task

    def _read(self, raw: bytes, chat: bool) -> tuple[Asked, list[Prompt], list[Any]]:
        """Reads a request in a thread of its own.

        Returns:
            The request, its prompts, and for each answer what reads its reasoning and tool calls.
        """
        asked, prompts = self._prompts.read(raw, chat=chat, names=self.names)
        if not chat:
            return asked, prompts, [None] * (asked.n * len(prompts))
        (prompt,) = prompts
        tools = asked.content.get("tools")
        parsers = [build_response_parser(self.batch.tokenizer, self._model, prompt.ids, tools) for _ in range(asked.n)]
        return asked, prompts, parsers

    async def _body(self, request: Request) -> bytes:
        return await self._prompts.body(request.headers.get("content-type", ""), request.stream())

    async def _check_key(self, request: Request) -> None:
        check_key(request.headers.get("authorization", ""), self.key)

    async def _refuse(self, request: Request, error: Exception) -> Response:
        """Returns the answer to every mistake, theirs and ours, in the words of OpenAI's interface."""
        if isinstance(error, ClientDisconnect):
            # Nobody reads it.
            return Response(status_code=499)
        if isinstance(error, HTTPException):
            error = RequestError(
                f"{request.method} {request.url.path} ({error.detail})", "an address that this server has",
                "ask /v1/completions, /v1/chat/completions, /v1/models or /health", status=error.status_code,
            )  # fmt: skip
        elif not isinstance(error, RequestError):
            error = RequestError(
                f"{type(error).__name__} in the server", "an answer", "see the server's log, which has more", status=500
            )
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)


class _Events(StreamingResponse):
    """Answers as they come, whose places are free once they are sent or the client has left."""

    def __init__(self, answers: Answers) -> None:
        super().__init__(answers.events(), media_type="text/event-stream")
        self._answers = answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


async def _left(request: Request) -> None:
    """Waits until the client has left; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Server(uvicorn.Server):
    """A server that ends open answers when it is told to stop, in place of waiting for them."""

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.stop()
        await super().shutdown(sockets)


def serve(
    folder: Path,
    names: tuple[str, ...],
    listener: socket.socket,
    *,
    key: str | None,
    hosts: Hosts,
    dtype: Dtype,
    device: Device,
    context: int,
    on_ready: Callable[[str], None],
) -> None:
    """Loads the model and answers on ``listener`` until a signal ends it; see ``diffattn.serve.engines.serve``.

    ``on_ready`` is given what runs, for a person, once requests are answered.
    """
    transformers_logging.disable_progress_bar()
    model, tokenizer = load(folder, dtype, device, "sdpa")
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"the tokenizer in {str(folder)!r} has {len(tokenizer):,} tokens",
            f"one of at most {rows:,}, which is what the model knows",
            "save the model's own tokenizer there",
        )
    # The engine says a failure to each client.
    transformers_logging.set_verbosity_error()
    batch = Batch(model, tokenizer, context)
    what = f"{model.device.type}, {dtype_name(model.dtype)}"
    app = App(names, model, batch, key, hosts, lambda: on_ready(what))
    # The engine's thread has to let the event loop go on for each thing that it reads or writes.
    sys.setswitchinterval(_TURN_SECONDS)
    # All that is loaded now stays; looking through it for garbage takes a quarter of a second.
    gc.collect()
    gc.freeze()
    config = uvicorn.Config(
        app.app, log_level="warning", access_log=False, timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        server_header=False, proxy_headers=False,
    )  # fmt: skip
    try:
        _Server(config, app).run(sockets=[listener])
    except KeyboardInterrupt:
        batch.stop()
        # Python would take its modules apart for a second or more, with nothing left to lose.
        os._exit(130)
    finally:
        batch.stop()
