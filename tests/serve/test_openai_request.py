import inspect
import json

import pytest
from transformers import PreTrainedTokenizerBase

from diffattn.serve.openai_request import RequestError, read


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
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
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
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True}, "echo"),
        ({"logprobs": 0}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
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


@pytest.mark.parametrize("raw", [b"", b"{", b"[" * 100_000, b"\xff", b'"text"', b"[]", b"null"])
def test_what_is_no_json_object_is_refused(raw):
    refused(raw, chat=False, param=None)


def test_half_a_surrogate_pair_is_no_text():
    refused(b'{"model": "m", "prompt": "\\ud83e"}', chat=False, param=None)
    refused(b'{"model": "m", "messages": [{"role": "user", "content": "\\ud83e"}]}', chat=True, param=None)
    assert read(b'{"model": "m", "prompt": "\\ud83e\\udd81"}', chat=False).content == {"prompt": "\U0001f981"}
