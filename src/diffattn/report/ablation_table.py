"""An ablation as a table and as one chart of paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffattn.humanize import MISSING, count, loss, signed
from diffattn.report import charts
from diffattn.report.difference_chart import difference_figure, interval_text


def ablation_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The header and a row per arm: parameters, mean held-out loss, and the difference from the arm that it changes."""
    rows = [["arm", "parameters", "loss", "against", "difference",
             "95% interval", ""]]  # fmt: skip
    for name, variant in result["variants"].items():
        known = [value for value in variant["val_loss"] if value is not None]
        row = [name, count(variant["parameters"]), loss(sum(known) / len(known))]
        pair = result["pairs"].get(name)
        if pair is None:
            rows.append([*row, variant["base"] or MISSING, MISSING, MISSING, ""])
            continue
        difference = pair["val_loss_difference"]
        low, high = difference["low"], difference["high"]
        seen = "" if low is None else "none seen" if low <= 0 <= high else "better" if high < 0 else "worse"
        between = interval_text(difference, len(pair["seeds"]))
        rows.append([*row, pair["baseline"], signed(difference["mean"]), between, seen])
    return rows


def write_ablation_png(result: Mapping[str, Any], path: str | Path) -> None:
    """The chart, as one PNG."""
    with charts.style():
        charts.write_png(difference_figure(result, wide=True), path)
