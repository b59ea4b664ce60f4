"""The rows of requests that both engines were asked: every case has one, and in none do the two differ."""

import json
from pathlib import Path

from benchmarks.openai_cases import CASES
from benchmarks.vllm_requests import alike

ROWS = Path("benchmarks/results/vllm_requests.jsonl")


def test_both_engines_serve_a_request_or_refuse_it_in_the_same_words():
    rows = {row["case"]: row for row in map(json.loads, ROWS.read_text(encoding="utf-8").splitlines())}
    assert rows.keys() == CASES.keys()
    for name, case in CASES.items():
        assert rows[name]["alike"], name
        assert rows[name]["served"] == case.served, name


def test_answers_that_differ_are_not_alike():
    part = {"text": "a b", "tokens": [], "reason": "length"}
    answer = {"answers": [part], "counts": [3, 12]}
    refusal = {"refused": {"status": 400, "message": "x", "param": "n", "code": None}}
    served, refused = CASES["completion"], CASES["completion with a suffix"]
    assert alike(served, answer, answer | {"counts": None})
    assert alike(served, answer, {"answers": [part | {"text": "a b\ufffd"}], "counts": [3, 12]})
    assert alike(refused, refusal, refusal)
    for other in (
        refusal,
        {"answers": [], "counts": None},
        {"answers": [part | {"text": "a c"}], "counts": None},
        {"answers": [part | {"reason": "stop"}], "counts": None},
        {"answers": [part | {"tokens": [["a", -1.0, []]]}], "counts": None},
        answer | {"counts": [3, 11]},
    ):
        assert not alike(served, answer, other)
    assert not alike(refused, refusal, {"refused": refusal["refused"] | {"message": "y"}})
    assert not alike(served, refusal, refusal)
