"""The body of an OpenAI request, read and checked: what the engine can do, or an error in the words of that interface.

Nothing that a client asks for is dropped in silence: a field is obeyed, has no bearing on the text (``user``), or is
refused. Source: OpenAI's API reference, "Create completion" and "Create chat completion".

The fields are read by hand, up to the first that is wrong. A model of pydantic collects every error before it reports
one: for a prompt of half a million wrong values it holds up all other threads for 3 to 20 seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from diffattn.files import parse_json
from diffattn.model.options import REQUEST
from diffattn.serve.request_error import RequestError, check_text, wrong_field

# Fields that have no bearing on the text.
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
# Ways out for fields that clients know of and that are not served.
_WAYS_OUT = {
    "suffix": "leave it out: the model continues a text and fills no gap",
    "top_logprobs": "a completion asks for them with logprobs, a number",
}
_MOST_STOPS = 16
# The most answers to one request: its prompts times n.
MOST_ANSWERS = 1024
# The parser of JSON lets no other thread run until it is done: so many lists, objects and commas take it 0.1 s.
_MOST_LISTS = 20_000
_MOST_VALUES = 500_000
# A smaller body is parsed at once in any case.
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


class Content(TypedDict, total=False):
    """The text that an answer goes on from: the prompt of a completion, or the messages of a chat."""

    prompt: Any
    """A text, or a list of texts, of token ids, or of lists of token ids."""
    messages: list[dict[str, Any]]
    """The messages of a chat, each with a role."""
    tools: list[dict[str, Any]]
    """The tools that the model may call, where there are some."""
    chat_template_kwargs: dict[str, object]
    """Variables of the chat template, where some were given."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request whose every field has been checked. None stands for the model's or the interface's default.

    The numbers are of the ranges in ``diffattn.model.options.REQUEST``.
    """

    model: str
    """The name that the client gave."""
    stream: bool
    """True where the text is sent as it comes."""
    content: Content
    """The prompt, or the messages."""
    max_tokens: int | None = None
    """The most tokens of each answer."""
    n: int = 1
    """Answers to each prompt."""
    stop: tuple[str, ...] = ()
    """Texts before which an answer ends."""
    temperature: float | None = None
    """The number that logits are divided by before a token is drawn; 0 takes the likeliest token."""
    top_p: float | None = None
    """Tokens are drawn from the likeliest that together have this probability."""
    top_k: int | None = None
    """Tokens are drawn from this many likeliest ones; 0 for all."""
    min_p: float = 0.0
    """Tokens are drawn from those that have at least this part of the likeliest one's probability."""
    seed: int | None = None
    """The seed of the draws; the same request with the same seed has the same answer."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that the answer holds it."""
    presence_penalty: float = 0.0
    """Taken from a token's logit once, if the answer holds it."""
    repetition_penalty: float = 1.0
    """Divides the logits above 0 of tokens in the prompt and the answer, and multiplies those below."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    logprobs: int | None = None
    """The number of likeliest tokens that are given for each token of the answer, beside the one taken."""
    echo: bool = False
    """True where the prompt is put in front of the answer."""
    usage: bool | None = None
    """True where a stream ends with the counts of tokens: in a chunk of their own where True."""

    @property
    def is_chat(self) -> bool:
        """True for a chat, False for a completion."""
        return "messages" in self.content

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts of a completion, each a text or token ids."""
        given = self.content["prompt"]
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def read(raw: bytes, *, chat: bool) -> Asked:
    """Reads the request in a body of JSON.

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
            interface = "chats" if chat else "completions"
            way_out = _WAYS_OUT.get(name, "correct its name, or leave it out")
            raise RequestError(
                f"the field {name[:80]!r} is not served here", f"a field of OpenAI's {interface}", way_out,
                param=name[:80],
            )  # fmt: skip
        if name in _ONLY and not any(type(value) is type(only) and value == only for only in _ONLY[name]):
            raise wrong_field(name, value, " or ".join(json.dumps(only) for only in _ONLY[name]))
    model = body.get("model")
    if not isinstance(model, str):
        raise wrong_field("model", model, "the name of a model", "send the one that /v1/models lists")
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
        raise wrong_field(
            "best_of", best_of, f"{asked.n}, as many as n", "ask for n answers with logprobs and take the best"
        )
    if asked.echo and asked.logprobs is not None:
        raise RequestError(
            "echo and logprobs are asked for together", "one of the two, as the prompt's tokens have no logprobs here",
            "leave echo or logprobs out",
            param="echo",
        )  # fmt: skip
    answers = asked.n if chat else asked.n * len(asked.prompts)
    if answers > MOST_ANSWERS:
        raise RequestError(
            f"{answers:,} answers are asked for, n to each prompt", f"at most {MOST_ANSWERS:,}",
            "send several requests", param="n" if chat else "prompt",
        )  # fmt: skip
    return asked


def _object(raw: bytes) -> dict[str, object]:
    try:
        text = raw.decode("utf-8-sig")
        if len(raw) > _SMALL_BODY:
            _check_size(raw)
        body = parse_json(text, unique=True)
    except ValueError as error:
        raise RequestError(f"the body cannot be read ({error})", "a JSON object in UTF-8", "correct the body") from None
    if not isinstance(body, dict):
        raise RequestError(
            f"the body is a JSON {type(body).__name__}", "a JSON object", 'send {"model": …, "prompt": …} or messages'
        )
    return body


def _check_size(raw: bytes) -> None:
    """Raises a ``ValueError`` for more values than are parsed while the server's other threads wait."""
    plain = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    if plain.count(b'"') > 2 * _MOST_VALUES:
        raise ValueError(f"it has more than {_MOST_VALUES:,} texts")
    outside = b"".join(plain.split(b'"')[::2])
    if outside.count(b"[") + outside.count(b"{") > _MOST_LISTS:
        raise ValueError(f"it has more than {_MOST_LISTS:,} lists and objects")
    if outside.count(b",") > _MOST_VALUES:
        raise ValueError(f"it has more than {_MOST_VALUES:,} values")


