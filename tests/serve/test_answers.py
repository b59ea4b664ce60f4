"""Several answers to one request, and what is said beside their text."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.served import SENTENCES, TEMPLATE, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffattn.serve.answer_text import Text
from diffattn.serve.answers import Answers
from diffattn.serve.batching import Batch
from diffattn.serve.prompts import Prompts

CONTEXT = 128


# One for all tests, as a server has: the engine may still deliver what belongs to an answer that a stop text has ended.
LOOP = asyncio.Runner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("answers") / "tiny", "diff_v1", context=CONTEXT)


@pytest.fixture(scope="module")
def batch(folder: Path) -> Iterator[Batch]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    batch = Batch(AutoModelForCausalLM.from_pretrained(folder), tokenizer, CONTEXT)
    yield batch
    batch.stop()
    LOOP.close()


def begin(batch: Batch, *, chat: bool = False, **fields: Any) -> Answers:
    fields = {"model": "m", "temperature": 0, "max_tokens": 12} | fields
    reader = Prompts(batch.tokenizer, "m", CONTEXT, batch.vocabulary)
    asked, prompts = reader.read(json.dumps(fields).encode(), chat=chat, names=("m",))
    return Answers(batch, "m", asked, prompts, [None] * (asked.n * len(prompts)))


def whole(batch: Batch, **fields: Any) -> dict[str, Any]:
    async def ask() -> dict[str, Any]:
        return await begin(batch, **fields).whole()

    return LOOP.run(ask())


def streamed(batch: Batch, **fields: Any) -> list[dict[str, Any]]:
    async def ask() -> list[str]:
        return [event async for event in begin(batch, stream=True, **fields).events()]

    *events, done = LOOP.run(ask())
    assert done == "data: [DONE]\n\n"
    assert all(event.startswith("data: ") and event.endswith("\n\n") and event.count("\n") == 2 for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def texts(answer: dict[str, Any]) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


def test_several_prompts_have_the_answers_of_each_alone_in_their_order(batch):
    alone = [whole(batch, prompt=sentence) for sentence in SENTENCES]
    together = whole(batch, prompt=list(SENTENCES))
    assert texts(together) == [texts(each)[0] for each in alone]
    assert len(set(texts(together))) == len(SENTENCES)
    for name, value in together["usage"].items():
        assert value == sum(each["usage"][name] for each in alone)
    ids = [batch.tokenizer.encode(sentence) for sentence in SENTENCES]
    assert texts(whole(batch, prompt=ids)) == texts(together)
    assert texts(whole(batch, prompt=ids[0])) == texts(together)[:1]
    assert (together["object"], together["model"]) == ("text_completion", "m")


def test_n_answers_are_n_draws_which_a_seed_repeats(batch):
    options = {"prompt": list(SENTENCES[:2]), "n": 3, "temperature": 1.0, "seed": 5}
    first = whole(batch, **options)
    assert len(set(texts(first))) == 6
    assert texts(whole(batch, **options)) == texts(first)
    # The first of n is the one answer, and each prompt's tokens are counted once.
    alone = whole(batch, **(options | {"n": 1}))
    assert texts(alone) == [texts(first)[0], texts(first)[3]]
    assert first["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    assert first["usage"]["completion_tokens"] == 72
    greedy = texts(whole(batch, prompt=SENTENCES[0], n=2, best_of=2))
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_of_several_answers_has_their_texts_by_index(batch, chat):
    asked = {"messages": [{"role": "user", "content": "Hello"}]} if chat else {"prompt": list(SENTENCES[:2])}
    options = {"chat": chat, "n": 3, "temperature": 1.0, "seed": 5, **asked}
    expected = whole(batch, **options)
    chunks = streamed(batch, **options)
    count = len(expected["choices"])
    assert count == (3 if chat else 6)
    found, ends = [""] * count, [None] * count
    for chunk in chunks:
        (choice,) = chunk["choices"]
        found[choice["index"]] += choice["delta"].get("content", "") if chat else choice["text"]
        assert ends[choice["index"]] is None
        ends[choice["index"]] = choice["finish_reason"]
        assert chunk["object"] == ("chat.completion.chunk" if chat else "text_completion")
    assert found == [choice["message"]["content"] if chat else choice["text"] for choice in expected["choices"]]
    assert ends == [choice["finish_reason"] for choice in expected["choices"]] == ["length"] * count
    assert chunks[-1]["usage"] == expected["usage"]
    assert not any("usage" in chunk for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_the_counts_of_a_stream_come_in_a_chunk_of_their_own_where_that_is_asked_for(batch):
    expected = whole(batch, prompt="Once")["usage"]
    *chunks, last = streamed(batch, prompt="Once", stream_options={"include_usage": True})
    assert (last["choices"], last["usage"]) == ([], expected)
    assert not any("usage" in chunk for chunk in chunks)
    chunks = streamed(batch, prompt="Once", stream_options={"include_usage": False})
    assert not any("usage" in chunk for chunk in chunks)


def test_the_prompt_is_put_in_front_where_that_is_asked_for(batch):
    plain = whole(batch, prompt=list(SENTENCES[:2]))
    echoed = [sentence + text for sentence, text in zip(SENTENCES[:2], texts(plain), strict=True)]
    assert texts(whole(batch, prompt=list(SENTENCES[:2]), echo=True)) == echoed
    assert texts(whole(batch, prompt=batch.tokenizer.encode(SENTENCES[0]), echo=True)) == echoed[:1]
    chunks = streamed(batch, prompt=list(SENTENCES[:2]), echo=True)
    found = ["", ""]
    for chunk in chunks:
        found[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert found == echoed
    assert whole(batch, prompt=list(SENTENCES[:2]), echo=True)["usage"] == plain["usage"]


def test_logprobs_are_the_models_own_whatever_shapes_the_draw(batch, folder, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    options = {"temperature": 1.5, "seed": 3, "presence_penalty": 1, "logit_bias": {"0": -100}, "logprobs": 2}
    drawn: list[int] = []
    feed = Text.feed
    monkeypatch.setattr(Text, "feed", lambda self, token, *, last: drawn.append(token) or feed(self, token, last=last))
    found = whole(batch, prompt=SENTENCES[0], **options)["choices"][0]["logprobs"]
    ids, tokens = batch.tokenizer.encode(SENTENCES[0]), list(drawn)
    assert len(tokens) == 12
    with torch.no_grad():
        logprobs = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    for at, token in enumerate(tokens):
        assert found["tokens"][at] == batch.tokenizer.decode([token])
        assert found["token_logprobs"][at] == pytest.approx(float(logprobs[at, token]), abs=1e-4)
        top = found["top_logprobs"][at]
        assert found["tokens"][at] in top
        assert max(top.values()) == pytest.approx(float(logprobs[at].max()), abs=1e-4)
        assert 2 <= len(top) <= 3 or "\N{REPLACEMENT CHARACTER}" in top
        # Half a character has no place in the text before its other half comes.
        assert found["text_offset"][at] <= len(batch.tokenizer.decode(tokens[:at]))
    assert found["text_offset"][0] == 0
    assert found["text_offset"] == sorted(found["text_offset"])


def test_logprobs_change_no_token_and_are_the_same_in_a_stream(batch):
    plain = whole(batch, prompt=list(SENTENCES[:2]), stop="e")
    options = {"prompt": list(SENTENCES[:2]), "stop": "e", "logprobs": 3}
    given = whole(batch, **options)
    assert texts(given) == texts(plain)
    found: list[dict[str, list[Any]]] = [{}, {}]
    for chunk in streamed(batch, **options):
        (choice,) = chunk["choices"]
        for name, values in (choice["logprobs"] or {}).items():
            found[choice["index"]].setdefault(name, []).extend(values)
    for streamed_ones, choice in zip(found, given["choices"], strict=True):
        whole_ones = choice["logprobs"] or {}
        assert streamed_ones.keys() == whole_ones.keys()
        for name, values in streamed_ones.items():
            # Which prompts share a step is the engine's choice, and so is the last digit.
            for value, expected in zip(values, whole_ones[name], strict=True):
                same = value == expected if isinstance(value, str) else value == pytest.approx(expected, abs=1e-5)
                assert same, (name, value, expected)
    for choice in given["choices"]:
        offsets = (choice["logprobs"] or {"text_offset": []})["text_offset"]
        # Of what a stop text cut off, nothing.
        assert all(offset < len(choice["text"]) for offset in offsets)
    none = whole(batch, prompt="Once", logprobs=0)["choices"][0]["logprobs"]
    assert [list(top) for top in none["top_logprobs"]] == [[token] for token in none["tokens"]]


def test_a_chat_has_logprobs_in_its_own_form(batch):
    asked = {"chat": True, "messages": [{"role": "user", "content": "Hello"}], "logprobs": True}
    content = whole(batch, **asked, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert len(content) == 12
    for token in content:
        assert len(token["top_logprobs"]) == 2
        # Greedy: the likeliest is the one.
        likeliest = token["top_logprobs"][0]
        assert {name: token[name] for name in likeliest} == likeliest
        if token["bytes"] is None:
            assert "\N{REPLACEMENT CHARACTER}" in token["token"]
        else:
            assert bytes(token["bytes"]).decode() == token["token"]
    alone = whole(batch, **asked)["choices"][0]["logprobs"]["content"]
    assert [token["logprob"] for token in alone] == pytest.approx([token["logprob"] for token in content])
    assert not any(token["top_logprobs"] for token in alone)
    streamed_tokens = [
        token
        for chunk in streamed(batch, **asked, top_logprobs=2)
        for token in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert [token["token"] for token in streamed_tokens] == [token["token"] for token in content]


def test_a_temperature_next_to_nothing_is_greedy(batch):
    greedy = texts(whole(batch, prompt=SENTENCES[0]))
    for temperature in (1e-300, 5e-324, 1e-40, 1e-9, 9.9e-6, 1e-5):
        assert texts(whole(batch, prompt=SENTENCES[0], temperature=temperature)) == greedy
    for options in ({"top_p": 5e-324}, {"min_p": 1}, {"top_k": 1}):
        assert texts(whole(batch, prompt=SENTENCES[0], temperature=2, **options)) == greedy


def test_penalties_at_the_ends_of_their_ranges_give_a_text(batch):
    for name, ends in (("repetition_penalty", (0.01, 100)), ("frequency_penalty", (-2, 2)), ("min_p", (0, 1))):
        for value in ends:
            answer = whole(batch, prompt=SENTENCES[0], temperature=1.0, logprobs=1, **{name: value})
            assert answer["usage"]["completion_tokens"] > 0


def test_a_repetition_penalty_is_that_of_generate(batch, folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([batch.tokenizer.encode(SENTENCES[0])])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, repetition_penalty=1.7
    )
    text = batch.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert texts(whole(batch, prompt=SENTENCES[0], repetition_penalty=1.7)) == [text]
    assert texts(whole(batch, prompt=SENTENCES[0])) != [text]


def test_when_the_server_stops_every_answer_ends_with_an_error_at_once(folder):
    batch = Batch(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), CONTEXT)

    async def ask() -> list[str]:
        answers = begin(batch, prompt=list(SENTENCES[:2]), stream=True, max_tokens=60, logit_bias={"0": -100})
        events = []
        async for event in answers.events():
            events.append(event)
            batch.request_stop()
        assert batch.live == {}
        return events

    *_, error, done = LOOP.run(ask())
    assert json.loads(error.removeprefix("data: "))["error"]["message"].startswith("the server is stopping; wanted ")
    assert done == "data: [DONE]\n\n"
    batch.stop()
    assert not batch.engine.is_running()
