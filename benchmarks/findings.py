"""Every study on the models that ``make study`` trained: one row of JSON for each model and study.

The runs of a ladder of one size are the models. A model that has a row of a study is not measured again, so it may be
deleted, and others trained later or elsewhere; a study that was cut goes on. ``--table`` and ``--charts`` read the
rows: a variant over its seeds, and compared with softmax seed by seed. The tables are the brief ones of
docs/findings.md, the charts have every point.

    python -m benchmarks.findings --runs runs/study --text eltec_eng.txt.xz --out benchmarks/results/findings.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

# Idle threads sleep instead of spinning: spinning ones starve the others wherever the machine is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from benchmarks.rows import Writer, provenance
from diffattn.data.mixture import STAGES
from diffattn.probes.options import (
    IclOptions,
    LongContextOptions,
    LowBitOptions,
    NoiseOptions,
    OutlierOptions,
    RetrievalOptions,
    StandardOptions,
)
from diffattn.probes.run import Runs, compared, evaluate
from diffattn.report.ablation_table import ablation_rows
from diffattn.report.study_chart import study_rows, write_study_png
from diffattn.scaling.ablation import ablation
from diffattn.scaling.arms import ARMS
from diffattn.scaling.ladder import ROWS, read_rows
from diffattn.train.callbacks import read_metrics


class Case(NamedTuple):
    """One row: what it is called, the study, and what it is asked."""

    name: str
    study: str
    options: Any


def cases(context: int) -> list[Case]:
    """What is asked of models that were trained on ``context`` tokens.

    Retrieval has the paper's tasks and, beside them, one number asked for among as many: how much the others distract.
    """
    tasks = ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (6, 2))
    return [
        Case(TRAINING, TRAINING, None),
        Case("noise", "noise", NoiseOptions(length=context)),
        Case("noise_by_head", "noise_by_head", NoiseOptions(length=context, samples=10)),
        Case("retrieval", "retrieval", RetrievalOptions(lengths=(context // 2, context), tasks=tasks, samples=20)),
        Case("icl", "icl", IclOptions()),
        Case("outliers", "outliers", OutlierOptions(context=context)),
        Case("low_bit", "low_bit", LowBitOptions(context=context)),
        Case("long_context", "long_context", LongContextOptions(length=context - 1, samples=32)),
        Case("long_context, 4 times as long", "long_context",
             LongContextOptions(length=4 * context, samples=8, rope_base=40_000.0)),
        Case("standard", "standard", StandardOptions()),
    ]  # fmt: skip


LOSS, TRAINING = "held-out loss", "training loss"
# Beside the rows, where there is one.
ABLATION = "ablation.jsonl"
# What tells a model from others, in its row of the ladder and in those of its studies.
MODEL = ("attention", "seed", "tokens", "learning_rate", "data_digest", "val_loss", "parameters")


def folder_of(runs: Path, row: dict[str, Any]) -> Path | None:
    """Where the model of a ladder's row is; None where it was deleted or trained elsewhere."""
    pattern = f"{row['attention']}-{row['hidden_size']}x{row['num_layers']}-seed{row['seed']}-*/model"
    folders = [folder for folder in runs.glob(pattern) if (folder / "config.json").exists()]
    if len(folders) > 1:
        raise SystemExit(f"findings: {runs / pattern} is {len(folders)} folders; one model of each row is wanted")
    return folders[0] if folders else None


def measured(
    case: Case, model: Path, trained: dict[str, Any], *, text: str, keep: Path, on_progress: Callable[..., None]
) -> dict[str, Any]:
    """The row of one study of one model, of its row in the ladder: the mean of its samples at every point."""
    if case.study == TRAINING:
        result = training_loss(read_metrics(model.parent / "metrics.jsonl"), trained["context"])
    else:
        result = evaluate(case.study, [f"model={model}"], case.options, text=text, keep=keep, on_progress=on_progress)
    points = [[point["panel"], point["x"], point["by"], point["models"]["model"]["mean"]] for point in result["points"]]
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return rounded(
        {"name": case.name, "model": _facts(trained), "study": case.study, "asked": _asked(case), "points": points}
        | {"axes": result["axes"]}
        | provenance("benchmarks.findings", **gpu)
    )


