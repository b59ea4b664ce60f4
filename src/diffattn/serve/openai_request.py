"""The body of an OpenAI request, read and checked: what the engine can do, or an error in the words of that interface.

Nothing that a client asks for is dropped in silence: a field is obeyed, has no bearing on the text (``user``), or is
refused. Source: OpenAI's API reference, "Create completion" and "Create chat completion".
"""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass, field
from typing import Any

from diffattn.files import parse_json
from diffattn.model.options import REQUEST

# Fields that change nothing of the text.
_WITHOUT_EFFECT = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user",
}  # fmt: skip
# Fields of which only these values are served.
_ONLY: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
}
_OTHERS = {
    "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "min_p", "model", "n", "presence_penalty",
    "repetition_penalty", "seed", "stop", "stream", "stream_options", "temperature", "top_k", "top_p",
}  # fmt: skip
_CHAT = {"chat_template_kwargs", "max_completion_tokens", "messages", "tools", "top_logprobs"}
_COMPLETION = {"best_of", "echo", "prompt"}
# Why, and what to do, for fields that clients know of and that are not served.
_REASONS = {
    "suffix": "the model continues a text and fills no gap",
    "top_logprobs": "a completion asks for them with logprobs, a number",
}
_MOST_STOPS = 16
# Of one request: its prompts times n.
MOST_ANSWERS = 1024
# The parser of JSON lets no other thread run until it is done: so many lists, objects and commas take it 0.1 s.
_MOST_LISTS = 20_000
_MOST_VALUES = 500_000
# What is smaller is parsed at once in any case.
_SMALL_BODY = 2**15
# The longest token id that any vocabulary has.
_MOST_DIGITS = 10
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
        # What a client sent may be half a surrogate pair, which no answer can hold.
        message = _sendable(" ".join(message.split()))
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {
                "message": message,
                "type": "invalid_request_error" if status < 500 else "server_error",
                "param": None if param is None else _sendable(param),
                "code": code,
            }
        }


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request whose every field has been checked. None: not given, so the model's or the interface's default.

    The numbers are of the ranges in ``diffattn.model.options.REQUEST``.

    Args:
        model: the name that the client gave.
        stream: whether the text is sent as it comes.
        content: ``{"prompt": text}``, or a list of texts, of token ids, or of lists of token ids in its place; or
            ``messages`` with ``tools`` and ``chat_template_kwargs`` where given.
        max_tokens: of each answer.
        n: answers to each prompt.
        stop: texts before which an answer ends.
        temperature: 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that together have this probability.
        top_k: draw from this many likeliest tokens; 0: all.
        min_p: draw from the tokens that have at least this part of the likeliest one's probability.
        seed: of the draws; the same request with the same seed has the same answer.
        frequency_penalty: taken from a token's logit for each time that the answer holds it.
        presence_penalty: the same, once.
        repetition_penalty: divides the logits above 0 of tokens in the prompt and the answer; multiplies the others.
        logit_bias: added to the logits of these token ids.
        logprobs: how many of the likeliest tokens are given for each token of the answer, beside the one taken.
        echo: whether the prompt is put in front of the answer.
        usage: whether a stream ends with the counts of tokens: in a chunk of their own where True.
    """

    model: str
    stream: bool
    content: dict[str, Any]
    max_tokens: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    echo: bool = False
    usage: bool | None = None

    @property
    def is_chat(self) -> bool:
        return "messages" in self.content

    @property
    def prompts(self) -> list[str | list[int]]:
        """Of a completion, each a text or token ids."""
        given = self.content["prompt"]
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def read(raw: bytes, *, chat: bool) -> Asked:
    """The request in a body of JSON.

    Raises:
        RequestError: status 400: no JSON object, an unknown field, or a value that cannot be served.

    >>> read(b'{"model": "m", "prompt": "Once", "max_tokens": 3}', chat=False).max_tokens
    3
    """
    body = _object(raw)
    # OpenAI's clients send null for what is not given.
    body = {name: value for name, value in body.items() if value is not None}
    known = _OTHERS | _WITHOUT_EFFECT | _ONLY.keys() | (_CHAT if chat else _COMPLETION)
    for name, value in body.items():
        if name not in known:
            why = _REASONS.get(name)
            raise RequestError(
                f"the field {name[:80]!r} is not served here{f': {why}' if why else ''}", param=name[:80]
            )
        if name in _ONLY and not any(type(value) is type(only) and value == only for only in _ONLY[name]):
            raise _wrong(name, value, " or ".join(json.dumps(only) for only in _ONLY[name]))
    model = body.get("model")
    if not isinstance(model, str):
        raise _wrong("model", model, "the name of the model, as /v1/models lists it")
    content = _chat_content(body) if chat else {"prompt": _prompt(body)}
    asked = Asked(
        model=model,
        stream=_flag(body, "stream"),
        content=content,
        max_tokens=_number(body, "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"),
        n=_number(body, "n") or 1,
        stop=_stop(body),
        temperature=_number(body, "temperature"),
        top_p=_number(body, "top_p"),
        top_k=_number(body, "top_k"),
        min_p=_number(body, "min_p") or 0.0,
        seed=_number(body, "seed"),
        frequency_penalty=_number(body, "frequency_penalty") or 0.0,
        presence_penalty=_number(body, "presence_penalty") or 0.0,
        repetition_penalty=_number(body, "repetition_penalty") or 1.0,
        logit_bias=_logit_bias(body),
        logprobs=_chat_logprobs(body) if chat else _number(body, "logprobs"),
        echo=_flag(body, "echo"),
        usage=_usage(body),
    )
    best_of = _number(body, "best_of")
    if best_of not in (None, asked.n):
        raise _wrong("best_of", best_of, f"{asked.n}, as many as n: ask for n answers with logprobs and take the best")
    if asked.echo and asked.logprobs is not None:
        raise RequestError(
            "echo and logprobs are asked for together; the engine gives probabilities of the answer's tokens and not "
            "of the prompt's: leave one of the two out",
            param="echo",
        )
    answers = asked.n if chat else asked.n * len(asked.prompts)
    if answers > MOST_ANSWERS:
        raise RequestError(
            f"{answers:,} answers are asked for, one for each prompt and n; wanted at most {MOST_ANSWERS:,}: send "
            "several requests",
            param="n" if chat else "prompt",
        )
    return asked


def _object(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8-sig")
        if len(raw) > _SMALL_BODY:
            _check_size(raw)
        body = parse_json(text, unique=True)
    except ValueError as error:
        raise RequestError(f"the body is no JSON that can be read: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body is a JSON {type(body).__name__}; a JSON object is wanted")
    return body


def _check_size(raw: bytes) -> None:
    """Raise a ``ValueError`` for more values than are parsed while the server's other threads wait."""
    plain = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    if plain.count(b'"') > 2 * _MOST_VALUES:
        raise ValueError(f"it has more than {_MOST_VALUES:,} texts")
    outside = b"".join(plain.split(b'"')[::2])
    if outside.count(b"[") + outside.count(b"{") > _MOST_LISTS:
        raise ValueError(f"it has more than {_MOST_LISTS:,} lists and objects")
    if outside.count(b",") > _MOST_VALUES:
        raise ValueError(f"it has more than {_MOST_VALUES:,} values")


