"""What clients of OpenAI's interface ask for, as data, asked with OpenAI's own client of any engine.

Each case is a request and gives what came back in a form that two engines can be compared by: texts, reasons, counts,
the tokens of logprobs; or of a refusal its status, words, field and code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import openai

PROMPT = "She counted the coins twice and closed the drawer."
OTHER = "Rain fell on the roofs, on the road and on the river."
SAID = [{"role": "user", "content": "Where is the boat?"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
ANSWERED = [*SAID, {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "rain"}]  # fmt: skip
LONG = " ".join([PROMPT] * 3000)


class Case(NamedTuple):
    """A request to ``/v1/completions`` or ``/v1/chat/completions``."""

    chat: bool
    fields: dict[str, Any]
    served: bool = True
    """Whether it is answered, and not refused."""


def _text(**fields: Any) -> Case:
    return Case(False, {"prompt": PROMPT, "max_tokens": 12, "temperature": 0} | fields)


def _chat(**fields: Any) -> Case:
    return Case(True, {"messages": SAID, "max_tokens": 12, "temperature": 0} | fields)


def _refused(case: Case) -> Case:
    return case._replace(served=False)


CASES: dict[str, Case] = {
    "completion": _text(),
    "completion, the default length": Case(False, {"prompt": PROMPT, "temperature": 0}),
    "completion of several prompts": _text(prompt=[PROMPT, OTHER]),
    "completion of token ids": _text(prompt=[9, 40, 70, 41]),
    "completion in a stream": _text(stream=True),
    "completion in a stream with counts": _text(stream=True, stream_options={"include_usage": True}),
    "completion with n": _text(n=3, temperature=1.0, seed=1),
    "completion with n, greedy": _text(n=2),
    "completion with n in a stream": _text(n=2, temperature=1.0, seed=1, stream=True),
    "completion with best_of above n": _refused(_text(best_of=2)),
    "completion with a stop": _text(max_tokens=40, stop=["e"]),
    "completion with a stop in a stream": _text(max_tokens=40, stop=["e", "zz"], stream=True),
    "completion with logprobs": _text(logprobs=3),
    "completion with logprobs in a stream": _text(logprobs=2, stream=True),
    "completion with too many logprobs": _refused(_text(logprobs=30)),
    "completion with echo": _text(echo=True),
    "completion with echo in a stream": _text(echo=True, stream=True),
    "completion with echo and logprobs": _refused(_text(echo=True, logprobs=1)),
    "completion with a suffix": _refused(_text(suffix="end")),
    "completion with a seed": _text(temperature=1.0, seed=7),
    "completion with penalties": _text(frequency_penalty=1.5, presence_penalty=0.5),
    "completion with a bias": _text(logit_bias={"44": 100}),
    "completion with a wrong bias": _refused(_text(logit_bias={"999999": 1})),
    "completion with a wrong temperature": _refused(_text(temperature=3)),
    "completion with a wrong top_p": _refused(_text(top_p=0.0)),
    "completion with no tokens": _refused(_text(max_tokens=0)),
    "completion beyond the context": _refused(_text(prompt=LONG)),
    "completion of more tokens than the context": _refused(_text(max_tokens=100000)),
    "completion of an unknown field": _refused(_text(extra_body={"colour": "red"})),
    "completion of another model": _refused(_text(model="other")),
    "completion of an empty prompt": _refused(_text(prompt="")),
    "chat": _chat(),
    "chat in a stream": _chat(stream=True),
    "chat with n": _chat(n=2, temperature=1.0, seed=1),
    "chat with a stop": _chat(max_tokens=40, stop="e"),
    "chat with logprobs": _chat(logprobs=True, top_logprobs=2),
    "chat with top_logprobs alone": _refused(_chat(top_logprobs=2)),
    "chat with echo": _refused(_chat(extra_body={"echo": True})),
    "chat with tools": _refused(_chat(tools=[TOOL])),
    "chat with tools in a stream": _refused(_chat(tools=[TOOL], stream=True)),
    "chat with tools that are not to be used": _chat(tools=[TOOL], tool_choice="none"),
    "chat with a tool that is to be used": _refused(_chat(tools=[TOOL], tool_choice="required")),
    "chat after a call of a tool": _chat(messages=ANSWERED),
    "chat in JSON": _refused(_chat(response_format={"type": "json_object"})),
    "chat with a picture": _refused(
        _chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}])
    ),
    "chat without messages": _refused(_chat(messages=[])),
    "chat of another model": _refused(_chat(model="other")),
    "chat beyond the context": _refused(_chat(messages=[{"role": "user", "content": LONG}])),
}


def ask(client: openai.OpenAI, model: str, case: Case) -> dict[str, Any]:
    """What an engine answers to a case: ``{"answers": …}``, or ``{"refused": …}``."""
    create: Callable[..., Any] = client.chat.completions.create if case.chat else client.completions.create
    try:
        answer = create(**{"model": model} | case.fields)
        chunks = list(answer) if case.fields.get("stream") else [answer]
    except openai.APIStatusError as error:
        body: Any = error.body
        return {"refused": {"status": error.status_code} | {key: body.get(key) for key in ("message", "param", "code")}}
    parts: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            part = parts.setdefault(choice.index, {"text": "", "tokens": [], "reason": None})
            part["text"] += _words(choice, chat=case.chat)
            part["tokens"] += _tokens(choice, chat=case.chat)
            part["reason"] = choice.finish_reason or part["reason"]
    counts = None if usage is None else [usage.prompt_tokens, usage.completion_tokens]
    return {"answers": [parts[index] for index in sorted(parts)], "counts": counts}


def _words(choice: Any, *, chat: bool) -> str:
    if not chat:
        return choice.text
    said = choice.delta if hasattr(choice, "delta") else choice.message
    return said.content or ""


def _tokens(choice: Any, *, chat: bool) -> list[list[Any]]:
    """Each token with its logprob and the likeliest ones beside it, as far as they were asked for."""
    given = choice.logprobs
    if given is None:
        return []
    if chat:
        return [
            [each.token, round(each.logprob, 3), sorted(top.token for top in each.top_logprobs)]
            for each in given.content or []
        ]
    tops = given.top_logprobs or [{}] * len(given.tokens)
    return [
        [token, round(number, 3), sorted(top or {})]
        for token, number, top in zip(given.tokens, given.token_logprobs, tops, strict=True)
    ]
