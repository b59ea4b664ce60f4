"""The parts that the benchmarks share: where a row comes from, its statistics, and how it is written."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffattn.machine import Provenance, processor_facts, processor_name


def provenance(module: str, **machine: Any) -> dict[str, Any]:
    """The command, the versions and the machine, which every row of a run carries."""
    here = Provenance.here()
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "versions": {
            "python": here.python,
            **{name: here.packages[name] for name in ("torch", "transformers", "diffattn")},
        },
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), **machine, "load_before": round(os.getloadavg()[0], 2)},
    }


def spread(
    values: Sequence[float], at_most: float | None = None, at_least: float | None = None
) -> dict[str, float | bool]:
    """Median, 20th and 80th percentile, to six digits; with a limit also whether the median keeps it."""
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
    row: dict[str, float | bool] = {
        name: float(f"{value:.6g}")
        for name, value in (("median", statistics.median(values)), ("p20", fifths[0]), ("p80", fifths[-1]))
    }
    if at_least is not None:
        return row | {"at_least": at_least, "kept": row["median"] >= at_least}
    return row if at_most is None else row | {"at_most": at_most, "kept": row["median"] <= at_most}


def pairwise(operation: Callable[[float, float], float], a: Sequence[float], b: Sequence[float]) -> list[float]:
    """``operation`` round by round, so that a slow minute of the machine weighs on both sides."""
    return [operation(x, y) for x, y in zip(a, b, strict=True)]


def in_turns(calls: Mapping[str, Callable[[], float]], repeats: int | None) -> dict[str, list[float]]:
    """Seconds of each call in every round; all calls of a round before the next round.

    Without ``repeats`` 15 rounds and more, until the fastest call has half a second; 7 where a round takes long.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for rounds in range(1, 10_000):
        for name, call in calls.items():
            seconds[name].append(call())
        totals = [sum(values) for values in seconds.values()]
        if repeats is not None:
            if rounds >= repeats:
                break
        elif rounds >= 7 and (sum(totals) >= 10 or (rounds >= 15 and min(totals) >= 0.5)):
            break
    return seconds


class Writer:
    """Writes rows as JSON lines to stdout and, where a path is given, to a new file; with ``keep`` behind its rows.

    A file that holds something else than rows of a benchmark ends the program with one line.
    """

    def __init__(self, path: Path | None, *, keep: bool = False) -> None:
        self.path = path
        if path is not None:
            if path.exists() and not _holds_rows(path):
                sys.exit(
                    f"--out {str(path)!r} given; a new file, or rows of a benchmark, is wanted: choose another name"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            if not keep:
                path.write_text("", encoding="utf-8")

    def __call__(self, row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _holds_rows(path: Path) -> bool:
    """Whether a file is empty, or its first line a row: every row names the command that made it."""
    try:
        with path.open(encoding="utf-8") as file:
            line = file.readline(1 << 20)
        row = json.loads(line or '{"command": ""}')
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "command" in row


def _cpu() -> str:
    """The processor's name, family and model number: a virtual machine may hide what the name says elsewhere."""
    facts = processor_facts()
    if not facts:
        return processor_name()
    return f"{processor_name()} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"