def training_loss(metrics: list[dict[str, Any]], context: int) -> dict[str, Any]:
    """The mean loss of each stage of the mixture, in the form of a study of one model."""
    losses = [row["loss"] for row in metrics if "loss" in row]
    points, start = [], 0
    for stage in STAGES:
        stop = round(stage.until * len(losses))
        mean = math.fsum(losses[start:stop]) / (stop - start)
        points.append({"panel": TRAINING, "x": stage.piece or context, "by": None, "models": {"model": {"mean": mean}}})
        start = stop
    axes = {"x": "tokens of a piece", "y": "nats per token", "by": "", "logarithmic": True}
    return {"points": points, "axes": axes}


def together(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The studies of all models: for each what ``evaluate`` gives, variants over their seeds, softmax first.

    The first is the held-out loss, which every row has.
    """
    models = {json.dumps(row["model"]): row["model"] for row in rows}.values()
    axes = {"x": "training tokens", "y": "nats per token", "by": "", "logarithmic": False}
    losses = [
        {"name": LOSS, "study": LOSS, "axes": axes, "model": model}
        | {"points": [[LOSS, model["tokens"], None, model["val_loss"]]]}
        for model in models
    ]
    studies = []
    for name in dict.fromkeys(row["name"] for row in [*losses, *rows]):
        mine = [row for row in [*losses, *rows] if row["name"] == name]
        mine.sort(key=lambda row: (list(ARMS).index(row["model"]["attention"]), row["model"]["seed"]))
        found: dict[str, Runs] = {}
        for row in mine:
            runs = found.setdefault(row["model"]["attention"], {})
            for panel, x, by, mean in row["points"]:
                runs.setdefault((panel, x, by), []).append([mean])
        seeds = {kind: [row["model"]["seed"] for row in mine if row["model"]["attention"] == kind] for kind in found}
        points = compared(found)
        studies.append({key: mine[0][key] for key in ("name", "study", "axes")} | {"models": seeds, "points": points})
    return studies


def brief(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with fewer points, for tables: one place for many, or what is to be read off them."""
    return [row | _BRIEF.get(row["study"], lambda row: {})(row) for row in rows]


def _over_depths(row: dict[str, Any]) -> dict[str, Any]:
    """The mean over depths; where there are lengths, of the tasks at the longest, and behind them the mean of all."""
    places = list(dict.fromkeys(by for _, _, by, _ in row["points"]))
    points = []
    for place in places:
        found: dict[str, list[float]] = {}
        for panel, _, by, mean in row["points"]:
            if by == place:
                found.setdefault(panel, []).append(mean)
        if place is not None:
            every = {"all of these": [mean for means in found.values() for mean in means]}
            found = found | every if place == places[-1] else every
        points += [[panel, place or 0, None, math.fsum(each) / len(each)] for panel, each in found.items()]
    return {"points": points, "axes": row["axes"] | {"x": row["axes"]["by"], "by": ""}}


def _answering_heads(row: dict[str, Any]) -> dict[str, Any]:
    """The largest share of the answer in any head, and how many heads have a tenth; not of map_diff, whose shares have
    no bounds where a head's maps nearly cancel."""
    shares: dict[str, list[float]] = {}
    for panel, _, _, mean in row["points"]:
        if panel.endswith("answer"):
            shares.setdefault(panel.removesuffix("answer").removesuffix(": "), []).append(mean)
    # What a model with one map uses is that map.
    maps = {name or "map_pos": each for name, each in shares.items() if name or len(shares) == 1}
    points = [[f"largest share, {name}", 0, None, max(each)] for name, each in maps.items()]
    points += [[f"heads above 0.1, {name}", 0, None, sum(one > 0.1 for one in each)] for name, each in maps.items()]
    return {"points": points, "axes": row["axes"] | {"by": ""}}


def _above_16_bits(row: dict[str, Any]) -> dict[str, Any]:
    """What fewer bits change, in thousandths."""
    at_16 = {panel: mean for panel, bits, _, mean in row["points"] if bits == 16}
    return {
        "points": [
            [f"change of {panel.removesuffix(', nats per token')}, in 0.001", bits, by, 1000 * (mean - at_16[panel])]
            if bits < 16
            else [panel, bits, by, mean]
            for panel, bits, by, mean in row["points"]
        ]
    }


def _settled(row: dict[str, Any]) -> dict[str, Any]:
    """Positions up to which a mean has tokens enough to tell models apart."""
    return {"points": [point for point in row["points"] if point[1] >= 64]}


_BRIEF: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "retrieval": _over_depths,
    "noise": _over_depths,
    "noise_by_head": _answering_heads,
    "low_bit": _above_16_bits,
    "long_context": _settled,
}


