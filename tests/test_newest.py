"""What `make test-newest` writes of a run of the tests."""

from pathlib import Path

from tools.newest import outcome

REPORT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.model.test_caches" name="a"/>
<testcase classname="tests.model.test_caches" name="b"><failure message="x">y</failure></testcase>
<testcase classname="tests.serve.test_answers" name="c"><error message="x">y</error></testcase>
<testcase classname="tests.serve.test_answers" name="d"><skipped message="x"/></testcase>
</testsuite></testsuites>"""


def test_outcomes_are_counted_and_failures_are_counted_by_file(tmp_path: Path) -> None:
    reports = [tmp_path / "0.xml", tmp_path / "1.xml"]
    for report in reports:
        report.write_text(REPORT)
    assert outcome(reports) == {
        "passed": 2, "failed": 2, "errors": 2, "skipped": 2,
        "failures": {"tests/model/test_caches.py": 2, "tests/serve/test_answers.py": 2},
    }  # fmt: skip
