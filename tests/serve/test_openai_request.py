import inspect
import json
import math
import re

import pytest
from transformers import PreTrainedTokenizerBase

from diffattn.model.options import REQUEST, Range
from diffattn.serve import openai_request
from diffattn.serve.openai_request import read
from diffattn.serve.request_error import RequestError


def completion(**fields) -> bytes:
    return json.dumps({"model": "m", "prompt": "Once", **fields}).encode()


def chat(**fields) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hello"}], **fields}).encode()


def refused(raw: bytes, *, chat: bool, param: str | None) -> str:
    with pytest.raises(RequestError) as caught:
        read(raw, chat=chat)
    error = caught.value.body["error"]
    assert (caught.value.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert "\n" not in error["message"]
    # Three parts: what is given, what is wanted, the way out.
    assert re.fullmatch(r".+; wanted .+: .+", error["message"])
    return error["message"]


def test_what_is_given_is_read_and_what_is_not_is_left_open():
    asked = read(completion(max_tokens=3, stop="end", temperature=0, seed=5, stream=True, user="u"), chat=False)
    assert (asked.model, asked.max_tokens, asked.stop, asked.temperature) == ("m", 3, ("end",), 0.0)
    assert (asked.seed, asked.stream, asked.top_p, asked.content) == (5, True, None, {"prompt": "Once"})
    asked = read(chat(max_completion_tokens=4, stop=["a", "b"], top_p=0.5, logit_bias={"3": -2}, n=1), chat=True)
    assert (asked.max_tokens, asked.stop, asked.top_p, asked.logit_bias) == (4, ("a", "b"), 0.5, {3: -2.0})
    # Null is what some clients send for what is not given.
    assert read(completion(stop=None, temperature=None, logprobs=None), chat=False) == read(completion(), chat=False)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 3}, "model"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [[1], 2]}, "prompt"),
        ({"prompt": [1, 2.0]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 11}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 3]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"n": True}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": 3, "n": 2}, "best_of"),
        ({"echo": 1}, "echo"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": True}, "stream_options"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options"),
        ({"suffix": "end"}, "suffix"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0663": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"3": 101}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"tempereature": 1}, "tempereature"),
    ],
)
def test_a_completion_that_cannot_be_served_is_refused(fields, param):
    assert param in refused(completion(**fields), chat=False, param=param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"content": "Hello"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "messages[0].tool_calls"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": "none"}, "tools"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"echo": True}, "echo"),
        ({"best_of": 1}, "best_of"),
        ({"prompt": "Once"}, "prompt"),
    ],
)
def test_a_chat_that_cannot_be_served_is_refused(fields, param):
    refused(chat(**fields), chat=True, param=param)


def test_no_argument_of_apply_chat_template_is_a_variable_of_the_template():
    for name in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"kwargs"}:
        refused(chat(chat_template_kwargs={name: None}), chat=True, param="chat_template_kwargs")
    assert read(chat(chat_template_kwargs={"enable_thinking": False}), chat=True).content["chat_template_kwargs"]


def test_tools_reach_the_template_unless_none_is_to_be_chosen():
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert read(chat(tools=tools), chat=True).content["tools"] == tools
    assert "tools" not in read(chat(tools=tools, tool_choice="none"), chat=True).content


def numbers_beside(wanted: Range) -> tuple[list[float], list[object]]:
    """The first and last of a range; what is just outside, and what is no number or none that JSON can hold."""
    if wanted.whole:
        inside, outside = [wanted.lowest, wanted.highest], [wanted.lowest - 1, wanted.highest + 1, 0.5]
    else:
        least = math.nextafter(wanted.lowest, math.inf) if wanted.above else wanted.lowest
        inside = [least, wanted.highest]
        outside = [math.nextafter(least, -math.inf), math.nextafter(wanted.highest, math.inf)]
    return inside, [*outside, math.nan, math.inf, -math.inf, 10**400, -(10**400), True, "1", [1]]


@pytest.mark.parametrize("name", REQUEST)
def test_each_number_is_taken_to_both_ends_of_its_range_and_the_error_says_that_range(name):
    wanted = REQUEST[name]
    inside, outside = numbers_beside(wanted)
    is_chat = name in ("top_logprobs", "max_completion_tokens")

    def body(value: object) -> bytes:
        given = {"logit_bias": {"3": value}} if name == "logit_bias" else {name: value}
        beside = {"top_logprobs": {"logprobs": True}, "best_of": {"n": value}}.get(name, {})
        return (chat if is_chat else completion)(**given, **beside)

    for value in inside:
        asked = read(body(value), chat=is_chat)
        field = {"max_completion_tokens": "max_tokens", "top_logprobs": "logprobs", "best_of": "n"}.get(name, name)
        found = getattr(asked, field)
        assert (found[3] if name == "logit_bias" else found) == value
    for value in outside:
        # Of a pair that has to agree, the first that is read is named.
        message = refused(body(value), chat=is_chat, param="n" if name == "best_of" else name)
        assert f"; wanted {'token ids, each with ' * (name == 'logit_bias')}{wanted}: " in message
        assert len(message) < 250


