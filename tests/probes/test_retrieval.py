"""Retrieval by a model that is known to answer, in cells that are not asked twice."""

import json

import pytest
import torch
from support.needle_model import haystack, reader

from diffattn.data.needles import Needle, answer
from diffattn.errors import ConfigError
from diffattn.probes.retrieval import RetrievalOptions, answered_rightly, measure_retrieval
from diffattn.sealed import SEAL

HAY = haystack()
OPTIONS = RetrievalOptions(lengths=(340, 381), depths=(0.0, 1.0), tasks=((1, 1), (3, 2)), samples=3, batch_size=2)


def telling(model, replies):
    """The model with its answers put there by hand: what it is asked, in order, and what it is to say."""
    asked = []

    def generate(input_ids, attention_mask, max_new_tokens, **options):
        assert (attention_mask == 1).all()
        asked.append(len(input_ids))
        ids = [HAY.tokenizer(replies(row), add_special_tokens=False)["input_ids"][:max_new_tokens] for row in input_ids]
        width = max(map(len, ids))
        return torch.cat([input_ids, torch.tensor([row + [0] * (width - len(row)) for row in ids])], dim=1)

    model.generate = generate
    return asked


def knowing(row: torch.Tensor) -> str:
    """Reads the question and finds the answer in the text."""
    import re

    text = HAY.tokenizer.decode(row)
    numbers = dict(re.findall(r"The magic number of (\w+) is (\d{5})\.", text))
    asked = re.findall(r"What (?:is|are) the magic numbers? of ([\w ,]+)\?", text)[0]
    cities = asked.replace(" and ", ", ").split(", ")
    return answer([Needle(city, numbers[city]) for city in cities])


def test_a_model_that_knows_is_right_and_one_that_guesses_is_not():
    model = reader("diff_v1")
    asked = telling(model, knowing)
    rows = measure_retrieval(model, HAY, OPTIONS)
    assert len(rows) == 8
    assert all(correct == [True] * 3 for correct in rows.values())
    assert asked == [2, 1] * 8
    telling(model, lambda row: " 12345. The magic number of Lima is 67890.")
    assert not any(any(correct) for correct in measure_retrieval(model, HAY, OPTIONS).values())


def test_it_goes_on_where_it_was_cut(tmp_path):
    model, file, seen = reader("diff_v1"), tmp_path / "rows.jsonl", []
    telling(model, knowing)
    rows = measure_retrieval(model, HAY, OPTIONS, rows=file)
    lines = file.read_text().splitlines()
    assert [{name: value for name, value in json.loads(line).items() if name != SEAL} for line in lines] == [
        cell._asdict() | {"correct": correct} for cell, correct in rows.items()
    ]
    file.write_text("\n".join(lines[:5]) + "\n")
    asked = telling(model, knowing)
    again = measure_retrieval(model, HAY, OPTIONS, rows=file, on_progress=lambda *progress: seen.append(progress))
    assert again == rows
    assert asked == [2, 1] * 3
    assert seen[-1] == (9, 9)
    assert len(file.read_text().splitlines()) == 8
    # Another number of samples is another question.
    asked = telling(model, knowing)
    measure_retrieval(
        model, HAY, RetrievalOptions(lengths=(340,), tasks=((1, 1),), depths=(0.0,), samples=2), rows=file
    )
    assert asked == [2]


@pytest.mark.parametrize("attention", ["softmax", "diff_v2", "llama"])
def test_batched_answers_are_those_of_one_at_a_time(attention):
    import numpy as np

    model = reader(attention)
    prompts = [HAY.prompt(np.random.default_rng(seed), length=280, depth=0.5) for seed in range(3)]
    said = []
    decode = HAY.tokenizer.batch_decode

    class Listening:
        pad_token_id = 0

        def batch_decode(self, ids, **options):
            said.append(ids.tolist())
            return decode(ids, **options)

    class Hay:
        tokenizer = Listening()
        answer_tokens = staticmethod(HAY.answer_tokens)

    answered_rightly(model, Hay(), prompts)
    for prompt in prompts:
        answered_rightly(model, Hay(), [prompt])
    together, *alone = said

    def until_end(ids):
        return ids[: ids.index(0)] if 0 in ids else ids

    assert [until_end(ids) for ids in together] == [until_end(row) for (row,) in alone]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"tasks": ()}, "tasks is empty"),
        ({"lengths": (8193,)}, "wanted at most 8192"),
        ({"lengths": (30,)}, "a length of at least 67"),
        ({"lengths": (300,), "tasks": ((1, 2),)}, "2 of 1 needles"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        measure_retrieval(reader("softmax"), HAY, RetrievalOptions(**options))
