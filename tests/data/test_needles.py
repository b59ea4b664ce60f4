"""Needles lie where they are said to lie, in prompts of exactly the length asked for, and their answers are theirs."""

import re

import numpy as np
import pytest

from diffattn.data.needles import (
    CITIES,
    Haystack,
    Needle,
    answer,
    draw_needles,
    is_answer,
    question,
    sentences,
)
from diffattn.data.text import Document
from diffattn.data.tokenizer import train_tokenizer
from diffattn.errors import ConfigError, DataError

TEXT = " ".join(
    f"Sentence {number} tells of {word}." for number in range(60) for word in ("rain", "a long road", "wine")
)
DOCUMENTS = [Document("a", TEXT), Document("b", f'"{TEXT}" Said twice!')]


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack(DOCUMENTS, train_tokenizer([TEXT, question([Needle("Lima", "48219")])], 300))


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("task", [(1, 1), (3, 1), (4, 2), (6, 3)])
def test_prompt_has_the_length_the_needles_and_the_spans(haystack, task, depth):
    needles, queries = task
    for length in (400, 401, 613):
        prompt = haystack.prompt(random(length), length=length, depth=depth, needles=needles, queries=queries)
        assert len(prompt.ids) == length
        assert len(prompt.answers) == queries
        ends = [0]
        for name in ("bos", "before", "answer", "behind", "query"):
            start, end = prompt.spans[name]
            assert start == ends[-1]
            assert end >= start
            ends.append(end)
        assert ends[-1] == length
        text = {name: haystack.tokenizer.decode(prompt.ids[slice(*span)]) for name, span in prompt.spans.items()}
        assert text["bos"] == "<|endoftext|>"
        (city, number) = re.fullmatch(r" The magic number of (\w+) is (\d+)\.", text["answer"]).groups()
        assert number == prompt.answers[0]
        assert city in text["query"]
        context = text["before"] + text["answer"] + text["behind"]
        assert len(re.findall(r"The magic number of \w+ is \d{5}\.", context)) == needles
        assert all(number in context for number in prompt.answers)
        if needles == 1:
            room = prompt.spans["behind"][1] - prompt.spans["before"][0] - len(range(*prompt.spans["answer"]))
            sentence = 20
            assert abs(len(range(*prompt.spans["before"])) - depth * room) <= sentence


def test_the_same_stream_gives_the_same_prompt_and_another_another(haystack):
    prompts = [haystack.prompt(random(seed), length=300, depth=0.5) for seed in (0, 0, 1)]
    assert prompts[0] == prompts[1] != prompts[2]


def test_the_longest_prompt_takes_the_whole_text(haystack):
    whole = len(haystack._tokens)
    extra = 400 - len(range(*haystack.prompt(random(), length=400, depth=0.0).spans["behind"]))
    assert len(haystack.prompt(random(), length=whole + extra, depth=0.0).ids) == whole + extra
    with pytest.raises(ConfigError, match=f"from a text of {whole}; wanted at most {whole}: give more text"):
        haystack.prompt(random(), length=whole + extra + 20, depth=0.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 30}, "a length of 30 tokens, .* wanted a length of at least"),
        ({"length": 400, "needles": 2, "queries": 3}, "3 of 2 needles"),
        ({"length": 400, "needles": 1, "queries": 0}, "0 of 1 needles"),
        ({"length": 400, "depth": 1.5}, "depth is 1.5"),
        ({"length": 40_000, "needles": len(CITIES) + 1}, "needles; wanted 1 to"),
    ],
)
def test_what_cannot_be_is_refused(haystack, options, words):
    with pytest.raises(ConfigError, match=words):
        haystack.prompt(random(), **{"depth": 0.5} | options)


def test_a_haystack_of_one_sentence_is_refused():
    with pytest.raises(DataError, match="wanted text of several sentences"):
        Haystack([Document("a", "One sentence.")], train_tokenizer([], 257))