def _number(body: Mapping[str, object], name: str) -> Any:
    value = body.get(name)
    if value is None:
        return None
    try:
        return REQUEST[name].read(value)
    except ValueError as wanted:
        raise wrong_field(name, value, str(wanted)) from None


def _flag(body: Mapping[str, object], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise wrong_field(name, value, "true or false")
    return value


def _prompt(body: Mapping[str, object]) -> Any:
    prompt: Any = body.get("prompt")
    wrong = wrong_field(
        "prompt", prompt, "a text, a list of texts, a list of token ids, or a list of lists of token ids",
        "send one of them that is not empty",
    )  # fmt: skip
    if isinstance(prompt, list) and prompt and not _are_ids(prompt):
        for each in prompt:
            # All of one kind, none empty, since each gets an answer of its own.
            if type(each) is not type(prompt[0]) or not (isinstance(each, str) or _are_ids(each)):
                raise wrong
    elif not prompt or not (isinstance(prompt, str) or _are_ids(prompt)):
        raise wrong
    texts = [prompt] if isinstance(prompt, str) else prompt
    for text in texts:
        if isinstance(text, str):
            check_text(text, "prompt")
    # One text is the same in a list and alone.
    return texts[0] if len(texts) == 1 and isinstance(texts[0], str) else prompt


def _are_ids(values: Any) -> bool:
    # True and False are of another type than int.
    return isinstance(values, list) and bool(values) and all(type(value) is int and value >= 0 for value in values)


def _stop(body: Mapping[str, object]) -> tuple[str, ...]:
    stop = body.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise wrong_field("stop", stop, f"a text or up to {_MOST_STOPS} of them, none empty")
    return tuple(check_text(stop, "stop") for stop in stops)


def _logit_bias(body: Mapping[str, object]) -> dict[int, float]:
    given = body.get("logit_bias", {})
    wanted = f"token ids, each with {REQUEST['logit_bias']}"
    if not isinstance(given, dict):
        raise wrong_field("logit_bias", given, wanted)
    bias: dict[int, float] = {}
    for token, value in given.items():
        if not (token.isascii() and token.isdecimal() and len(token) <= _MOST_DIGITS):
            raise wrong_field("logit_bias", given, wanted)
        try:
            bias[int(token)] = REQUEST["logit_bias"].read(value)
        except ValueError:
            raise wrong_field("logit_bias", given, wanted) from None
    return bias


def _chat_logprobs(body: Mapping[str, object]) -> int | None:
    """Returns what a chat asks for with two fields, and a completion with one."""
    top = _number(body, "top_logprobs")
    if _flag(body, "logprobs"):
        return top or 0
    if top is not None:
        raise wrong_field("top_logprobs", top, "logprobs, true, beside it", "send logprobs, too, or leave both out")
    return None


def _usage(body: Mapping[str, object]) -> bool | None:
    options = body.get("stream_options", {})
    known = {"include_usage", "include_obfuscation"}
    if not isinstance(options, dict) or not known.issuperset(options):
        raise wrong_field("stream_options", options, "include_usage, true or false")
    usage = options.get("include_usage")
    if usage is not None and not isinstance(usage, bool):
        raise wrong_field("stream_options", options, "include_usage, true or false")
    return usage


def _chat_content(body: Mapping[str, object]) -> Content:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong_field("messages", messages, "a list of messages", "send at least one, with a role and a content")
    content: Content = {"messages": [_message(message, at) for at, message in enumerate(messages)]}
    tools = body.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise wrong_field("tools", tools, "a list of tools")
    if tools and body.get("tool_choice") != "none":
        content["tools"] = tools
    options = body.get("chat_template_kwargs", {})
    if not isinstance(options, dict) or options.keys() & _NO_TEMPLATE_VARIABLES:
        raise wrong_field("chat_template_kwargs", options, "names and values for the chat template")
    if options:
        content["chat_template_kwargs"] = options
    return content


def _message(message: Any, at: int) -> dict[str, Any]:
    """Returns a message that a chat template can read."""
    where = f"messages[{at}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise wrong_field(where, message, "an object with a role and a content", "send both")
    parts = message.get("content")
    if isinstance(parts, str) or parts is None:
        parts = [] if parts is None else [{"type": "text", "text": parts}]
    if not isinstance(parts, list):
        raise wrong_field(f"{where}.content", parts, "a text or a list of parts", "send a text")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong_field(f"{where}.content", part, 'parts of type "text"', "send texts, all that is read")
        check_text(part["text"], where)
    calls = message.get("tool_calls")
    if calls is None:
        if message.get("content") is None:
            raise wrong_field(f"{where}.content", None, "a text", "send one, or tool_calls")
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
            raise wrong_field(
                f"{where}.tool_calls", call, "calls of a function", "send arguments that are a JSON object"
            )
    return message
