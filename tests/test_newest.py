"""What `make test-newest` writes of a run of the tests."""

import json
from pathlib import Path

from tools.newest import ROOT, allowed, outcome

REPORT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.model.test_caches" name="a"/>
<testcase classname="tests.model.test_caches" name="b"><failure message="x">y</failure></testcase>
<testcase classname="tests.serve.test_answers" name="c"><error message="x">y</error></testcase>
<testcase classname="tests.serve.test_answers" name="d"><skipped message="x"/></testcase>
</testsuite></testsuites>"""


def test_outcomes_are_counted_and_failures_are_counted_by_file(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert outcome(report) == {
        "passed": 1, "failed": 1, "errors": 1, "skipped": 1,
        "failures": {"tests/model/test_caches.py": 1, "tests/serve/test_answers.py": 1},
    }  # fmt: skip


def test_what_is_allowed_is_a_range_that_ends() -> None:
    assert ">=" in allowed()
    assert "<" in allowed().replace("<=", "")


def test_the_rows_hold_what_is_said_of_them() -> None:
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/newest.jsonl").read_text().splitlines()]
    passed, failed = (sum(row[kind] for row in rows for kind in kinds) for kinds in (("passed",), ("failed", "errors")))
    (release,) = {row["versions"]["transformers"] for row in rows}
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    assert f"`transformers` {release}: {passed:,} tests pass and {failed:,} do not" in page
