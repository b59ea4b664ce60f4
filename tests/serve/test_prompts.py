"""Prompts are refused by their bytes, or by their first pieces, before a tokenizer spends time or memory on them."""

import json
from typing import Any

import pytest
from support.served import SENTENCES, TEMPLATE
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from diffattn.data.tokenizer import train_tokenizer
from diffattn.serve import prompts
from diffattn.serve.prompts import LONGEST_BODY, Prompt, Prompts
from diffattn.serve.request_error import RequestError

CONTEXT = 64
NAMES = ("m", "other")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(SENTENCES, 320)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def reader(tokenizer: PreTrainedTokenizerFast) -> Prompts:
    return Prompts(tokenizer, "m", CONTEXT, len(tokenizer))


def read(reader: Prompts, *, chat: bool = False, **fields: Any) -> list[Prompt]:
    return reader.read(json.dumps({"model": "m", **fields}).encode(), chat=chat, names=NAMES)[1]


def said(text: str) -> dict[str, Any]:
    return {"chat": True, "messages": [{"role": "user", "content": text}]}


def refused(reader: Prompts, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read(reader, **fields)
    return caught.value


def never(*args: Any, **options: Any) -> Any:
    raise AssertionError("the tokenizer was asked")


def test_the_ids_are_those_of_the_tokenizer(reader, tokenizer):
    for text in (*SENTENCES, "naïve — 🦁 日本", "<|endoftext|>a"):
        assert read(reader, prompt=text, max_tokens=1)[0].ids == tokenizer(text)["input_ids"]
    rendered = tokenizer.apply_chat_template(said("Hello")["messages"], add_generation_prompt=True)["input_ids"]
    assert read(reader, **said("Hello"))[0].ids == rendered


def test_what_a_tokenizer_json_cuts_off_or_fills_up_is_left_as_it_is(tokenizer):
    expected = tokenizer(SENTENCES[0])["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=CONTEXT)
    assert read(Prompts(tokenizer, "m", CONTEXT, 320), prompt=SENTENCES[0])[0].ids == expected


def test_several_prompts_and_token_ids_as_prompts(reader, tokenizer):
    first, second = (tokenizer(text)["input_ids"] for text in SENTENCES[:2])
    assert [prompt.ids for prompt in read(reader, prompt=SENTENCES[:2])] == [first, second]
    assert [prompt.ids for prompt in read(reader, prompt=first)] == [first]
    assert [prompt.ids for prompt in read(reader, prompt=[first, second])] == [first, second]
    for given in (SENTENCES[0], first):
        assert read(reader, prompt=given, echo=True) == [Prompt(first, SENTENCES[0])]


@pytest.mark.parametrize("ids", [[320], [1, 2**31], [10**400]])
def test_a_token_id_that_the_model_does_not_know_is_refused(reader, ids):
    error = refused(reader, prompt=ids)
    assert (error.status, error.body["error"]["param"]) == (400, "prompt")
    assert "wanted an id from 0 to 319: " in str(error)
    assert len(str(error)) < 200


@pytest.mark.parametrize("size", [1, 20])
def test_a_text_of_more_bytes_than_the_context_can_stand_for_is_refused_before_it_is_tokens(reader, monkeypatch, size):
    monkeypatch.setattr(Prompts, "_ids", never)
    text = "é" * (size * reader.longest_text)
    for fields in ({"prompt": text}, {"prompt": ["a" * 9, text]}, said(text)):
        if "prompt" in fields and isinstance(fields["prompt"], list):
            monkeypatch.setattr(Prompts, "_ids", lambda self, text, special: [1] if len(text) < 10 else never())
        error = refused(reader, **fields)
        assert (error.status, error.body["error"]["code"]) == (400, "context_length_exceeded")
        assert f"{reader.longest_text:,}" in str(error)


def test_the_longest_text_that_the_context_holds_is_not_refused(tokenizer):
    longest = max(tokenizer.get_vocab(), key=len)
    text = tokenizer.convert_tokens_to_string([longest]) * (CONTEXT - 1)
    reader = Prompts(tokenizer, "m", CONTEXT, len(tokenizer))
    assert len(text) <= reader.longest_text < 3 * len(text)
    ids = tokenizer(text)["input_ids"]
    if len(ids) < CONTEXT:
        assert read(reader, prompt=text)[0].ids == ids


def test_a_normaliser_may_shorten_a_text(tokenizer):
    plain = Prompts(tokenizer, "m", CONTEXT, 320).longest_text
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    reader = Prompts(tokenizer, "m", CONTEXT, 320)
    assert reader.longest_text == 4 * plain
    # Letters of 4 bytes, which become letters of 1.
    letters = "\N{MATHEMATICAL BOLD SMALL A}" * (CONTEXT - 1)
    assert len(read(reader, prompt=letters)[0].ids) == CONTEXT - 1


def test_of_a_text_that_is_far_too_long_only_the_first_pieces_become_tokens(reader, monkeypatch):
    monkeypatch.setattr(prompts, "_PIECE", 32)
    seen: list[int] = []
    original = Prompts._ids

    def ids(self: Prompts, text: str, *, special: bool) -> list[int]:
        seen.append(len(text))
        return original(self, text, special=special)

    monkeypatch.setattr(Prompts, "_ids", ids)
    text = "Qzx " * 150
    assert 4 * CONTEXT < len(text) <= reader.longest_text
    error = refused(reader, prompt=text)
    assert error.body["error"]["code"] == "context_length_exceeded"
    assert "more than 64" in str(error)
    assert sum(seen) < len(text) / 2


def test_a_prompt_and_an_answer_have_to_fit(reader, tokenizer):
    count = len(tokenizer(SENTENCES[0])["input_ids"])
    assert read(reader, prompt=SENTENCES[0], max_tokens=CONTEXT - count)
    error = refused(reader, prompt=SENTENCES[0], max_tokens=CONTEXT - count + 1)
    assert (
        f"the prompt has {count} tokens and {CONTEXT - count + 1} more are asked for; wanted at most {CONTEXT} "
        in str(error)
    )
    assert refused(reader, prompt=[1] * CONTEXT).body["error"]["code"] == "context_length_exceeded"
    assert refused(reader, prompt=[["1"]]).body["error"]["param"] == "prompt"
    assert refused(reader, prompt=[1], logit_bias={"320": 1}).body["error"]["param"] == "logit_bias"
    error = refused(reader, prompt=[1], model="m2")
    assert (error.status, error.body["error"]["code"]) == (404, "model_not_found")


def test_a_body_is_bounded_by_the_context_and_by_itself(reader, tokenizer):
    assert reader.longest_body == 6 * reader.longest_text + 2**20
    assert Prompts(tokenizer, "m", 10**7, 320).longest_body == LONGEST_BODY
    error = reader.too_long(reader.longest_body + 1)
    assert (error.status, error.body["error"]["code"]) == (400, "context_length_exceeded")
    assert reader.too_long(LONGEST_BODY + 1).status == 413


@pytest.mark.parametrize(
    ("template", "fields"),
    [
        ("{{ raise_exception('no') }}", {}),
        ("{{ messages[0]['content'] + 1 }}", {}),
        ("{{ 1 // 0 }}", {}),
        ("{% for m in messages %}{{ m.content.no.such }}{% endfor %}", {}),
        ("{{ x + 'a' }}", {"chat_template_kwargs": {"x": 1}}),
        ("{{ x }}", {"chat_template_kwargs": {"x": "\ud83e"}}),
        ("{{ messages[0].role }}", {"messages": [{"role": "\ud83e", "content": "a"}]}),
    ],
)  # fmt: skip
def test_a_template_that_fails_over_what_a_client_gave_is_the_clients_error(reader, tokenizer, template, fields):
    tokenizer.chat_template = template
    error = refused(reader, **(said("Hello") | fields))
    assert error.status == 400
    assert "\n" not in str(error)


def test_a_chat_with_a_model_that_has_no_template_is_refused(reader, tokenizer):
    tokenizer.chat_template = None
    assert "no chat template" in str(refused(reader, **said("Hello")))


TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def test_tools_are_refused_where_the_template_does_not_tell_the_model_of_them(reader, tokenizer):
    assert str(refused(reader, **said("Hello"), tools=TOOLS)).startswith(
        "tools are given, and the chat template of 'm'"
    )
    assert read(reader, **said("Hello"), tools=TOOLS, tool_choice="none") == read(reader, **said("Hello"))
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool['function']['name'] }}{% endfor %}" + TEMPLATE
    assert tokenizer.decode(read(reader, **said("Hello"), tools=TOOLS)[0].ids).startswith("weatheruser: Hello")


def test_tools_are_refused_by_an_engine_that_reads_no_calls(tokenizer):
    tokenizer.chat_template = "{{ (tools or []) | length }}" + TEMPLATE
    reader = Prompts(tokenizer, "m", CONTEXT, len(tokenizer), tools=False)
    assert str(refused(reader, **said("Hello"), tools=TOOLS)).startswith(
        "tools are given; wanted none, since this engine"
    )
    assert read(reader, **said("Hello"))