def test_ranges_are_said_as_they_are():
    assert refused(completion(frequency_penalty=-3), chat=False, param="frequency_penalty") == (
        "frequency_penalty is -3; wanted a number from -2 to 2: correct frequency_penalty, or leave it out"
    )
    assert "top_p is 0; wanted a number above 0 and up to 1: " in refused(
        completion(top_p=0), chat=False, param="top_p"
    )
    assert "n is 0; wanted a whole number from 1 to 128: " in refused(completion(n=0), chat=False, param="n")
    assert "to 9,223,372,036,854,775,807: " in refused(completion(seed=2**63), chat=False, param="seed")


def test_prompts_are_texts_or_token_ids_one_or_several():
    for given, prompts in (
        ("Once", ["Once"]),
        (["Once"], ["Once"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ):
        assert read(completion(prompt=given), chat=False).prompts == prompts


def test_what_a_request_wants_beside_the_text():
    asked = read(completion(n=2, best_of=2, logprobs=0, min_p=0.1, repetition_penalty=1.1), chat=False)
    assert (asked.n, asked.logprobs, asked.min_p, asked.repetition_penalty) == (2, 0, 0.1, 1.1)
    assert (asked.echo, asked.usage) == (False, None)
    assert read(completion(echo=True), chat=False).echo
    assert read(chat(logprobs=True), chat=True).logprobs == 0
    assert read(chat(logprobs=True, top_logprobs=3), chat=True).logprobs == 3
    assert read(chat(logprobs=False), chat=True).logprobs is None
    usage = {"include_usage": True, "include_obfuscation": False}
    assert read(completion(stream_options=usage), chat=False).usage is True


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b'"text"', b"[]", b"null",
        b'{"model": "\xed\xa0\x80"}', '{"model": "m"}'.encode("utf-16"), b'{"model": ' + b"9" * 5000 + b"}",
        b'{"model": "m", "model": "m", "prompt": "Once"}',
        b'{"model": "m", "prompt": "Once", "metadata": {"a": [{"b": 1, "b": 2}]}}',
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(raw):
    refused(raw, chat=False, param=None)


@pytest.mark.parametrize(
    "values",
    [b"[]," * 30_000 + b"[]", b'{},"\\"",' * 30_000 + b"[]", b"1," * 500_001 + b"1", b'"' + b'""' * 1_100_000 + b'"'],
)
def test_more_values_than_the_parser_takes_at_once_are_refused_before_it_sees_them(values, monkeypatch):
    def parse(*args: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr(openai_request, "parse_json", parse)
    assert "more than" in refused(b'{"model": "m", "prompt": [' + values + b"]}", chat=False, param=None)


def test_signs_within_a_text_are_no_values():
    text = '[{"' * 40_000 + "," * 1_100_000 + "\\"
    assert read(completion(prompt=text), chat=False).prompts == [text]


def test_an_error_that_repeats_what_was_sent_is_short_and_can_be_sent():
    deep = [1]
    for _ in range(800):
        deep = [deep]
    for given in (deep, "x" * 2**20, {"a" * 2**20: 1}, ["\ud83e"] * 2**17, 10**4000):
        assert len(refused(completion(temperature=given), chat=False, param="temperature")) < 1000
    for name in ("\ud83e", "x" * 2**20):
        with pytest.raises(RequestError) as caught:
            read(completion(**{name: 1}), chat=False)
        assert len(json.dumps(caught.value.body, ensure_ascii=False).encode()) < 1000
    assert "gap" in refused(completion(suffix="end"), chat=False, param="suffix")


def test_half_a_surrogate_pair_is_no_text():
    refused(b'{"model": "m", "prompt": "\\ud83e"}', chat=False, param=None)
    refused(b'{"model": "m", "prompt": ["a", "\\ud83e"]}', chat=False, param=None)
    refused(b'{"model": "m", "prompt": "a", "stop": ["\\ud83e"]}', chat=False, param=None)
    refused(b'{"model": "m", "messages": [{"role": "user", "content": "\\ud83e"}]}', chat=True, param=None)
    assert read(b'{"model": "m", "prompt": "\\ud83e\\udd81"}', chat=False).content == {"prompt": "\U0001f981"}
