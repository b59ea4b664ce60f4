"""Every study on the models that ``make study`` trained: one row of JSON a study, all variants and seeds in it.

The runs of a ladder of one size are the models; a variant is read over its seeds, and compared with softmax seed by
seed. A study that has a row for these models is not made again, and one that was cut goes on.

    python -m benchmarks.findings --runs runs/study --text eltec_eng.txt.xz --out benchmarks/results/findings.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

# Idle threads sleep instead of spinning: spinning ones starve the others wherever the machine is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.rows import Writer, provenance
from diffattn.report.ablation_table import ablation_rows
from diffattn.report.study_chart import study_rows, write_study_png
from diffattn.study.ablation import ablation
from diffattn.study.evaluation import evaluate
from diffattn.study.ladder import ROWS, read_rows
from diffattn.study.options import (
    IclOptions,
    LongContextOptions,
    LowBitOptions,
    NoiseOptions,
    OutlierOptions,
    RetrievalOptions,
    StandardOptions,
)


class Case(NamedTuple):
    """One row: what it is called, the study, and what it is asked."""

    name: str
    study: str
    options: Any


def cases(context: int) -> list[Case]:
    """What is asked of models that were trained on ``context`` tokens; a prompt leaves room for its answer."""
    whole, half = context - 16, context // 2
    return [
        Case("noise", "noise", NoiseOptions(length=whole)),
        Case("retrieval", "retrieval", RetrievalOptions(lengths=(half, whole))),
        Case("icl", "icl", IclOptions()),
        Case("outliers", "outliers", OutlierOptions(context=context)),
        Case("low_bit", "low_bit", LowBitOptions(context=context)),
        Case("long_context", "long_context", LongContextOptions(length=context - 1, samples=32)),
        Case("long_context, 4 times as long", "long_context",
             LongContextOptions(length=4 * context, samples=8, rope_base=40_000.0)),
        Case("standard", "standard", StandardOptions()),
    ]  # fmt: skip


def models(runs: Path) -> dict[str, list[Path]]:
    """The folders of each variant's models, by seed; softmax first."""
    rows = sorted(
        read_rows(runs / ROWS), key=lambda row: (row["attention"] != "softmax", row["attention"], row["seed"])
    )
    found: dict[str, list[Path]] = {}
    for row in rows:
        pattern = f"{row['attention']}-*-seed{row['seed']}-*/model"
        folders = [folder for folder in runs.glob(pattern) if (folder / "config.json").exists()]
        if len(folders) != 1:
            raise SystemExit(f"findings: {runs / pattern} is {len(folders)} folders; one model of each row is wanted")
        found.setdefault(row["attention"], []).append(folders[0])
    if not found:
        raise SystemExit(f"findings: {runs / ROWS} has no rows; wanted those of `make study`: train first")
    return found


def rounded(value: Any) -> Any:
    """Numbers to six digits, so that rows stay small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the ladder")
    parser.add_argument("--text", default="sotu", help="what the models were trained on")
    parser.add_argument("--out", type=Path, help="file of the rows, to which is added")
    parser.add_argument("--charts", type=Path, help="folder for one PNG a row")
    parser.add_argument("--only", nargs="+", help="names of cases")
    parser.add_argument("--table", action="store_true", help="print the rows of --out as tables, and measure nothing")
    options = parser.parse_args()
    known = [json.loads(line) for line in _lines(options.out)]
    if options.table:
        for row in known:
            table = ablation_rows(row) if row["study"] == "ablation" else study_rows(row)
            print(f"## {row['name']}\n\n{markdown(table)}\n")
        return
    named = models(options.runs)
    context = int(read_rows(options.runs / ROWS)[0]["context"])
    words = [f"{name}={','.join(map(str, folders))}" for name, folders in named.items()]
    write = Writer(options.out, keep=True)
    losses = ablation(read_rows(options.runs / ROWS))
    wanted = {"name": "held-out loss", "runs": words}
    if not any(all(row.get(key) == value for key, value in wanted.items()) for row in known):
        write(rounded(losses | wanted | provenance("benchmarks.findings")))
    for case in cases(context):
        asked = json.loads(json.dumps(asdict(case.options)))
        wanted = {"name": case.name, "runs": words, "asked": asked}
        found = next((row for row in known if all(row.get(key) == value for key, value in wanted.items())), None)
        if found is None and (options.only is None or case.name in options.only):
            found = rounded(
                evaluate(
                    case.study, words, case.options, text=options.text, keep=options.runs / "studies",
                    on_progress=lambda name, done, all_, case=case: print(
                        f"{case.name}: {name} {done} of {all_}", end="\r", file=sys.stderr
                    ),
                )
                | wanted
                | provenance("benchmarks.findings")
            )  # fmt: skip
            write(found)
        if found is not None and options.charts is not None:
            options.charts.mkdir(parents=True, exist_ok=True)
            write_study_png(found, options.charts / f"{case.name.replace(', ', '-').replace(' ', '-')}.png")


def _lines(path: Path | None) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []


if __name__ == "__main__":
    main()
