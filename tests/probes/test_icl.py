"""Classification by demonstrations: what is said is a label, the likeliest along the tree of labels."""

import itertools
import json

import datasets
import pytest
import torch
from support.needle_model import TEXT, VOCABULARY, reader

from diffattn.data.tokenizer import train_tokenizer
from diffattn.errors import ConfigError, DataError
from diffattn.probes.icl import (
    Choices,
    Example,
    IclOptions,
    measure_icl,
    query_ids,
    read_examples,
    shown_ids,
    synthetic_task,
)

TASK = synthetic_task(4, examples=60, seed=5)
TOKENIZER = train_tokenizer([TEXT, "input: label: 0 1 2 3\n\n"], VOCABULARY)


def test_a_task_can_be_solved_from_its_examples_and_not_from_another_tasks():
    keys = {}
    for text, label in synthetic_task(4, examples=400, seed=5):
        for word in text.split():
            keys.setdefault(word, set()).add(label)
    own = {word: labels for word, labels in keys.items() if len(labels) == 1}
    assert len(own) >= 16
    assert all(any(word in own for word in text.split()) for text, _ in TASK)
    assert {label for _, label in TASK} == set("0123")
    assert TASK == synthetic_task(4, examples=60, seed=5) != synthetic_task(4, examples=60, seed=6)
    for labels in (1, 11):
        with pytest.raises(ConfigError, match="wanted 2 to 10"):
            synthetic_task(labels, examples=9, seed=0)


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "llama"])
@pytest.mark.parametrize("labels", [("0", "1", "2"), ("red", "red wine", "rain", "road")], ids=str)
def test_answers_are_greedy_along_the_tree_without_a_cache(attention, labels):
    model, choices = reader(attention), Choices(labels, TOKENIZER)
    shown = shown_ids(TASK[:3], TOKENIZER)
    queries = [query_ids(example, TOKENIZER) for example in TASK[3:9]]
    said = choices.best(model, shown, queries)
    for query, label in zip(queries, said, strict=True):
        tokens, possible = [], set(choices.labels)
        while len(possible) > 1:
            with torch.no_grad():
                logits = model(torch.tensor([shown + query + tokens])).logits[0, -1]
            following = {choices.ids[name][len(tokens)] for name in possible}
            tokens.append(max(following, key=lambda token: logits[token].item()))
            possible = {name for name in possible if choices.ids[name][: len(tokens)] == tokens}
        assert possible == {label}
    assert said == choices.best(model, [], [shown + query for query in queries])


def test_accuracy_is_that_of_what_is_said(monkeypatch):
    asked = []

    def knowing(self, model, shown, queries):
        text = TOKENIZER.decode(shown)
        asked.append(text)
        labels = dict(TASK)
        answers = [
            labels[TOKENIZER.decode(query).removeprefix("input: ").removesuffix("\nlabel:")] for query in queries
        ]
        # Wrong about the first one whenever the last demonstration has label 0.
        wrong = text.rstrip().endswith("0")
        return ["1" if answers[0] != "1" else "2", *answers[1:]] if wrong else answers

    monkeypatch.setattr(Choices, "best", knowing)
    options, seen = IclOptions(shots=(4, 8), queries=10, permutations=5), []
    result = measure_icl(
        reader("softmax"), TOKENIZER, TASK, options, on_progress=lambda *progress: seen.append(progress)
    )
    assert seen[-1] == (120, 120)
    assert result.labels == ["0", "1", "2", "3"]
    for text, shots in zip(asked, [4, 8, *[8] * 10], strict=True):
        assert text.count("label:") == shots
    by_class = [[line[-1] for line in text.split("\n") if line.startswith("label")] for text in asked[7:]]
    for labels in by_class:
        assert len([1 for a, b in itertools.pairwise(labels) if a != b]) == len(set(labels)) - 1
    same = {tuple(sorted(text.split("\n\n"))) for text in asked[1:]}
    assert len(same) == 1
    expected = [0.9 if text.rstrip().endswith("0") else 1.0 for text in asked]
    assert [sum(values) / 10 for values in result.by_shots.values()] == expected[:2]
    for kind, start in (("random", 2), ("by class", 7)):
        entry = result.permutations[kind]
        assert entry.accuracy == pytest.approx(expected[start : start + 5])
        assert entry.spread == pytest.approx(max(entry.accuracy) - min(entry.accuracy))


def test_examples_of_a_file(tmp_path):
    file = tmp_path / "task.jsonl"
    rows = [{"sentence": "It  rains.\n", "class": 3}, {"sentence": "It is dry.", "class": "dry"}]
    file.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = read_examples(str(file), text="sentence", label="class")
    assert found == [Example("It rains.", "3"), Example("It is dry.", "dry")]


def test_examples_of_a_data_set_have_the_names_of_their_labels(monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b  c"], "label": [1, 0]}, features=features)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: asked.append((given, named)) or rows)
    assert read_examples("org/task:plain:test") == [Example("a", "yes"), Example("b c", "no")]
    assert asked == [(("org/task", "plain"), {"split": "test"})]
    plain = datasets.Dataset.from_dict({"text": ["a"], "label": [["x", "y"]]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: plain)
    with pytest.raises(DataError, match=r"org/task: row 0: the label is \['x', 'y'\]; wanted a single choice"):
        read_examples("org/task")
    with pytest.raises(DataError, match="org/task: row 0 has no 'sentence' and 'label'"):
        read_examples("org/task", text="sentence")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no examples"),
        ('{"text": "a", "label": ["x", "y"]}', r"line 1: the label is \['x', 'y'\]; wanted a single choice"),
        ('{"text": "a", "label": ""}', "wanted a single choice"),
        ('{"text": "a", "label": true}', "wanted a single choice"),
        ('{"text": "a", "label": "x"}\n{"text": "b"}', "line 2 has no 'text' and 'label'"),
        ("[1]", "line 1 has no 'text' and 'label'"),
        ("no json", "line 1 is no JSON"),
        ("[" * 100_000, "line 1 is no JSON .it is nested too deeply."),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path, content, words):
    file = tmp_path / "task.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        read_examples(str(file))


def test_what_cannot_be_is_refused(tmp_path):
    model = reader("softmax")
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(str(tmp_path / "absent.jsonl"))
    with pytest.raises(ConfigError, match="queries is 0; wanted at least 1"):
        IclOptions(queries=0)
    with pytest.raises(DataError, match="60 examples given; wanted 132, for 32 shots and 100 queries"):
        measure_icl(model, TOKENIZER, TASK, IclOptions())
    with pytest.raises(DataError, match="the examples have 1 label"):
        measure_icl(model, TOKENIZER, [Example("a", "x")] * 9, IclOptions(shots=(1,), queries=2))
    long = [Example(f"{text} " * 400, label) for text, label in TASK]
    seen = []
    with pytest.raises(ConfigError, match=r"8 demonstrations and a question take \d+ tokens; wanted at most 8192"):
        measure_icl(model, TOKENIZER, long, IclOptions(shots=(1, 8), queries=2), on_progress=seen.extend)
    assert not seen
