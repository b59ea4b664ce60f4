"""Every study on the models that ``make study`` trained: one row of JSON for each model and study.

The runs of a ladder of one size are the models. A model that has a row of a study is not measured again, so it may be
deleted, and others trained later or elsewhere; a study that was cut goes on. ``--table`` and ``--charts`` read the
rows. What is asked and how rows are read together is ``diffattn.study.findings``.

    python -m benchmarks.findings --runs runs/study --text eltec_eng.txt.xz --out benchmarks/results/findings.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

# Idle threads sleep instead of spinning: spinning ones starve the others wherever the machine is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from benchmarks.rows import Writer, provenance
from diffattn.report.study_chart import write_study_png
from diffattn.results.finding import Finding
from diffattn.results.ladder import LadderRow
from diffattn.scaling.rows import ROWS, read_rows
from diffattn.study import findings

# The file of the ablation's rows, beside that of the findings.
ABLATION = "ablation.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the ladder")
    parser.add_argument("--text", default="sotu", help="text that the models were trained on")
    parser.add_argument("--out", type=Path, help="file of the rows, to which is added")
    parser.add_argument("--charts", type=Path, help="folder for one PNG a row")
    parser.add_argument("--only", nargs="+", help="names of cases to measure, or to draw")
    parser.add_argument(
        "--table",
        action="store_true",
        help="print all rows of --out, and of ablation.jsonl beside it, as tables; measure nothing",
    )
    options = parser.parse_args()
    known = read_findings(options.out)
    if not options.table:
        measure(options, known)
    if options.table:
        ablated = [] if options.out is None else read_rows(options.out.with_name(ABLATION))
        for name, table in findings.tables(known, ablated).items():
            print(f"## {name}\n\n{table}\n")
    if options.charts is not None:
        options.charts.mkdir(parents=True, exist_ok=True)
        for study in findings.together(known):
            if options.only is None or study.name in options.only:
                name = study.name.replace(", ", "-").replace(" ", "-")
                write_study_png(study.table, options.charts / f"{name}.png")


def measure(options: argparse.Namespace, known: list[Finding]) -> None:
    """Measure what has no row yet, write it, and add it to ``known``."""
    ladder = read_rows(options.runs / ROWS)
    if not ladder:
        raise SystemExit(f"findings: {options.runs / ROWS} has no rows; wanted those of `make study`: train first")
    write = Writer(options.out, keep=True)
    machine = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    for trained in ladder:
        for case in findings.cases(trained.context):
            if (options.only is None or case.name in options.only) and not _is_known(case, trained, known):
                who = f"{trained.arm}, seed {trained.seed}"
                model = findings.folder_of(options.runs, trained)
                if model is None:
                    print(f"{case.name}: the model of {who} is not in {options.runs}; not measured", file=sys.stderr)
                    continue
                row = findings.measured(
                    case, model, trained, text=options.text, keep=options.runs / "studies",
                    on_progress=lambda _, done, all_, case=case, who=who: print(
                        f"{case.name}: {who}, {done} of {all_}", end="\r", file=sys.stderr
                    ),
                )  # fmt: skip
                write(row.to_json() | provenance("benchmarks.findings", **machine))
                known.append(row)


def _is_known(case: findings.Case, trained: LadderRow, known: list[Finding]) -> bool:
    wanted = (case.name, findings.facts(trained), case.asked)
    return any((row.name, row.model, row.asked) == wanted for row in known)


def read_findings(path: Path | None) -> list[Finding]:
    """The rows of a file; a missing file has none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []
    return [Finding.from_json(json.loads(line)) for line in lines]


if __name__ == "__main__":
    main()
