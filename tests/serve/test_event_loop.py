"""The application in this process: what one request does to the others."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.served import SENTENCES, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffattn.serve import prompts, transformers_engine
from diffattn.serve.batching import Batch
from diffattn.serve.hosts import Hosts
from diffattn.serve.prompts import Prompts
from diffattn.serve.transformers_engine import App

# Long enough for a body that is not a small one.
CONTEXT = 16_384


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    folder: Path = write_model(tmp_path_factory.mktemp("loop") / "tiny", "diff_v1", context=CONTEXT)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = Batch(model, tokenizer, CONTEXT)
    yield App(("m",), model, batch, None, Hosts.of("127.0.0.1", "127.0.0.1"))
    batch.stop()


async def ask(app: App, path: str, parts: list[bytes] | None = None, *, leaves: bool = False) -> tuple[int, bytes]:
    """A GET, or a POST whose body comes in parts, after which the client ``leaves`` before its last or stays."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts or []]
    if not leaves:
        messages.append({"type": "http.request", "body": b"", "more_body": False})
    coming, sent = iter(messages), []

    async def receive() -> Any:
        try:
            return next(coming)
        except StopIteration:
            if not leaves:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    method = "GET" if parts is None else "POST"
    await app.app(
        {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": headers,
         "query_string": b"", "root_path": "", "scheme": "http", "server": ("localhost", 80),
         "client": ("127.0.0.1", 1), "http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.3"}},
        receive, send,
    )  # fmt: skip
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def body(**fields: Any) -> list[bytes]:
    return [json.dumps({"model": "m", "max_tokens": 2, "temperature": 0, **fields}).encode()]


def test_while_a_long_prompt_becomes_tokens_small_requests_are_answered(app, monkeypatch):
    original, begun, go_on = Prompts._ids, threading.Event(), threading.Event()

    def slow(self: Prompts, text: str, *, special: bool) -> list[int]:
        if len(text) > 1000:
            begun.set()
            assert go_on.wait(60)
        return original(self, text, special=special)

    monkeypatch.setattr(Prompts, "_ids", slow)

    async def check() -> None:
        text = "a b " * 20_000
        assert transformers_engine._SMALL_BODY < len(text) < app._prompts.longest_text
        large = [asyncio.ensure_future(ask(app, "/v1/completions", body(prompt=text))) for _ in range(4)]
        while not begun.is_set():
            await asyncio.sleep(0.001)
        assert (await ask(app, "/health"))[0] == 200
        assert (await ask(app, "/v1/completions", body(prompt=SENTENCES[0])))[0] == 200
        assert not any(request.done() for request in large)
        go_on.set()
        for status, answer in await asyncio.gather(*large):
            assert status == 400
            assert b"context_length_exceeded" in answer

    asyncio.run(check())


def test_a_body_that_is_too_long_is_thrown_away_as_it_comes(app, monkeypatch):
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr(Prompts, "read", never)
    monkeypatch.setattr(prompts, "_LONGEST_SENT", 8 * 2**20)
    status, answer = asyncio.run(ask(app, "/v1/completions", [bytes(2**20)] * 20))
    assert status == 400
    # As far as it is taken at all, and not a part more.
    assert f"the body has {9 * 2**20:,} bytes and more" in json.loads(answer)["error"]["message"]


def test_a_client_that_leaves_before_its_body_has_come_is_no_error(app):
    status, answer = asyncio.run(ask(app, "/v1/completions", [b'{"model"'], leaves=True))
    assert (status, answer) == (499, b"")


def test_a_client_that_leaves_while_its_prompt_becomes_tokens_is_not_answered(app, monkeypatch):
    go_on = threading.Event()
    original = Prompts._ids

    def slow(self: Prompts, text: str, *, special: bool) -> list[int]:
        assert go_on.wait(60)
        return original(self, text, special=special)

    monkeypatch.setattr(Prompts, "_ids", slow)

    async def check() -> None:
        (whole,) = body(prompt=SENTENCES[0])
        coming = iter([{"type": "http.request", "body": whole, "more_body": False}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(coming)

        request = transformers_engine.Request(
            {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}, receive
        )
        with pytest.raises(transformers_engine.ClientDisconnect):
            await app.completions(request)
        go_on.set()
        assert (await ask(app, "/v1/completions", body(prompt=SENTENCES[0])))[0] == 200
        assert app.batch.live == {}

    asyncio.run(check())


def test_a_server_that_stops_says_so_to_whoever_waits(tmp_path):
    folder = write_model(tmp_path / "tiny", "diff_v1", context=256)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    app = App(("m",), model, Batch(model, tokenizer, 256), None, Hosts.of("127.0.0.1", "127.0.0.1"))

    async def check() -> None:
        answer = body(prompt="Once", max_tokens=200, logit_bias={"0": -100})
        answers = [asyncio.ensure_future(ask(app, "/v1/completions", answer)) for _ in range(2)]
        while len(app.batch.live) < 2:
            await asyncio.sleep(0.001)
        app.stop()
        # Also to one that comes too late.
        for status, raw in [*await asyncio.gather(*answers), await ask(app, "/v1/completions", answer)]:
            assert status == 503
            assert json.loads(raw)["error"] == {
                "message": "the server is stopping; wanted one that runs: send the request again later",
                "type": "server_error",
                "param": None,
                "code": None,
            }

    asyncio.run(check())
    app.batch.stop()
    assert not app.batch.engine.is_running()
