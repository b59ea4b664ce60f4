"""The verbs ``diffattn scale run``, ``diffattn scale fit`` and ``diffattn eval ablation``: a ladder and its rows."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from diffattn.cli.arguments import command_line
from diffattn.errors import DataError
from diffattn.files import command
from diffattn.scaling.options import AblationOptions, FitOptions, LadderOptions, WorkOptions

if TYPE_CHECKING:
    from diffattn.cli.terminal.console import Console
    from diffattn.results.ladder import LadderRow
    from diffattn.scaling.runs import Missing


def scale_run(options: LadderOptions, work: WorkOptions, *, out: Path = Path("runs/ladder"), json: bool = False) -> int:
    """Train softmax and DIFF models of growing size, for a scaling law.

    It takes hours. Runs that are in --out already are not trained again, so call it again to go on. Where another call
    trains in --out too, this one says at its end which runs that one still has.

    Examples:
        diffattn scale run --sizes 200k 550k --processes 2 --out runs/ladder

    Args:
        out: Folder for the runs and their results, rows.jsonl.
        json: Print the results as JSON on stdout.
    """
    from diffattn.cli.terminal.console import Console, print_json

    with Console("scale run", out, resume=True, kept="rows") as console:
        console.importing()
        from diffattn.scaling.fit import fit_scaling

        rows, missing = _trained(options, work, out, console)
    file, hint = str(out / "rows.jsonl"), ""
    # Too few points, or losses that do not fall with the size, have no law.
    with contextlib.suppress(DataError):
        if not missing:
            fit_scaling(file, bootstrap=100)
            hint = f"; fit them with: {command(['diffattn', 'scale', 'fit', file])}"
    console.note(f"{_counted(rows, missing)}: {file}{hint}")
    if json:
        print_json({"rows": [row.to_json() for row in rows], "missing": [_named(run) for run in missing]})
    return 0


def ablation(
    options: AblationOptions,
    work: WorkOptions,
    *,
    out: Path = Path("runs/ablation"),
    png: Path | None = None,
    json: bool = False,
) -> int:
    """Train each variant with one thing changed at a time; print one table.

    It takes hours. Runs that are in --out already are not trained again, so call it again to go on. Where another call
    trains in --out too, this one says at its end which runs that one still has.

    Examples:
        diffattn eval ablation --size 550k --processes 2 --out runs/ablation

    Args:
        out: Folder for the runs and their results, rows.jsonl.
    """
    from diffattn.cli.terminal.console import Console, print_json
    from diffattn.files import check_files

    ladder = options.ladder()
    with Console("eval ablation", out, resume=True, kept="rows") as console:
        console.importing()
        from diffattn.report.ablation_table import ablation_rows, write_ablation_png
        from diffattn.scaling.ablation import ablation as of_rows

        check_files(png=png)
        rows, missing = _trained(ladder, work, out, console)
    if missing:
        console.note(f"{_counted(rows, missing)}: {out / 'rows.jsonl'}")
    if missing and not rows:
        # Everything is being trained elsewhere, so there is no table yet.
        return 0
    result = of_rows(rows, command=console.command)
    console.rows(ablation_rows(result))
    if png is not None:
        write_ablation_png(result, png)
    if json:
        print_json(result.to_json())
    return 0


def _trained(
    options: LadderOptions, work: WorkOptions, out: Path, console: Console
) -> tuple[list[LadderRow], list[Missing]]:
    """Returns the rows of a ladder, and the runs that other processes still train; each of those has had its line."""
    from diffattn.scaling.ladder import run_ladder

    missing: list[Missing] = []
    rows = run_ladder(
        options, out=out, work=work, command=console.command, on_progress=console.ladder, on_stage=console,
        on_note=console.note, on_missing=missing.extend,
    )  # fmt: skip
    for run in missing:
        console.note(f"no row yet: {run.run}, which {run.by} trains")
    return rows, missing


def _counted(rows: list[LadderRow], missing: list[Missing]) -> str:
    """Says how many rows there are, of how many."""
    if not missing:
        return f"{len(rows)} rows"
    return f"{len(rows)} of {len(rows) + len(missing)} rows, call it again once the others are done, or wait by --wait"


def _named(run: Missing) -> dict[str, str]:
    return {"run": run.run, "by": run.by}


def scale_fit(
    points: str, options: FitOptions, *, png: Path | None = None, html: Path | None = None, json: bool = False
) -> int:
    """Fit scaling laws: which softmax model does each DIFF model equal?

    Examples:
        diffattn scale fit runs/ladder/rows.jsonl --png ladder.png
        diffattn scale fit figure3a

    Args:
        points: A .csv or .jsonl file with attention, val_loss, and parameters or tokens or both, optionally seed; or
            figure3a, the points of the paper.
        html: File to write a web page into, with chart and tables.
    """
    from diffattn.cli.terminal.board import Board
    from diffattn.cli.terminal.console import print_json
    from diffattn.cli.terminal.table import show
    from diffattn.files import check_files, write_text
    from diffattn.plan.rule import parse_count

    check_files(png=png, html=html)
    sizes = [parse_count(count) for count in options.at]
    with Board(keep=False) as board:
        from diffattn.report.scaling_page import equivalence_rows, number_rows, render_scaling, write_scaling_png
        from diffattn.scaling.fit import fit_scaling

        result = fit_scaling(
            points, size=options.size, at=sizes, bootstrap=options.bootstrap, seed=options.seed,
            command=command_line(), on_stage=board,
        )  # fmt: skip
    show(equivalence_rows(result))
    show(number_rows(result))
    if png is not None:
        write_scaling_png(result, png)
    if html is not None:
        write_text(html, render_scaling(result))
    if json:
        print_json(result.to_json())
    return 0