def _wrong(param: str, value: object, wanted: str) -> RequestError:
    short = reprlib.Repr()
    short.maxlevel, short.maxstring = 3, 80
    return RequestError(f"{param} is {short.repr(value)}; wanted {wanted}", param=param)


def _sendable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _number(body: dict[str, Any], name: str) -> Any:
    value = body.get(name)
    if value is None:
        return None
    try:
        return REQUEST[name].read(value)
    except ValueError as wanted:
        raise _wrong(name, value, str(wanted)) from None


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def check_text(value: str, param: str) -> str:
    """The text, unless it holds half a surrogate pair, which is no character.

    Raises:
        RequestError: status 400.
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"character {error.start} of {param} is half a surrogate pair; text is wanted") from None
    return value


def _prompt(body: dict[str, Any]) -> Any:
    prompt = body.get("prompt")
    wanted = "a text, a list of texts, a list of token ids, or a list of lists of token ids"
    if isinstance(prompt, list) and prompt and not _are_ids(prompt):
        for each in prompt:
            # All of one kind, none empty, since each gets an answer of its own.
            if type(each) is not type(prompt[0]) or not (isinstance(each, str) or _are_ids(each)):
                raise _wrong("prompt", prompt, wanted)
    elif not prompt or not (isinstance(prompt, str) or _are_ids(prompt)):
        raise _wrong("prompt", prompt, wanted)
    texts = [prompt] if isinstance(prompt, str) else prompt
    for text in texts:
        if isinstance(text, str):
            check_text(text, "prompt")
    # One text is the same in a list and alone.
    return texts[0] if len(texts) == 1 and isinstance(texts[0], str) else prompt


def _are_ids(values: Any) -> bool:
    # True and False are of another type than int.
    return isinstance(values, list) and bool(values) and all(type(value) is int and value >= 0 for value in values)


def _stop(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise _wrong("stop", stop, f"a text or up to {_MOST_STOPS} of them, none empty")
    return tuple(check_text(stop, "stop") for stop in stops)


def _logit_bias(body: dict[str, Any]) -> dict[int, float]:
    given = body.get("logit_bias", {})
    wanted = f"token ids, each with {REQUEST['logit_bias']}"
    if not isinstance(given, dict):
        raise _wrong("logit_bias", given, wanted)
    bias: dict[int, float] = {}
    for token, value in given.items():
        if not (token.isascii() and token.isdecimal() and len(token) <= _MOST_DIGITS):
            raise _wrong("logit_bias", given, wanted)
        try:
            bias[int(token)] = REQUEST["logit_bias"].read(value)
        except ValueError:
            raise _wrong("logit_bias", given, wanted) from None
    return bias


def _chat_logprobs(body: dict[str, Any]) -> int | None:
    """A chat asks with two fields for what a completion asks with one."""
    top = _number(body, "top_logprobs")
    if _flag(body, "logprobs"):
        return top or 0
    if top is not None:
        raise _wrong("top_logprobs", top, "it beside logprobs, true")
    return None


def _usage(body: dict[str, Any]) -> bool | None:
    options = body.get("stream_options", {})
    known = {"include_usage", "include_obfuscation"}
    if not isinstance(options, dict) or not known.issuperset(options):
        raise _wrong("stream_options", options, "include_usage, true or false")
    usage = options.get("include_usage")
    if usage is not None and not isinstance(usage, bool):
        raise _wrong("stream_options", options, "include_usage, true or false")
    return usage


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
        check_text(part["text"], where)
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
            sound = isinstance(parse_json(arguments) if isinstance(arguments, str) else arguments, dict)
        except ValueError:
            sound = False
        if not sound:
            raise _wrong(f"{where}.tool_calls", call, "calls of a function with arguments that are a JSON object")
    return message
