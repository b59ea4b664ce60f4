"""The page of ``diffattn plan``: one file that opens offline, with sliders for the context and the batch.

Every number of the page is the planner's own: a grid of contexts and batches is estimated beforehand, and the sliders,
parameters of the charts, choose a point of it. What else the setting says is that of the command; another command makes
another page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from diffattn import humanize
from diffattn.plan.activations import resolve
from diffattn.plan.answer import ratio_rows
from diffattn.plan.result import BackendRow, Plan, RatioRow
from diffattn.plan.text import backend_words
from diffattn.report import charts
from diffattn.report.compare_table import ratio_text
from diffattn.report.page import render_charts
from diffattn.report.plan_chart import LINES, Grid, bar_chart, line_chart, looks_of

# A group of the table, and what the keys of its rows begin with; the rest is the model.
GROUPS = {
    "Model": (),
    "Training": ("train", "score"),
    "Inference": ("prefill", "decoding", "cache"),
    "Disk and start": ("disk", "read", "first"),
}


class Cell(NamedTuple):
    """A number as it is read, and with all of its digits."""

    text: str
    exact: str


class Backend(NamedTuple):
    """A row of the table of backends."""

    title: str
    colour: str
    scores: Cell
    twin: str
    others: list[Cell]


class Group(NamedTuple):
    """A group of the table's rows, each with its cells by side."""

    title: str
    rows: list[tuple[RatioRow, dict[str, Cell]]]


def render_plan(plan: Plan) -> str:
    """The page of a plan, as HTML."""
    grid, setting = Grid(plan), plan.setting
    trains = all(model.estimate.training is not None for model in plan.models)
    lines = [key for key in LINES if any(value is not None for value in grid.values(key))]
    drawn: dict[str, charts.AnyChart] = {"bars-training": bar_chart(grid, ("training",), bound=True)} if trains else {}
    drawn["bars-inference"] = bar_chart(grid, ("prefill", "decoding"), bound=not trains)
    drawn |= {f"line-{key}": line_chart(grid, key) for key in lines}
    numbers = {"context": grid.contexts, "batch": grid.batches}
    words = {key: [f"{number:,}" for number in own] for key, own in numbers.items()}
    return render_charts(
        "plan.html",
        drawn,
        data={"grid": {**numbers, "words": words, "cells": grid_cells(grid)}},
        title=" against ".join(model.name for model in plan.models),
        models=[(model.name, look.colour) for model, look in zip(plan.models, looks_of(plan), strict=True)],
        answers=[*plan.sentences, *plan.notes],
        fixed=_fixed(plan),
        context=f"{setting.context:,}",
        batch=f"{setting.batch:,}",
        groups=_groups([row for row in plan.ratios if not row.key.startswith("rank_")]),
        lines=lines,
        trains=trains,
        untrained="Training is not planned." if setting.precision.trains else "Integer weights are not trained.",
        backends=_backends(plan),
        command=plan.command,
    )


def grid_cells(grid: Grid) -> dict[str, list[Cell]]:
    """The cells of the table at each point of the grid, by row and side; one alone where all are equal."""
    found: dict[str, list[Cell]] = {}
    for at_point in grid.estimates:
        for row in ratio_rows(at_point, parallel=False):
            for side, cell in _cells(row).items():
                found.setdefault(f"{row.key} {side}", []).append(cell)
    return {key: cells[:1] if len(set(cells)) == 1 else cells for key, cells in found.items()}


def _cells(row: RatioRow) -> dict[str, Cell]:
    written: Callable[[float | None], str] = getattr(humanize, row.format)
    values = {"model": row.model, "against": row.against}
    found = {side: Cell(written(value), humanize.exact(value)) for side, value in values.items()}
    return found | {"ratio": Cell(ratio_text(row.model, row.against), humanize.exact(row.ratio))}


def _groups(rows: Sequence[RatioRow]) -> list[Group]:
    def title(key: str) -> str:
        return next((title for title, starts in GROUPS.items() if key.startswith(starts)), "Model")

    return [Group(name, [(row, _cells(row)) for row in rows if title(row.key) == name]) for name in GROUPS]


def _backends(plan: Plan) -> list[Backend]:
    """The plan's rows, each once; backends that are another by a second name are left out."""
    colours = {model.name: look.colour for model, look in zip(plan.models, looks_of(plan), strict=True)}
    own = [row for row in plan.backends if resolve(row.attention, row.backend) == row.backend]
    rows = {(row.model, row.backend): row for row in own}
    return [_backend(row, colours[row.model]) for row in rows.values()]


def _backend(row: BackendRow, colour: str) -> Backend:
    def cell(written: Callable[[float | None], str], value: float | None) -> Cell:
        return Cell(written(value), humanize.exact(value))

    others = [
        cell(humanize.size, row.cache_bytes),
        cell(humanize.flops, row.training_flops_per_token),
        cell(humanize.size, row.training_bytes),
        cell(humanize.size, row.inference_bytes),
    ]
    twin = humanize.MISSING if row.score_ratio_to_twin is None else f"{row.score_ratio_to_twin:.2f}×"
    return Backend(f"{row.model}, {row.backend}", colour, cell(humanize.size, row.score_bytes), twin, others)


def _fixed(plan: Plan) -> str:
    """The rest of the setting in words, which no slider changes."""
    setting = plan.setting
    words = {
        "precision": setting.precision.name or "as given",
        "machine": "none, so no times" if setting.machine is None else setting.machine.name,
        "attention backend": backend_words(plan),
        "gradient checkpointing": "on" if setting.checkpointing else "off",
    }
    return " · ".join(f"{key} {value}" for key, value in words.items())
