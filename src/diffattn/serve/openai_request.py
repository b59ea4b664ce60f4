"""The body of an OpenAI request, read and checked: what the engine can do, or an error in the words of that interface.

Nothing that a client asks for is dropped in silence: a field is obeyed, has no bearing on the text (``user``), or is
refused. Source: OpenAI's API reference, "Create completion" and "Create chat completion".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Fields that change nothing of the text.
_WITHOUT_EFFECT = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store",
    "stream_options", "user",
}  # fmt: skip
# Fields of which only these values are served.
_ONLY: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
}
_OTHERS = {
    "frequency_penalty", "logit_bias", "max_tokens", "model", "presence_penalty", "seed", "stop", "stream",
    "temperature", "top_k", "top_p",
}  # fmt: skip
_CHAT = {"chat_template_kwargs", "max_completion_tokens", "messages", "tools"}
_COMPLETION = {"prompt"}
_MOST_STOPS = 16
# Arguments of apply_chat_template, of which the handler gives some; a client's own template could run for ever.
_NO_TEMPLATE_VARIABLES = {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents",
    "load_audio_from_video", "max_length", "messages", "padding", "processor_kwargs", "return_assistant_tokens_mask",
    "return_dict", "return_tensors", "sanitize_control_tokens", "self", "tokenize", "tokenizer_kwargs", "tools",
    "truncation",
}  # fmt: skip


class RequestError(Exception):
    """An answer that is an error: its HTTP status, and OpenAI's ``message``, ``param`` and ``code``."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {
                "message": message,
                "type": "invalid_request_error" if status < 500 else "server_error",
                "param": param,
                "code": code,
            }
        }


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request whose every field has been checked. None: not given, so the model's or the interface's default.

    Args:
        model: the name that the client gave.
        stream: whether the text is sent as it comes.
        content: ``{"prompt": text}``, or ``messages`` with ``tools`` and ``chat_template_kwargs`` where given.
        max_tokens: of the answer, from 1.
        stop: texts before which the answer ends.
        temperature: 0 takes the likeliest token, at most 2.
        top_p: draw from the likeliest tokens that together have this probability, above 0, to 1.
        top_k: draw from this many likeliest tokens; 0: all.
        seed: of the draws; the same request with the same seed has the same answer.
        frequency_penalty: taken from a token's logit for each time that the answer holds it, −2 to 2.
        presence_penalty: the same, once.
        logit_bias: added to the logits of these token ids, −100 to 100.
    """

    model: str
    stream: bool
    content: dict[str, Any]
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)


def read(raw: bytes, *, chat: bool) -> Asked:
    """The request in a body of JSON.

    Raises:
        RequestError: status 400: no JSON object, an unknown field, or a value that cannot be served.

    >>> read(b'{"model": "m", "prompt": "Once", "max_tokens": 3}', chat=False).max_tokens
    3
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body is a JSON {type(body).__name__}; a JSON object is wanted")
    # OpenAI's clients send null for what is not given.
    body = {name: value for name, value in body.items() if value is not None}
    known = _OTHERS | _WITHOUT_EFFECT | _ONLY.keys() | (_CHAT if chat else _COMPLETION)
    for name, value in body.items():
        if name not in known:
            raise RequestError(f"the field {name[:80]!r} is not served here", param=name[:80])
        if name in _ONLY and not any(type(value) is type(only) and value == only for only in _ONLY[name]):
            raise _wrong(name, value, " or ".join(json.dumps(only) for only in _ONLY[name]))
    model = body.get("model")
    if not isinstance(model, str):
        raise _wrong("model", model, "the name of the model, as /v1/models lists it")
    longest = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    number, integer = _reader(body, float), _reader(body, int)
    return Asked(
        model=model,
        stream=_flag(body, "stream"),
        content=_chat_content(body) if chat else {"prompt": _prompt(body)},
        max_tokens=integer(longest, 1, math.inf),
        stop=_stop(body),
        temperature=number("temperature", 0, 2),
        # The smallest float above 0: no token is as likely as that, and the likeliest is always kept.
        top_p=number("top_p", math.ulp(0.0), 1),
        top_k=integer("top_k", 0, math.inf),
        seed=integer("seed", -(2**63), 2**63 - 1),
        frequency_penalty=number("frequency_penalty", -2, 2) or 0.0,
        presence_penalty=number("presence_penalty", -2, 2) or 0.0,
        logit_bias=_logit_bias(body),
    )


