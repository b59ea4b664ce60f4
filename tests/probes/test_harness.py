"""Tasks of lm-eval: the two made here against a likelihood computed apart, and what is refused."""

import builtins
import math

import numpy as np
import pytest
import torch
from support.needle_model import TEXT, haystack, reader

from diffattn.data.text import Document
from diffattn.errors import ConfigError, DataError, UnsupportedError
from diffattn.probes import harness as standard
from diffattn.probes.harness import StandardOptions, measure_standard

DOCUMENTS = (Document("a", TEXT), Document("b", f"{TEXT} And so it ended."))


@pytest.fixture(scope="module")
def found():
    model, tokenizer = reader("diff_v2"), haystack().tokenizer
    return model, tokenizer, measure_standard(model, tokenizer, DOCUMENTS, StandardOptions(limit=6, batch_size=3))


def log_likelihood(model, tokenizer, given: str, text: str) -> float:
    """Nats of the tokens of ``text`` behind those of ``given``; without it, behind the end of another text."""
    before = tokenizer(given)["input_ids"] if given else [tokenizer.eos_token_id]
    whole = tokenizer(given + text)["input_ids"] if given else before + tokenizer(text)["input_ids"]
    ids = torch.tensor([whole])
    with torch.no_grad():
        logs = model(ids).logits.double().log_softmax(-1)[0, len(before) - 1 : -1]
    return logs.gather(-1, ids[0, len(before) :, None]).sum().item()


def test_a_likelihood_is_the_models_own(found):
    model, tokenizer, result = found
    pieces = standard._likelihood(DOCUMENTS, np.random.default_rng(0))["custom_dataset"]()["test"]["text"]
    values = result["text_likelihood"].values["bits_per_byte"]
    assert len(values) == min(6, len(pieces))
    for value, piece in zip(values, pieces, strict=False):
        bits = -log_likelihood(model, tokenizer, "", piece) / math.log(2) / len(piece.encode())
        assert value == pytest.approx(bits, rel=1e-5)


def test_the_likeliest_continuation_is_chosen(found):
    model, tokenizer, result = found
    rows = standard._continuation(DOCUMENTS, np.random.default_rng(0))["custom_dataset"]()["test"]
    values = result["text_continuation"].values
    assert len(values["acc"]) == len(values["acc_norm"]) == 6
    for index in range(6):
        row = rows[index]
        scores = [log_likelihood(model, tokenizer, row["query"], f" {choice}") for choice in row["choices"]]
        normed = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        assert values["acc"][index] == (int(np.argmax(scores)) == row["gold"])
        assert values["acc_norm"][index] == (int(np.argmax(normed)) == row["gold"])


def test_the_right_continuation_is_in_the_text_and_anywhere_among_the_choices():
    rows = standard._continuation(DOCUMENTS, np.random.default_rng(0))["custom_dataset"]()["test"]
    text = " ".join(TEXT.split())
    inside = [f"{row['query']} {row['choices'][row['gold']]}" in f"{text} And so it ended." for row in rows]
    assert all(inside)
    assert {row["gold"] for row in rows} == {0, 1, 2, 3}


def test_shots_are_shown_and_said():
    options = StandardOptions(tasks=("text_continuation",), limit=3, shots=1)
    with_one = measure_standard(reader("softmax"), haystack().tokenizer, DOCUMENTS, options)
    assert with_one["text_continuation"].shots == 1


def test_what_cannot_run_is_one_line(monkeypatch):
    model, tokenizer = reader("softmax"), haystack().tokenizer

    def measure(*tasks, documents=DOCUMENTS):
        return measure_standard(model, tokenizer, documents, StandardOptions(tasks=tasks))

    with pytest.raises(ConfigError, match="task 'hellaswog' is not known to lm-eval; wanted text_continuation"):
        measure("hellaswog")
    with pytest.raises(DataError, match="no held-out document has 72 words"):
        measure("text_continuation", documents=(Document("a", "Too short."),))
    with pytest.raises(DataError, match="has 2 words; wanted 150"):
        measure("text_likelihood", documents=(Document("a", "Too short."),))

    def unreachable(*_, **__):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UnsupportedError, match=r"the data of piqa cannot be loaded \(no route\); wanted a network"):
        measure("piqa")

    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedError, match=r"pip install 'diffattn\[eval\]'"):
        measure("text_likelihood")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"tasks": ()}, "tasks is empty"), ({"limit": 0}, "limit is 0"), ({"shots": -1}, "shots is -1"),
     ({"batch_size": 0}, "batch_size is 0"), ({"tasks": ("paper", "paper")}, "each once")],
)  # fmt: skip
def test_bad_options_are_one_line(options, words):
    with pytest.raises(ConfigError, match=words):
        StandardOptions(**options)


def test_a_model_that_reads_less_than_an_answer_is_named():
    model = reader("softmax")
    model.config.max_position_embeddings = 4
    with pytest.raises(UnsupportedError, match="more tokens than the 4 that the model reads; wanted a model with more"):
        measure_standard(model, haystack().tokenizer, DOCUMENTS, StandardOptions(limit=2))
