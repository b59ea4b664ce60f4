"""vLLM's own OpenAI server over a folder of ours: this process becomes it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from diffattn.checkpoint_files import read_config, read_tensors
from diffattn.config_fields import dtype_name
from diffattn.errors import UnsupportedError
from diffattn.files import parse_json
from diffattn.model.loading import check_weights, load_tokenizer
from diffattn.model.options import GREEDY_BELOW
from diffattn.serve import vllm_private
from diffattn.serve.hosts import CheckHosts, Hosts, check_key
from diffattn.serve.openai_request import Asked
from diffattn.serve.prompts import Prompts
from diffattn.serve.request_error import RequestError

PLUGIN = "diffattn"
# The environment variable with what the middleware needs: vLLM's process makes it by itself, from its name alone.
GUARD = "DIFFATTN_SERVE_GUARD"
_ASKED = {"/v1/completions": False, "/v1/chat/completions": True}


class Guarded(TypedDict):
    """The facts that :class:`Guard` is made of, as JSON in the environment."""

    hosts: list[str]
    loopback_only: bool
    folder: str
    names: list[str]
    context: int


class Guard(CheckHosts):
    """The checks in front of vLLM's server, so that it refuses what our own engine refuses, in the same words.

    vLLM takes any Host and pages of any origin, drops fields that it does not know, and has words of its own for what
    it cannot do. Here a request is read as the other engine reads it, and reaches vLLM once nothing is wrong with it.
    """

    def __init__(self, app: Any) -> None:
        own: Guarded = json.loads(os.environ[GUARD])
        super().__init__(_CheckedRequests(app, own), Hosts(frozenset(own["hosts"]), own["loopback_only"]))


class _CheckedRequests:
    """An ASGI application that reads requests for an answer, and hands the right ones to ``app`` as they came."""

    def __init__(self, app: Any, own: Guarded) -> None:
        self._app = app
        self._names = tuple(own["names"])
        self._key = os.environ.get("VLLM_API_KEY")
        tokenizer = load_tokenizer(own["folder"])
        rows = read_config(own["folder"])["vocab_size"]
        self._prompts = Prompts(tokenizer, self._names[0], own["context"], rows, tools=False)
        self._thread = ThreadPoolExecutor(1, "requests")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import JSONResponse

        chat = _ASKED.get(scope.get("path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or chat is None:
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        try:
            check_key(headers.get(b"authorization", ""), self._key)
            raw = await self._prompts.body(headers.get(b"content-type", ""), _parts(receive))
            read = partial(self._prompts.read, raw, chat=chat, names=self._names)
            asked, _ = await asyncio.get_running_loop().run_in_executor(self._thread, read)
            raw = _for_vllm(raw, asked)
        except RequestError as error:
            await JSONResponse(error.body, status_code=error.status, headers=error.headers)(scope, receive, send)
            return
        sent = False

        async def again() -> Any:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": raw, "more_body": False}

        await self._app(scope, again, send)


def _for_vllm(raw: bytes, asked: Asked) -> bytes:
    """Returns the body of a request as vLLM takes it: several likeliest answers are draws from the likeliest token."""
    if asked.n == 1 or asked.temperature is None or asked.temperature >= GREEDY_BELOW:
        return raw
    return json.dumps(parse_json(raw.decode("utf-8-sig")) | {"temperature": 1.0, "top_k": 1}).encode()


async def _parts(receive: Any) -> AsyncIterator[bytes]:
    """Yields the body of a request as it comes."""
    more = True
    while more:
        message = await receive()
        # A client that leaves sends no more; what is there is no request then.
        more = message["type"] == "http.request" and message.get("more_body", False)
        yield message.get("body", b"")


def serve(
    folder: Path,
    names: tuple[str, ...],
    listener: socket.socket,
    *,
    key: str | None,
    hosts: Hosts,
    dtype: str,
    device: str,
    context: int,
    on_start: Callable[[str], None],
) -> None:
    """Replaces this process by vLLM's server, which signals then reach directly; see ``diffattn.serve.engines.serve``.

    ``listener`` is closed: vLLM opens its address itself. ``on_start`` is given what will run, for a person.

    Raises:
        CheckpointError, ConfigError: weights or a config.json that cannot be.
        UnsupportedError: another device than the one that the installed vLLM was built for.
    """
    # vLLM would say it in many lines, or not at all.
    check_weights(folder)
    dtype = saved_dtype(folder) if dtype == "auto" else dtype
    if device != "auto":
        check_device(device)
    host, port = listener.getsockname()[:2]
    listener.close()
    on_start(dtype)
    guarded = Guarded(
        hosts=sorted(hosts.names), loopback_only=hosts.loopback_only, folder=str(folder.resolve()), names=list(names),
        context=context,
    )  # fmt: skip
    os.execve(sys.executable, command(folder, names, host, port, dtype, context), environment(key, guarded))


def command(folder: Path, names: tuple[str, ...], host: str, port: int, dtype: str, context: int) -> list[str]:
    """Returns the command that starts vLLM's server, without the key: others on a machine see a process' arguments."""
    return [
        sys.executable, "-m", vllm_private.SERVER,
        "--model", str(folder),
        "--served-model-name", *names,
        "--host", host,
        "--port", str(port),
        "--dtype", dtype,
        "--max-model-len", str(context),
        "--middleware", f"{Guard.__module__}.{Guard.__name__}",
    ]  # fmt: skip


def environment(key: str | None, guarded: Guarded) -> dict[str, str]:
    """Returns the environment of vLLM's server.

    It holds the key, what the middleware needs, and our plug-in where others are named; by default nothing is sent
    anywhere.
    """
    variables = dict(os.environ)
    variables.pop("VLLM_API_KEY", None)
    if key is not None:
        variables["VLLM_API_KEY"] = key
    variables[GUARD] = json.dumps(guarded)
    chosen = variables.get("VLLM_PLUGINS")
    if chosen is not None and PLUGIN not in chosen.split(","):
        variables["VLLM_PLUGINS"] = ",".join(filter(None, (*chosen.split(","), PLUGIN)))
    variables.setdefault("VLLM_NO_USAGE_STATS", "1")
    variables.setdefault("HF_HUB_OFFLINE", "1")
    return variables


def saved_dtype(folder: Path) -> str:
    """Returns the dtype of a checkpoint: vLLM's own ``auto`` would round float32 weights to half of it."""
    config = read_config(folder)
    named = config.get("dtype") or config.get("torch_dtype")
    if isinstance(named, str):
        return dtype_name(named)
    kinds = {entry["dtype"] for entry in read_tensors(folder).values()}
    return "float32" if "F32" in kinds else "bfloat16" if "BF16" in kinds else "float16"


def check_device(device: str) -> None:
    """Raises an ``UnsupportedError`` unless the installed vLLM runs on ``device``."""
    built = vllm_private.built_for()
    if built != device:
        raise UnsupportedError(
            f"device is {device!r}",
            f"{built!r}, which the installed vLLM runs on" if built else "a device that the installed vLLM finds",
            "leave out --device, or pass --engine transformers",
        )