def _wrong(param: str, value: object, wanted: str) -> RequestError:
    given = repr(value)
    return RequestError(f"{param} is {given if len(given) <= 80 else given[:80] + ' …'}; wanted {wanted}", param=param)


def _reader(body: dict[str, Any], kind: type) -> Callable[[str, float, float], Any]:
    def number(name: str, least: float, most: float) -> Any:
        value = body.get(name)
        if value is None:
            return None
        # JSON's true is no number, and 3.0 is one for every client that knows only floats.
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and not whole):
            value = None
        if value is None or not least <= value <= most:
            what = "a whole number" if kind is int else "a number"
            limits = f"from {max(least, 0) if least < 1e-9 < most else least:g}"
            raise _wrong(name, body[name], f"{what} {limits}" + (f" to {most:g}" if most < math.inf else ""))
        return kind(value)

    return number


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _text(value: str, param: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"character {error.start} of {param} is half a surrogate pair; text is wanted") from None
    return value


def _prompt(body: dict[str, Any]) -> str:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise _wrong("prompt", prompt, "one text; send a request for each where there are several")
    return _text(prompt, "prompt")


def _stop(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise _wrong("stop", stop, f"a text or up to {_MOST_STOPS} of them, none empty")
    return tuple(stops)


def _logit_bias(body: dict[str, Any]) -> dict[int, float]:
    given = body.get("logit_bias", {})
    wanted = "token ids with numbers from -100 to 100"
    if not isinstance(given, dict):
        raise _wrong("logit_bias", given, wanted)
    bias: dict[int, float] = {}
    for token, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and -100 <= value <= 100
        if not (token.isascii() and token.isdecimal() and number):
            raise _wrong("logit_bias", given, wanted)
        bias[int(token)] = float(value)
    return bias


def _chat_content(body: dict[str, Any]) -> dict[str, Any]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", messages, "a list of at least one message")
    content: dict[str, Any] = {"messages": [_message(message, at) for at, message in enumerate(messages)]}
    tools = body.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _wrong("tools", tools, "a list of tools")
    if tools and body.get("tool_choice") != "none":
        content["tools"] = tools
    options = body.get("chat_template_kwargs", {})
    if not isinstance(options, dict) or options.keys() & _NO_TEMPLATE_VARIABLES:
        raise _wrong("chat_template_kwargs", options, "names and values for the chat template")
    return content | ({"chat_template_kwargs": options} if options else {})


def _message(message: Any, at: int) -> dict[str, Any]:
    where = f"messages[{at}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _wrong(where, message, "a role and a content")
    parts = message.get("content")
    if isinstance(parts, str) or parts is None:
        parts = [] if parts is None else [{"type": "text", "text": parts}]
    if not isinstance(parts, list):
        raise _wrong(f"{where}.content", parts, "a text or a list of texts")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _wrong(f"{where}.content", part, 'parts of type "text": the model reads nothing else')
        _text(part["text"], where)
    calls = message.get("tool_calls")
    if calls is None:
        if message.get("content") is None:
            raise _wrong(f"{where}.content", None, "a text")
        # A key that is there is read by the handler, whatever it holds.
        return {name: value for name, value in message.items() if name != "tool_calls"}
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        try:
            read = json.loads(arguments) if isinstance(arguments, str) else arguments
            sound = isinstance(read, dict)
        except (ValueError, RecursionError):
            sound = False
        if not sound:
            raise _wrong(f"{where}.tool_calls", call, "calls of a function with arguments that are a JSON object")
    return message