def tables(rows: list[dict[str, Any]], ablated: list[dict[str, Any]]) -> dict[str, str]:
    """The tables of docs/findings.md in Markdown, by name: of the studies' rows, and of those of the ablation."""
    found = {study["name"]: study_rows(study) for study in together(brief(rows))}
    if ablated:
        found["ablation"] = ablation_rows(ablation(ablated))
    return {name: _markdown(lines) for name, lines in found.items()}


def _markdown(lines: list[list[str]]) -> str:
    """A table, without the place of points where it is one for all."""
    if len({line[1] for line in lines[1:]}) == 1:
        lines = [[line[0], *line[2:]] for line in lines]
    header, *rows = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def _facts(trained: dict[str, Any]) -> dict[str, Any]:
    return rounded({key: trained[key] for key in MODEL})


def _asked(case: Case) -> Any:
    return None if case.options is None else json.loads(json.dumps(asdict(case.options)))


def rounded(value: Any) -> Any:
    """Numbers to six digits, so that rows stay small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the ladder")
    parser.add_argument("--text", default="sotu", help="what the models were trained on")
    parser.add_argument("--out", type=Path, help="file of the rows, to which is added")
    parser.add_argument("--charts", type=Path, help="folder for one PNG a row")
    parser.add_argument("--only", nargs="+", help="names of cases to measure, or to draw")
    parser.add_argument(
        "--table",
        action="store_true",
        help="print all rows of --out, and of ablation.jsonl beside it, as tables; measure nothing",
    )
    options = parser.parse_args()
    known = [json.loads(line) for line in _lines(options.out)]
    ladder = [] if options.table else read_rows(options.runs / ROWS)
    if not ladder and not options.table:
        raise SystemExit(f"findings: {options.runs / ROWS} has no rows; wanted those of `make study`: train first")
    write = Writer(options.out, keep=True)
    for trained in ladder:
        for case in cases(int(trained["context"])):
            wanted = {"name": case.name, "model": _facts(trained), "asked": _asked(case)}
            if options.only is not None and case.name not in options.only:
                continue
            if any(all(row[key] == value for key, value in wanted.items()) for row in known):
                continue
            who = f"{trained['attention']}, seed {trained['seed']}"
            model = folder_of(options.runs, trained)
            if model is None:
                print(f"{case.name}: the model of {who} is not in {options.runs}; not measured", file=sys.stderr)
                continue
            row = measured(
                case, model, trained, text=options.text, keep=options.runs / "studies",
                on_progress=lambda _, done, all_, case=case, who=who: print(
                    f"{case.name}: {who}, {done} of {all_}", end="\r", file=sys.stderr
                ),
            )  # fmt: skip
            write(row)
            known.append(row)
    if options.table:
        ablated = [] if options.out is None else read_rows(options.out.with_name(ABLATION))
        for name, table in tables(known, ablated).items():
            print(f"## {name}\n\n{table}\n")
    if options.charts is not None:
        options.charts.mkdir(parents=True, exist_ok=True)
        for study in together(known):
            if options.only is None or study["name"] in options.only:
                name = study["name"].replace(", ", "-").replace(" ", "-")
                write_study_png(study, options.charts / f"{name}.png")


def _lines(path: Path | None) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []


if __name__ == "__main__":
    main()
