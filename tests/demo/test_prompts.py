"""The texts that a page begins with."""

import pytest
from support.needle_model import haystack

from diffattn.demo.prompts import answer_tokens, hidden_number, ready_prompts
from diffattn.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer():
    return haystack().tokenizer


def test_the_first_text_hides_a_number_and_asks_for_it(tokenizer):
    first, *others = ready_prompts(None, None, tokenizer, 1000)
    assert first.answer == "70035"
    assert first.text.count("70035") == 1
    assert first.text.endswith("What is the magic number of Oslo? The magic number of Oslo is")
    before, behind = first.text.split("The magic number of Oslo is 70035.")
    assert min(len(before), len(behind)) > 100
    assert [prompt.answer for prompt in others] == [None]


def test_fewer_sentences_stand_around_it_where_a_model_reads_less(tokenizer):
    whole = len(tokenizer(hidden_number(tokenizer, 1000).text)["input_ids"])
    shorter = hidden_number(tokenizer, whole - 1)
    count = len(tokenizer(shorter.text)["input_ids"])
    assert count < whole
    assert shorter.answer in shorter.text
    assert hidden_number(tokenizer, 10) is None
    assert [prompt.answer for prompt in ready_prompts(None, None, tokenizer, 10)] == [None]


def test_the_tokens_of_the_answer_are_those_that_hold_it(tokenizer):
    prompt = hidden_number(tokenizer, 1000)
    ids = tokenizer(prompt.text)["input_ids"]
    first, behind = answer_tokens(prompt.text, prompt.answer, tokenizer)
    assert "70035" in tokenizer.decode(ids[first:behind])
    assert "70035" not in tokenizer.decode(ids[first + 1 : behind])
    assert "70035" not in tokenizer.decode(ids[first : behind - 1])


def test_a_text_of_ones_own_comes_first(tokenizer):
    first, second, _ = ready_prompts("Lima is warm. It is", "warm", tokenizer, 1000)
    assert (first.text, first.answer) == ("Lima is warm. It is", "warm")
    assert second.answer == "70035"


@pytest.mark.parametrize(
    ("text", "answer", "error", "words"),
    [
        (" \n", None, ConfigError, "the text is empty"),
        ("Lima is warm.", "cold", DataError, "the answer 'cold' is not in the text"),
        ("Lima is warm.", " ", DataError, "is not in the text"),
        (None, "warm", ConfigError, "the answer 'warm' without a text"),
        ("rain " * 1000, None, ConfigError, "tokens; wanted at most 1,000, so that the models can write behind it"),
    ],
)
def test_what_cannot_be_a_text_is_refused(text, answer, error, words, tokenizer):
    with pytest.raises(error, match=words):
        ready_prompts(text, answer, tokenizer, 1000)