def test_questions_and_answers():
    three = [Needle("Oslo", "70035"), Needle("Lima", "48219"), Needle("Rome", "10000")]
    assert question(three[:1]) == "What is the magic number of Oslo? The magic number of Oslo is"
    assert question(three) == "What are the magic numbers of Oslo, Lima and Rome? The magic number of Oslo is"
    assert answer(three) == " 70035. The magic number of Lima is 48219. The magic number of Rome is 10000."
    assert is_answer(answer(three), [needle.number for needle in three])
    assert not is_answer(answer(three[::-1]), [needle.number for needle in three])
    assert not is_answer("", ["70035"])


def test_a_prompt_leaves_room_for_any_answer(haystack):
    prompt = haystack.prompt(random(), length=300, depth=0.5, needles=2, queries=2, answered=True)
    assert len(prompt.ids) == 300 - haystack.answer_tokens(2)
    for city in CITIES:
        needles = [Needle(city, "70035"), Needle(CITIES[0], "48219")]
        ids = haystack.tokenizer(answer(needles), add_special_tokens=False)["input_ids"]
        assert len(ids) <= haystack.answer_tokens(2)
    with pytest.raises(ConfigError, match=r"their question and answer take \d+"):
        haystack.prompt(random(), length=60, depth=0.5, answered=True)


def test_needles_are_of_different_cities():
    drawn = draw_needles(random(), len(CITIES))
    assert {needle.city for needle in drawn} == set(CITIES)
    assert all(len(needle.number) == 5 for needle in drawn)
    assert len(set(CITIES)) == len(CITIES)


def test_sentences_are_the_text_again():
    assert "".join(sentences(DOCUMENTS[1].text)) == DOCUMENTS[1].text
    assert sentences("No end") == ["No end"]


@pytest.mark.parametrize("length", [260, 400, 1201])
def test_documents_to_train_on_ask_for_every_needle_that_they_hide(haystack, length):
    counts = set()
    for seed in range(40):
        ids = haystack.document(random(seed), length=length, most_needles=6, most_queries=2)
        assert len(ids) == length
        text = haystack.tokenizer.decode(ids)
        assert text.startswith("<|endoftext|>")
        assert text.endswith(".<|endoftext|>")
        assert text.count("<|endoftext|>") == 2
        context, *questions = text.removesuffix("<|endoftext|>").split("\n\n")
        hidden = dict(re.findall(r"The magic number of (\w+) is (\d{5})\.", context))
        counts.add(len(hidden))
        said = {}
        for asked in questions:
            beginning, _, end = asked.rpartition("?")
            cities = re.findall(r"[A-Z]\w+", beginning.removeprefix("What"))
            said |= dict(zip(cities, re.findall(r"\d+", end), strict=True))
            assert len(cities) in (1, 2)
        assert said == hidden
    # Half of a document is text, so a short one hides fewer.
    assert counts == {1, 2, 3, 4, 5, 6} if length == 1201 else max(counts) < 6
    assert haystack.document(random(), length=length, most_needles=6, most_queries=2) != ids


def test_a_document_without_room_for_a_needle_is_refused(haystack):
    with pytest.raises(ConfigError, match="wanted a context of at least"):
        haystack.document(random(), length=40, most_needles=6, most_queries=1)


def test_a_document_asks_in_the_tokens_of_a_prompts_question(haystack):
    for seed in range(10):
        ids = haystack.document(random(seed), length=400, most_needles=4, most_queries=2)
        _, *asked = haystack.tokenizer.decode(ids).removesuffix("<|endoftext|>").split("\n\n")
        assert asked
        for text in asked:
            beginning = re.match(r".*\? .* (is|are)(?= \d)", text)[0]
            query = haystack.tokenizer(f"\n\n{beginning}", add_special_tokens=False)["input_ids"]
            assert any(ids[at : at + len(query)] == query for at in range(len(ids)))
