"""The verb ``diffattn plan``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffattn.plan.setting import PlanOptions, Setting

if TYPE_CHECKING:
    from diffattn.plan.named_model import Model
    from diffattn.study.plan_check import MeasuredRow


def plan(options: PlanOptions, *, measure: bool = False, json: bool = False, html: Path | None = None) -> int:
    """Say what one model or two need before they are built: memory, time, disk.

    Nothing is trained and nothing is loaded, so the answer comes in a second. docs/plan.md explains each number.

    Examples:
        diffattn plan --model diff_v1:6.8B --against softmax:11B --context 4096
        diffattn plan --model diff_v1:1.4B --against softmax:1.4B --fits 8GiB

    Args:
        measure: Also build the first model on this machine and print measured numbers beside the predicted ones.
        json: Print the answer as JSON on stdout.
        html: File to write a web page into, with the same numbers and with sliders.
    """
    from diffattn.cli.arguments import command_line
    from diffattn.cli.terminal.console import print_json
    from diffattn.cli.terminal.screen import say
    from diffattn.cli.terminal.table import show
    from diffattn.files import check_files, write_text
    from diffattn.humanize import size
    from diffattn.plan import answer, search, text
    from diffattn.plan.named_model import named

    check_files(html=html)
    setting, model, against = options.setting(), options.model, options.against
    result = answer.plan(model, against, setting, command=command_line())
    printed = result.to_json()
    shown = [("", text.table(result)), ("", text.backend_table(result.backends))]
    if options.sweep is not None:
        rows = search.sweep(options.sweep, model, against, setting)
        printed["sweep"] = [row.to_json() for row in rows]
        shown.append(("", text.sweep_table(rows)))
    if options.fits is not None:
        found = search.fits(options.fits, model, setting)
        printed["fits"] = [row.to_json() for row in found]
        limit = found[0].limit
        shown.append((f"The most that {size(limit)} ({limit:,} bytes) hold:", text.fits_table(found)))
    if measure:
        measured = _measured(named(model, against)[0], setting)
        printed["measured"] = [row.to_json() for row in measured]
        shown.append(("", measured_table(measured)))
    if html is not None:
        from diffattn.report.plan_page import render_plan

        write_text(html, render_plan(result))
    say(text.setting_line(result), *result.notes, *result.sentences)
    for title, lines in shown:
        if title:
            say("", title)
        show(lines)
    if json:
        print_json(printed)
    return 0


def measured_table(rows: Sequence[MeasuredRow]) -> list[list[str]]:
    """Returns what was predicted beside what was measured, as text; the first row is the header."""
    head = ["what", "unit", "predicted", "measured", "predicted / measured"]
    return [
        head,
        *(
            [row.what, row.unit, _shown(row.predicted), _shown(row.measured), f"{row.ratio:.3f}×"]
            for row in rows
        ),
    ]  # fmt: skip


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _measured(model: Model, setting: Setting) -> list[MeasuredRow]:
    from diffattn.cli.terminal.board import Board

    with Board(keep=False) as board:
        board.importing()
        from diffattn.study.plan_check import measure_plan

        return measure_plan(model.built.plain(), model.attention, setting, on_stage=board)
