"""The ladder that would settle "a V1 of 6.8B equals a softmax model of 11B": sizes and seeds, their interval, and cost.

The truth is what the paper's five points give, by each form of curve. A simulated ladder has these losses at its sizes
and noise as the seeds of ``ladder.jsonl`` have it: a part that both variants share, since a seed is the same text in
the same order, and a part of each run. Both curves are fitted to many such ladders (a parametric bootstrap), and the
interval is that of 95% of them. GPU-hours are the planner's.

    python -m benchmarks.claim --out benchmarks/results/claim.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import Writer, provenance
from diffattn.plan.cluster.answer import plan_cluster
from diffattn.scaling.forms import FLOOR, POWER, Array, Form, fit_form, invert, refit
from diffattn.scaling.points import read_points

GATE = "tests/scaling/test_claim.py::test_the_rows_are_what_the_simulation_gives"
LADDER = Path(__file__).with_name("results") / "ladder.jsonl"
CLAIMED = 6.837e9
# The size of the paper's training: 10B tokens in steps of 0.25M.
TOKENS, STEP_TOKENS, CLUSTER = 10_000_000_000, 250_000, "8xH100"
PAPER = (0.834e9, 1.413e9, 2.795e9, 6.837e9, 13.123e9)
LADDERS: dict[str, tuple[float, ...]] = {
    "the paper's five": PAPER,
    "and two smaller": (0.2e9, 0.4e9, *PAPER),
    "and one larger": (*PAPER, 26e9),
}
SEEDS = (1, 3, 5, 10, 20, 40)
DRAWS = 2000


@dataclass(frozen=True)
class Noise:
    """The spread of log losses between seeds: what both variants of a seed share, and what each run has alone."""

    shared: float
    alone: float


@dataclass(frozen=True)
class Case:
    """One ladder under one form and noise."""

    ladder: str
    seeds: int
    form: str
    noise: float = 1.0


def design() -> list[Case]:
    """All ladders, seeds and forms with the measured noise, and with half of it."""
    return [
        Case(ladder, seeds, form.name, noise)
        for noise in (1.0, 0.5)
        for form in (FLOOR, POWER)
        for ladder in LADDERS
        for seeds in SEEDS
    ]


def measured_noise(path: Path = LADDER) -> Noise:
    """Returns the noise of a ladder's softmax and V1: standard deviations within each size, of log losses."""
    cells: dict[tuple[int, int], dict[str, float]] = {}
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        cells.setdefault((row["hidden_size"], row["seed"]), {})[row["attention"]] = math.log(row["val_loss"])
    sizes = sorted({size for size, _ in cells})
    total, apart = [], []
    for size in sizes:
        pairs = [(one["softmax"], one["diff_v1"]) for (own, _), one in cells.items() if own == size]
        total += [statistics.variance(values) for values in zip(*pairs, strict=True)]
        apart.append(statistics.variance([first - second for first, second in pairs]))
    # A difference has the noise of two runs, without what they share.
    alone = statistics.mean(apart) / 2
    return Noise(math.sqrt(max(statistics.mean(total) - alone, 0.0)), math.sqrt(alone))


def ratios(case: Case, noise: Noise, *, draws: int = DRAWS, seed: int = 0) -> Array:
    """Returns the ratio of sizes, V1's over softmax's, that each simulated ladder gives for V1 of 6.8B; 0 for none."""
    form = next(form for form in (FLOOR, POWER) if form.name == case.form)
    points = read_points("figure3a")
    known = np.log(sorted({point.size for point in points if point.size}))
    centre = known.mean()
    sizes = np.repeat(np.log(LADDERS[case.ladder]), case.seeds)
    x = (sizes - centre)[:, None]
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, noise.shared * case.noise, (draws, len(x)))
    thetas = {}
    for attention in ("softmax", "diff_v1"):
        own = sorted((point.size or 0.0, math.log(point.val_loss)) for point in points if point.attention == attention)
        truth = fit_form(form, (known - centre)[:, None], np.array([loss for _, loss in own]))
        drawn = form.log_loss(truth, x) + shared + rng.normal(0, noise.alone * case.noise, (draws, len(x)))
        thetas[attention] = _fitted(form, x, drawn, truth, case.seeds)
    at = np.array([[math.log(CLAIMED) - centre]])
    loss = form.log_loss(thetas["diff_v1"], at)[..., 0]
    with np.errstate(over="ignore"):
        equal = np.exp(invert(form, thetas["softmax"], loss) + centre)
    return CLAIMED / equal


def _fitted(form: Form, x: Array, drawn: Array, truth: Array, seeds: int) -> Array:
    """Returns the fits to the means over the seeds of each size, which have the noise of all."""
    mean = drawn.reshape(len(drawn), -1, seeds).mean(-1)
    return refit(form, x[::seeds], mean, truth)


def half_width(found: Array) -> tuple[float, float, float]:
    """Returns the 2.5% and 97.5% points of the ratios, and half of what lies between."""
    low, high = (float(end) for end in np.quantile(found, (0.025, 0.975)))
    return low, high, (high - low) / 2


def gpu_hours(sizes: Sequence[float]) -> float:
    """Returns the GPU-hours of one seed: each size trained once as softmax and once as V1."""
    plan = plan_cluster(
        CLUSTER, [f"{attention}:{size / 1e9:g}B" for size in sizes for attention in ("softmax", "diff_v1")],
        tokens=TOKENS, step_tokens=STEP_TOKENS, context=2048,
    )  # fmt: skip
    assert all(model.best.fits for model in plan.models), "each model fits"
    return sum(model.gpu_hours for model in plan.models)


def read(path: Path) -> dict[Case, dict[str, Any]]:
    """The rows of a file by case."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {Case(row["ladder"], row["seeds"], row["form"], row["noise"]): row for row in rows}


def table(rows: dict[Case, dict[str, Any]]) -> str:
    """The rows as docs/claim.md shows them: ± points of the ratio, by ladder and seeds."""
    head = ["ladder", "seeds", "runs", "GPU-hours", "floor", "power", "floor, half the noise", "power, half the noise"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for ladder, sizes in LADDERS.items():
        for seeds in SEEDS:
            found = [rows[Case(ladder, seeds, form, noise)] for noise in (1.0, 0.5) for form in ("floor", "power")]
            widths = [f"± {100 * row['half_width']:.1f}" for row in found]
            hours = f"{found[0]['gpu_hours']:,.0f}"
            lines.append(f"| {ladder} | {seeds} | {2 * seeds * len(sizes)} | {hours} | {' | '.join(widths)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    write = Writer(arguments.out)
    noise, origin = measured_noise(), provenance("benchmarks.claim", threads=1)
    hours = {ladder: gpu_hours(sizes) for ladder, sizes in LADDERS.items()}
    rows = {}
    for case in design():
        found = ratios(case, noise)
        low, high, half = half_width(found)
        row = {"benchmark": "claim", **asdict(case), "sizes": LADDERS[case.ladder], "tokens": TOKENS}
        row |= {"noise_shared": noise.shared * case.noise, "noise_alone": noise.alone * case.noise, "draws": DRAWS}
        row |= {"median": float(np.median(found)), "low": low, "high": high, "half_width": half}
        row |= {"gpu_hours": case.seeds * hours[case.ladder], "gate": GATE}
        write(row | origin)
        rows[case] = row
    print(table(rows))


if __name__ == "__main__":
    main()
