"""Every study on the models of a ladder: what is asked, one row for each model and study, and the tables of the rows.

A variant is read over its seeds, and compared with softmax seed by seed. The tables are the brief ones of
docs/findings.md. ``benchmarks/findings.py`` is the command.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from diffattn.data.mixture import STAGES
from diffattn.errors import CheckpointError
from diffattn.probes.harness import StandardOptions
from diffattn.probes.icl import IclOptions
from diffattn.probes.long_context import LongContextOptions
from diffattn.probes.low_bit import LowBitOptions
from diffattn.probes.noise import NoiseOptions
from diffattn.probes.options import EvaluateOptions, StudyOptions
from diffattn.probes.outliers import OutlierOptions
from diffattn.probes.retrieval import RetrievalOptions
from diffattn.probes.run import Runs, compared, evaluate
from diffattn.report.ablation_table import ablation_rows
from diffattn.report.study_chart import study_rows
from diffattn.results.finding import Finding, MeanPoint, SeedsStudy, TrainedModel
from diffattn.results.ladder import LadderRow
from diffattn.results.study import Axes
from diffattn.scaling.ablation import ablation
from diffattn.scaling.arms import ARMS
from diffattn.train.callbacks import MetricsRow, read_metrics

LOSS, TRAINING = "held-out loss", "training loss"


class Case(NamedTuple):
    """One thing that is asked of every model: the name of its row, the study, and the options of the study."""

    name: str
    study: str
    options: StudyOptions | None

    @property
    def asked(self) -> dict[str, object] | None:
        """The options as a row has them."""
        return None if self.options is None else json.loads(json.dumps(asdict(self.options)))


def cases(context: int) -> list[Case]:
    """Returns what is asked of models that were trained on ``context`` tokens.

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


def folder_of(runs: Path, row: LadderRow) -> Path | None:
    """Returns the folder of the model of a ladder's row; None where it was deleted or trained elsewhere.

    Raises:
        CheckpointError: several folders fit.
    """
    pattern = f"{row.arm}-{row.hidden_size}x{row.num_layers}-seed{row.seed}-*/model"
    folders = [folder for folder in runs.glob(pattern) if (folder / "config.json").exists()]
    if len(folders) > 1:
        given = f"{runs / pattern} is {len(folders)} folders"
        raise CheckpointError(given, "one model of each row", "move the others away")
    return folders[0] if folders else None


def facts(row: LadderRow) -> TrainedModel:
    """Returns the facts by which findings name the model of a ladder's row."""
    found = {field.name: rounded(getattr(row, field.name)) for field in dataclasses.fields(TrainedModel)}
    return TrainedModel(**found)


def measured(
    case: Case, model: Path, row: LadderRow, *, text: str, keep: Path, on_progress: Callable[[str, int, int], None]
) -> Finding:
    """Returns one study of one model: the mean of its samples at every point.

    Args:
        case: what is asked.
        model: the folder of the model.
        row: the row of the model in the ladder.
        text: the text whose held-out part is read.
        keep: a folder for what is measured, so that a study that is cut goes on.
        on_progress: called with a name, steps done and steps in all.
    """
    if case.study == TRAINING:
        points, axes = training_loss(read_metrics(model.parent / "metrics.jsonl"), row.context)
    else:
        shared = EvaluateOptions(text=text, keep=keep)
        result = evaluate(case.study, [f"model={model}"], case.options, shared, on_progress=on_progress)
        points = [MeanPoint(point.panel, point.x, point.by, point.models["model"].mean) for point in result.points]
        axes = result.axes
    points = [MeanPoint(*rounded(dataclasses.astuple(point))) for point in points]
    asked = rounded(case.asked)
    return Finding(name=case.name, model=facts(row), study=case.study, asked=asked, points=points, axes=axes)


def training_loss(metrics: Sequence[MetricsRow], context: int) -> tuple[list[MeanPoint], Axes]:
    """Returns the mean training loss of each stage of the mixture, by the length of the stage's pieces."""
    losses = [row["loss"] for row in metrics if "loss" in row]
    points, start = [], 0
    for stage in STAGES:
        stop = round(stage.until * len(losses))
        mean = math.fsum(losses[start:stop]) / (stop - start)
        points.append(MeanPoint(TRAINING, stage.piece or context, None, mean))
        start = stop
    return points, Axes(x="tokens of a piece", y="nats per token", by="", logarithmic=True)


