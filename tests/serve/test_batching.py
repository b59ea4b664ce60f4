"""The engine in this process, in states that a client cannot bring about at will."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.served import SENTENCES, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffattn.errors import CheckpointError, UnsupportedError
from diffattn.serve import batching
from diffattn.serve.answers import Answers
from diffattn.serve.batching import Batch
from diffattn.serve.openai_request import Asked
from diffattn.serve.prompts import Prompt
from diffattn.serve.request_error import RequestError

CONTEXT = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("batch") / "tiny", "diff_v1", context=CONTEXT)


@pytest.fixture
def batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    """Whose keys and values have room for one text of the whole context and a page."""
    monkeypatch.setattr(batching, "_CPU_CACHE_TOKENS", 0)
    batch = Batch(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), CONTEXT)
    yield batch
    batch.stop()
    batch.stop()
    assert not batch.engine.is_running()


def asked(**options: Any) -> Asked:
    fields = {"model": "m", "stream": False, "content": {"prompt": ""}, "max_tokens": 90, "logit_bias": {0: -100.0}}
    return Asked(**(fields | options))


def begin(batch: Batch, text: str, **options: Any) -> Answers:
    return Answers(batch, "m", asked(**options), [Prompt(batch.tokenizer.encode(text))], [None])


async def answer(batch: Batch, text: str, **options: Any) -> dict[str, Any]:
    whole = await begin(batch, text, **options).whole()
    assert whole["usage"]["completion_tokens"] == 90
    return whole["choices"]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0, "frequency_penalty": 0.3}])
def test_requests_that_are_put_off_for_want_of_memory_have_the_answers_of_requests_alone(batch, options, monkeypatch):
    put_off = []
    manager = type(batch.engine.manager.batch_processor.offloading_manager)
    original = manager.offload_requests
    monkeypatch.setattr(manager, "offload_requests", lambda self: put_off.append(1) or original(self))

    async def all_at_once() -> list[Any]:
        calls = [answer(batch, text, seed=at, **options) for at, text in enumerate(SENTENCES)]
        return await asyncio.gather(*calls)

    async def alone(at: int) -> Any:
        return await answer(batch, SENTENCES[at], seed=at, **options)

    expected = [asyncio.run(alone(at)) for at in range(len(SENTENCES))]
    assert not put_off
    assert asyncio.run(all_at_once()) == expected
    assert put_off
    assert batch.live == {}


def test_answers_of_softmax_are_those_of_generate_too(tmp_path):
    folder = write_model(tmp_path / "softmax", "softmax", context=CONTEXT)
    alone, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = Batch(AutoModelForCausalLM.from_pretrained(folder), tokenizer, CONTEXT)

    async def text(prompt: str) -> str:
        whole = await begin(batch, prompt, temperature=0.0, max_tokens=30, logit_bias={}).whole()
        return whole["choices"][0]["text"]

    for prompt in SENTENCES[:2]:
        ids = tokenizer(prompt, return_tensors="pt")
        output = alone.generate(**ids, max_new_tokens=30, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert asyncio.run(text(prompt)) == tokenizer.decode(output, skip_special_tokens=True)
    batch.stop()


def test_a_cancelled_request_leaves_nothing_behind(batch, monkeypatch):
    monkeypatch.setattr(batching, "_LATE_SECONDS", 0.2)

    async def cancelled() -> None:
        call = asyncio.ensure_future(answer(batch, SENTENCES[0]))
        while not batch.live:
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert batch.live == {}
        await asyncio.sleep(0.5)

    asyncio.run(cancelled())
    scheduler = batch.engine.manager.batch_processor.scheduler
    assert not scheduler.active_requests
    assert not scheduler.waiting_requests
    assert batch.engine.manager.output_router.result_handlers == {}
    assert batch.engine.manager.output_router.output_queue.empty()


def test_a_failure_of_the_engine_reaches_every_client_and_the_next(batch, monkeypatch):
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError('a "fault" in the model')

    async def check() -> None:
        events = begin(batch, SENTENCES[0]).events()
        whole = asyncio.ensure_future(answer(batch, SENTENCES[1]))
        while len(batch.live) < 2:
            await asyncio.sleep(0)
        monkeypatch.setattr(batch.engine.manager.model, "forward", fails)
        with pytest.raises(RequestError, match="fault") as caught:
            await whole
        assert caught.value.status == 500
        *_, last, done = [event async for event in events]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert 'a "fault" in the model' in error["message"]
        assert error["type"] == "server_error"
        assert done == "data: [DONE]\n\n"
        await asyncio.sleep(0.2)
        with pytest.raises(RequestError, match="the engine has ended") as caught:
            await answer(batch, SENTENCES[2])
        assert caught.value.status == 503
        assert batch.live == {}
        assert not batch.is_alive()

    asyncio.run(check())


def test_a_cache_that_the_memory_does_not_hold_is_refused_with_a_way_out(folder, monkeypatch):
    monkeypatch.setattr(batching, "_free_memory", lambda: 20_000)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with pytest.raises(UnsupportedError, match="--max-context"):
        Batch(model, tokenizer, CONTEXT)


def test_an_engine_that_does_not_start_says_why(folder, monkeypatch):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(model, "forward", fails)
    with pytest.raises(UnsupportedError, match=r"does not start here \(no such instruction\)"):
        Batch(model, tokenizer, CONTEXT)


@pytest.mark.parametrize(("name", "value"), [("temperature", float("nan")), ("temperature", -1.0), ("top_p", 0.0)])
def test_habits_of_a_model_that_are_none_are_refused_before_anything_is_served(folder, name, value):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    setattr(model.generation_config, name, value)
    with pytest.raises(CheckpointError, match=f"{name} is {value} in generation_config.json; wanted a number"):
        Batch(model, tokenizer, CONTEXT)
