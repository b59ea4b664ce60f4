"""Conversations in the words of a tokenizer's chat template, where it has one."""

import json
from pathlib import Path

import pytest

from diffattn.data.documents import chat_text
from diffattn.data.encoding import encode_documents
from diffattn.data.packing import prepare_data
from diffattn.data.text import SEPARATOR, Corpus, Document, split_by_document
from diffattn.data.tokenizer import read_chat_template, train_tokenizer
from diffattn.errors import ConfigError, DataError

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


def test_a_given_template_is_that_of_the_result_alone_and_has_tokens_of_its_own(tokenizer, tmp_path) -> None:
    corpus = Corpus.of("c", [chat(f"question {number}", "an answer") for number in range(40)])
    made = [
        prepare_data(
            corpus, tokenizer=tokenizer, context=8, validation_fraction=0.2, cache_dir=tmp_path, chat_template=given
        )
        for given in (None, TEMPLATE.replace("<|turn|>", "* "))
    ]
    assert [each.tokenizer.decode(each.train.tokens[:4].tolist()).split("user")[0] for each in made] == [
        "<|turn|>", "* "
    ]  # fmt: skip
    assert made[0].facts["tokenizer"] != made[1].facts["tokenizer"]
    assert tokenizer.chat_template == TEMPLATE
    trained = prepare_data(
        corpus, vocab_size=270, context=8, validation_fraction=0.2, cache_dir=tmp_path, chat_template=TEMPLATE
    )
    assert trained.tokenizer.chat_template == TEMPLATE
    assert trained.tokenizer.decode(trained.train.tokens[:20].tolist()).startswith("<|turn|>user")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read (No such file"),
        (b"\xff\xfe", "it is no UTF-8"),
        (b"{% for %}", "fails (Expected an expression"),
        (b"{{ raise_exception('nobody may speak') }}", "fails (nobody may speak)"),
        (b"{{ messages[7].content }}", "fails (list object has no element 7)"),
        (b"{{ messages[0].content }}", "writes no question, or no answer"),
        (b"", "writes no question, or no answer"),
    ],
)
def test_a_file_that_is_no_chat_template_is_refused_in_one_line(content, words: str, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        read_chat_template(file)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_templates_that_ask_for_the_marks_of_a_text_are_read(tmp_path: Path) -> None:
    turn = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    (tmp_path / "chat.jinja").write_text("{{ bos_token + '' }}" + turn)
    assert read_chat_template(tmp_path / "chat.jinja") == "{{ bos_token + '' }}" + turn