def together(rows: Sequence[Finding]) -> list[SeedsStudy]:
    """Returns the studies of all models, each variant over its seeds, softmax first.

    The first is the held-out loss, which every row has.
    """
    models = {json.dumps(row.model.to_json()): row.model for row in rows}.values()
    axes = Axes(x="training tokens", y="nats per token", by="", logarithmic=False)
    losses = [
        Finding(
            name=LOSS,
            model=model,
            study=LOSS,
            asked=None,
            points=[MeanPoint(LOSS, model.tokens, None, model.val_loss)],
            axes=axes,
        )
        for model in models
    ]
    studies = []
    every = [*losses, *rows]
    for name in dict.fromkeys(row.name for row in every):
        mine = [row for row in every if row.name == name]
        mine.sort(key=lambda row: (list(ARMS).index(row.model.arm), row.model.seed))
        found: dict[str, Runs] = {}
        seeds: dict[str, list[int]] = {}
        for row in mine:
            seeds.setdefault(row.model.arm, []).append(row.model.seed)
            runs = found.setdefault(row.model.arm, {})
            for point in row.points:
                runs.setdefault((point.panel, point.x, point.by), []).append([point.mean])
        first = mine[0]
        studies.append(SeedsStudy(name=name, seeds=seeds, study=first.study, points=compared(found), axes=first.axes))
    return studies


def brief(rows: Sequence[Finding]) -> list[Finding]:
    """Returns the rows with fewer points, for tables: one setting for many, or what is to be read off them."""
    return [_BRIEF[row.study](row) if row.study in _BRIEF else row for row in rows]


def _over_depths(row: Finding) -> Finding:
    """Returns the mean over depths; where there are lengths, of the tasks at the longest, and the mean of all."""
    lengths = list(dict.fromkeys(point.by for point in row.points))
    points = []
    for length in lengths:
        found: dict[str, list[float]] = {}
        for point in row.points:
            if point.by == length:
                found.setdefault(point.panel, []).append(point.mean)
        if length is not None:
            every = {"all of these": [mean for means in found.values() for mean in means]}
            found = found | every if length == lengths[-1] else every
        points += [MeanPoint(panel, length or 0, None, math.fsum(each) / len(each)) for panel, each in found.items()]
    return dataclasses.replace(row, points=points, axes=dataclasses.replace(row.axes, x=row.axes.by, by=""))


def _answering_heads(row: Finding) -> Finding:
    """Returns the largest share of the answer in any head, and how many heads have a tenth.

    map_diff is left out: its shares have no bounds where a head's maps nearly cancel.
    """
    shares: dict[str, list[float]] = {}
    for point in row.points:
        if point.panel.endswith("answer"):
            shares.setdefault(point.panel.removesuffix("answer").removesuffix(": "), []).append(point.mean)
    # A model with one map uses that map.
    maps = {name or "map_pos": each for name, each in shares.items() if name or len(shares) == 1}
    points = [MeanPoint(f"largest share, {name}", 0, None, max(each)) for name, each in maps.items()]
    points += [
        MeanPoint(f"heads above 0.1, {name}", 0, None, sum(one > 0.1 for one in each)) for name, each in maps.items()
    ]
    return dataclasses.replace(row, points=points, axes=dataclasses.replace(row.axes, by=""))


def _above_16_bits(row: Finding) -> Finding:
    """Returns what fewer bits change, in thousandths."""
    at_16 = {point.panel: point.mean for point in row.points if point.x == 16}
    points = [
        point
        if point.x >= 16
        else MeanPoint(
            f"change of {point.panel.removesuffix(', nats per token')}, in 0.001",
            point.x,
            point.by,
            1000 * (point.mean - at_16[point.panel]),
        )
        for point in row.points
    ]
    return dataclasses.replace(row, points=points)


def _settled(row: Finding) -> Finding:
    """Returns the positions up to which a mean has enough tokens to distinguish models."""
    return dataclasses.replace(row, points=[point for point in row.points if point.x >= 64])


_BRIEF: dict[str, Callable[[Finding], Finding]] = {
    "retrieval": _over_depths,
    "noise": _over_depths,
    "noise_by_head": _answering_heads,
    "low_bit": _above_16_bits,
    "long_context": _settled,
}


def tables(rows: Sequence[Finding], ablated: Sequence[LadderRow]) -> dict[str, str]:
    """Returns the tables of docs/findings.md in Markdown, by name: of the studies' rows, and of an ablation's."""
    found = {study.name: study_rows(study.table) for study in together(brief(rows))}
    if ablated:
        found["ablation"] = ablation_rows(ablation(ablated))
    return {name: _markdown(lines) for name, lines in found.items()}


def _markdown(lines: list[list[str]]) -> str:
    """Returns a table, without the column of settings where all rows have the same."""
    if len({line[1] for line in lines[1:]}) == 1:
        lines = [[line[0], *line[2:]] for line in lines]
    header, *rows = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def rounded(value: Any) -> Any:
    """Returns a value with every number in it rounded to six digits, so that rows stay small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value
