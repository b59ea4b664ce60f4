"""Conversations in the words of a tokenizer's chat template, where it has one."""

import json

import pytest

from diffattn.data.documents import chat_text
from diffattn.data.encoding import encode_documents
from diffattn.data.packing import prepare_data
from diffattn.data.text import SEPARATOR, Corpus, Document, split_by_document
from diffattn.data.tokenizer import train_tokenizer
from diffattn.errors import DataError

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|turn|>{{ message.role }}: {{ message.content }}\n{% endfor %}"
)


def chat(*contents: str, role: str = "user") -> Document:
    content = json.dumps([{"role": role, "content": each} for each in contents])
    return Document("a", chat_text(content), content)


@pytest.fixture
def tokenizer():
    made = train_tokenizer(["user: words of a chat"], 270)
    made.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    made.chat_template = TEMPLATE
    return made


def joined(runs) -> list[int]:
    return [index for run in runs for index in run]


def test_a_conversation_is_encoded_by_the_template(tokenizer) -> None:
    ids = joined(encode_documents(tokenizer, ["before", chat("Hi", "Yes"), "behind"]))
    assert tokenizer.decode(ids) == (
        f"before{SEPARATOR}<|turn|>user: Hi\n<|turn|>user: Yes\n{SEPARATOR}behind{SEPARATOR}"
    )
    assert ids.count(tokenizer.convert_tokens_to_ids("<|turn|>")) == 2


def test_without_a_template_it_is_plain_text(tokenizer) -> None:
    tokenizer.chat_template = None
    ids = joined(encode_documents(tokenizer, [chat("Hi", "Yes")]))
    assert tokenizer.decode(ids) == f"user: Hi\n\nuser: Yes{SEPARATOR}"


def test_the_first_token_of_a_text_is_not_doubled(tokenizer) -> None:
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A", special_tokens=[(SEPARATOR, 0)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    ids = joined(encode_documents(tokenizer, [chat("Hi")]))
    assert tokenizer.decode(ids) == f"{SEPARATOR}<|turn|>user: Hi\n{SEPARATOR}"


def test_a_conversation_that_the_template_refuses_is_one_line(tokenizer) -> None:
    with pytest.raises(DataError, match=r"a: the tokenizer's chat template refuses .*no tools here") as raised:
        joined(encode_documents(tokenizer, [chat("Hi", role="tool")]))
    assert "\n" not in str(raised.value)


def test_conversations_are_split_alike_with_and_without_a_template_and_prepared(tokenizer, tmp_path) -> None:
    corpus = Corpus.of("c", [chat(f"question {number}", "an answer") for number in range(40)])
    plain = Corpus.of("c", [Document("a", document.text) for document in corpus.documents])
    assert corpus.digest != plain.digest
    assert [each.text for each in split_by_document(corpus).validation] == [
        each.text for each in split_by_document(plain).validation
    ]
    data = prepare_data(corpus, tokenizer=tokenizer, context=8, validation_fraction=0.2, cache_dir=tmp_path)
    assert tokenizer.decode(data.train.tokens[:].tolist()).startswith("<|turn|>user: question")
    assert data.validation_bytes_per_token == pytest.approx(
        data.facts["bytes"]["validation"] / len(data.validation.tokens), rel=0.1
    )
