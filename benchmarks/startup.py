"""Seconds until a fresh process is ready: imports with and without `diffattn`, and `diffattn --help`.

Every sample is a new Python process, and the cases take turns, A B C A B C. The time of an import is taken inside the
process; that of `--help` is the wall time of the whole command. One JSON line per case.

    python -m benchmarks.startup --repeats 15 --out benchmarks/results/startup.jsonl
"""

from __future__ import annotations

import argparse
import operator
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.rows import Writer, pairwise, provenance, spread

_TIMED = "import time; began = time.perf_counter(); {}; print(time.perf_counter() - began)"


@dataclass(frozen=True)
class Entry:
    """``imports`` are timed inside a fresh interpreter, or ``command`` from outside; ``at_most`` limits the median of
    the seconds, ``above`` those that remain after the named entry's are taken away; ``gate`` is the test of what runs.
    """

    name: str
    gate: str
    imports: str = ""
    command: tuple[str, ...] = ()
    at_most: float | None = None
    above: dict[str, float] = field(default_factory=dict)

    def seconds(self) -> float:
        if self.imports:
            return float(_run([sys.executable, "-c", _TIMED.format(self.imports)]))
        began = time.perf_counter()
        _run([str(Path(sysconfig.get_path("scripts")) / self.command[0]), *self.command[1:]])
        return time.perf_counter() - began


REGISTRATION = "tests/model/test_registration.py::test_auto_classes_know_the_model_in_every_order_of_imports"
ENTRIES = (
    Entry("import torch, transformers", REGISTRATION, imports="import torch, transformers"),
    Entry(
        "import torch, transformers, diffattn",
        REGISTRATION,
        imports="import torch, transformers, diffattn",
        above={"import torch, transformers": 0.1},
    ),
    Entry(
        "diffattn --help",
        "tests/cli/test_main.py::test_help_is_no_mistake",
        command=("diffattn", "--help"),
        at_most=1.0,
    ),
)


def measure(entries: tuple[Entry, ...], rounds: int) -> dict[str, list[float]]:
    """Seconds of each entry in every round; the first round fills the system's file cache and is dropped."""
    seconds: dict[str, list[float]] = {entry.name: [] for entry in entries}
    for index in range(1 + rounds):
        for entry in entries:
            taken = entry.seconds()
            if index:
                seconds[entry.name].append(taken)
    return seconds


def row(entry: Entry, seconds: dict[str, list[float]]) -> dict[str, object]:
    """One line of the result: the time, and where stated what it is above another entry's, each with its limit."""
    mine = seconds[entry.name]
    return {
        "benchmark": "startup",
        "case": entry.name,
        "rounds": len(mine),
        "seconds": spread(mine, entry.at_most),
        "seconds_above": {
            name: spread(pairwise(operator.sub, mine, seconds[name]), limit) for name, limit in entry.above.items()
        },
        "gate": entry.gate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="rounds that are timed (default: 15)")
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    write = Writer(arguments.out)
    origin = provenance("benchmarks.startup")
    seconds = measure(ENTRIES, arguments.repeats)
    for entry in ENTRIES:
        write(row(entry, seconds) | origin)


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
