"""The verbs ``diffattn scale run``, ``diffattn scale fit`` and ``diffattn eval ablation``: a ladder and its rows."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from diffattn.cli.arguments import command_line
from diffattn.errors import DataError
from diffattn.files import command
from diffattn.scaling.options import AblationOptions, FitOptions, LadderOptions

if TYPE_CHECKING:
    from diffattn.cli.terminal.console import Console
    from diffattn.results.ladder import LadderRow


def scale_run(options: LadderOptions, *, out: Path = Path("runs/ladder"), json: bool = False) -> int:
    """Train softmax and DIFF models of growing size, for a scaling law.

    It takes hours. Runs that are in --out already are not trained again, so call it again to go on; several processes
    may share one --out.

    Examples:
        diffattn scale run --sizes 200k 550k --tokens 8M --out runs/ladder

    Args:
        out: Folder for the runs and their results, rows.jsonl.
        json: Print the results as JSON on stdout.
    """
    from diffattn.cli.terminal.console import Console, print_json

    with Console("scale run", out, resume=True, kept="rows") as console:
        console.importing()
        from diffattn.scaling.fit import fit_scaling

        rows = _trained(options, out, console)
    file, hint = str(out / "rows.jsonl"), ""
    # Too few points, or losses that do not fall with the size, have no law.
    with contextlib.suppress(DataError):
        fit_scaling(file, bootstrap=100)
        hint = f"; fit them with: {command(['diffattn', 'scale', 'fit', file])}"
    console.note(f"{len(rows)} rows: {file}{hint}")
    if json:
        print_json({"rows": [row.to_json() for row in rows]})
    return 0


def ablation(
    options: AblationOptions, *, out: Path = Path("runs/ablation"), png: Path | None = None, json: bool = False
) -> int:
    """Train each variant with one thing changed at a time; print one table.

    It takes hours. Runs that are in --out already are not trained again, so call it again to go on; several processes
    may share one --out.

    Examples:
        diffattn eval ablation --size 550k --tokens 8M --out runs/ablation

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
        rows = _trained(ladder, out, console)
    result = of_rows(rows, command=console.command)
    console.rows(ablation_rows(result))
    if png is not None:
        write_ablation_png(result, png)
    if json:
        print_json(result.to_json())
    return 0


def _trained(options: LadderOptions, out: Path, console: Console) -> list[LadderRow]:
    from diffattn.scaling.ladder import run_ladder

    return run_ladder(
        options, out=out, command=console.command, on_progress=console.ladder, on_stage=console, on_note=console.note
    )


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
