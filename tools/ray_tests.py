"""Runs the tests that start Ray and writes a row for each: its outcome and its seconds. ``make test-ray`` calls it.

python -m tools.ray_tests --out benchmarks/results/ray.jsonl
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.rows import Writer, provenance
from tools.newest import KINDS

ROOT = Path(__file__).parents[1]
MARK = "pytest.mark." + "ray"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tests and writes the rows; returns the exit status of pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of JSON lines that the rows are written to")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [str(file.relative_to(ROOT)) for file in files_on_ray()]
        command = [sys.executable, "-m", "pytest", "-m", "ray", "--quiet", f"--junitxml={report}", *files]
        status = subprocess.run(command, check=False, cwd=ROOT).returncode
        if not report.exists():
            sys.exit("pytest wrote no report; wanted one: see what it says above")
        write = Writer(given.out)
        for row in outcomes(report):
            write({**row, "ray": version("ray"), **provenance("tools.ray_tests")})
    return status


def files_on_ray() -> list[Path]:
    """Returns the files that hold tests which start Ray."""
    return [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in file.read_text(encoding="utf-8")]


def outcomes(report: Path) -> Iterator[dict[str, Any]]:
    """Yields the name, the outcome and the seconds of each test of a report in JUnit's form."""
    for case in ElementTree.parse(report).iter("testcase"):
        found = {child.tag for child in case}
        outcome = next((kind for tag, kind in KINDS.items() if tag in found), "passed")
        file = case.get("classname", "").replace(".", "/")
        yield {"test": f"{file}.py::{case.get('name')}", "outcome": outcome, "seconds": float(case.get("time", 0))}


if __name__ == "__main__":
    sys.exit(main())
