"""What `make test-ray` wrote: every test that starts Ray passed, with the release of Ray that is pinned."""

import ast
import json
from pathlib import Path

from tools.ray_tests import MARK, ROOT, files_on_ray, outcomes

REPORT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.scaling.test_on_ray" name="a" time="2.5"/>
<testcase classname="tests.scaling.test_on_ray" name="b" time="1"><failure message="x">y</failure></testcase>
</testsuite></testsuites>"""


def test_a_row_has_the_outcome_and_the_seconds(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert list(outcomes(report)) == [
        {"test": "tests/scaling/test_on_ray.py::a", "outcome": "passed", "seconds": 2.5},
        {"test": "tests/scaling/test_on_ray.py::b", "outcome": "failed", "seconds": 1.0},
    ]


def test_the_rows_are_of_all_tests_that_start_ray_and_all_passed() -> None:
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/ray.jsonl").read_text().splitlines()]
    assert {row["outcome"] for row in rows} == {"passed"}
    assert {row["command"] for row in rows} == {"python -m tools.ray_tests --out benchmarks/results/ray.jsonl"}
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert {f"ray=={row['ray']}" for row in rows} <= set(pins)
    wanted = set()
    for file in files_on_ray():
        module = ast.parse(file.read_text(encoding="utf-8"))
        whole = any(MARK in ast.unparse(node) for node in module.body if isinstance(node, ast.Assign))
        tests = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        for test in tests:
            if whole or any(MARK in ast.unparse(mark) for mark in test.decorator_list):
                wanted.add(f"{file.relative_to(ROOT)}::{test.name}")
    assert {row["test"].partition("[")[0] for row in rows} == wanted
