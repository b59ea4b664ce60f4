"""An ablation as a table and as one chart of paired differences."""

from __future__ import annotations

from pathlib import Path

from diffattn.humanize import MISSING, count, loss, signed
from diffattn.report import charts
from diffattn.report.difference_chart import difference_chart, interval_text
from diffattn.results.ablation import AblationResult

WIDTH = 640


def ablation_rows(result: AblationResult) -> list[list[str]]:
    """The header and a row per arm: parameters, mean held-out loss, and the difference from the arm that it changes."""
    rows = [["arm", "parameters", "loss", "against", "difference", "95% interval", ""]]
    for name, arm in result.variants.items():
        known = [value for value in arm.val_loss if value is not None]
        row = [name, count(arm.parameters), loss(sum(known) / len(known))]
        pair = result.pairs.get(name)
        if pair is None:
            rows.append([*row, arm.base or MISSING, MISSING, MISSING, ""])
            continue
        difference = pair.val_loss_difference
        seen = "no difference seen" if not difference.excludes_zero else "better" if difference.mean < 0 else "worse"
        between = interval_text(difference, len(pair.seeds))
        rows.append([*row, pair.base, signed(difference.mean), between, "" if difference.low is None else seen])
    return rows


def write_ablation_png(result: AblationResult, path: str | Path) -> None:
    """The chart, as one PNG."""
    charts.write_png(difference_chart(result).properties(width=WIDTH), path)
