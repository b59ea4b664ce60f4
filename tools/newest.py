"""Runs the tests with the ``transformers`` of this environment and writes one row: what passed, what failed, where.

    .venv-newest/bin/python -m tools.newest --out benchmarks/results/newest.jsonl

``make test-newest`` makes the environment, with the newest release also where pyproject.toml does not allow it yet.
A failure here ends nothing: the row says what would have to be mended before that release is allowed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from benchmarks.rows import Writer, provenance

ROOT = Path(__file__).parents[1]
# JUnit's tags, the gravest first, and our words.
KINDS = {"error": "errors", "failure": "failed", "skipped": "skipped"}
OUTCOMES = ("passed", *reversed(KINDS.values()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tests and writes the row; returns 0 also where tests fail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of JSON lines that the row is written to, behind its rows")
    parser.add_argument("tests", nargs="*", default=["tests"], help="files and folders of tests; default: all")
    given = parser.parse_args(arguments)
    write = Writer(given.out, keep=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "--quiet", "--tb=no", f"--junitxml={report}", *given.tests]
        subprocess.run(command, check=False, cwd=ROOT)
        if not report.exists():
            sys.exit("pytest wrote no report; wanted one: see what it says above")
        write({**outcome(report), "tests": given.tests, "allowed": allowed(), **provenance("tools.newest")})
    return 0


def outcome(report: Path) -> dict[str, Any]:
    """Returns how many tests of a report in JUnit's form had each outcome, and how many failed by file."""
    totals = dict.fromkeys(OUTCOMES, 0)
    failures: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        found = {child.tag for child in case}
        kind = next((kind for tag, kind in KINDS.items() if tag in found), "passed")
        totals[kind] += 1
        if kind in ("errors", "failed"):
            failures[case.get("classname", "").replace(".", "/") + ".py"] += 1
    return {**totals, "failures": dict(sorted(failures.items()))}


def allowed() -> str:
    """Returns the releases of ``transformers`` that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = map(Requirement, project["dependencies"])
    return next(str(each.specifier) for each in asked if each.name == "transformers")


if __name__ == "__main__":
    sys.exit(main())
