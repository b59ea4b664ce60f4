"""The verb ``diffattn plan``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffattn.errors import ConfigError
from diffattn.plan.cluster.options import ClusterOptions
from diffattn.plan.setting import PlanOptions, Setting
from diffattn.rank import rank_here

if TYPE_CHECKING:
    from diffattn.plan.named_model import Model
    from diffattn.study.plan_check import MeasuredRow


def plan(
    options: PlanOptions,
    cluster: ClusterOptions,
    *,
    measure: bool = False,
    json: bool = False,
    html: Path | None = None,
) -> int:
    """Say what one model or two need before they are built: memory, time, disk.

    Nothing is trained and nothing is loaded, so the answer comes in a second. docs/plan.md explains each number.

    Examples:
        diffattn plan --model diff_v1:6.8B --against softmax:11B --context 4096
        diffattn plan --model diff_v1:1.4B --against softmax:1.4B --fits 8GiB
        diffattn plan --model motif-2.6B --against llama-3.2-3B --context 32k
        diffattn plan --cluster 64xH100 --tokens 1T

    Args:
        measure: Also build the first model on this machine and print measured numbers beside the predicted ones.
            Started by torchrun, it measures what one of the processes holds in training.
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

    if cluster.cluster is not None:
        return _on_cluster(options, cluster, json=json, others={"--measure": measure, "--html": html is not None})
    check_files(html=html)
    if measure and options.ranks is None:
        options = replace(options, ranks=max(rank_here().world, options.tp))
    setting = options.setting()
    model, against = (*named(options.model, options.against, options.group), None)[:2]
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
    if not rank_here().is_first:
        return 0
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


def _on_cluster(options: PlanOptions, cluster: ClusterOptions, *, json: bool, others: dict[str, bool]) -> int:
    """Plans on a cluster, prints that, and returns the exit status."""
    from diffattn.cli.arguments import given
    from diffattn.cli.terminal.console import print_json
    from diffattn.cli.terminal.screen import say
    from diffattn.cli.terminal.table import show
    from diffattn.plan.cluster import answer, text
    from diffattn.plan.cluster.links import parse_cluster
    from diffattn.plan.named_model import named

    assert cluster.cluster is not None
    told = given(options)
    others |= {f"--{name}": name in told for name in ("machine", "batch", "ranks", "sweep", "fits")}
    if wrong := [name for name, there in others.items() if there]:
        raise ConfigError(
            f"{', '.join(wrong)} beside --cluster", "one of the two", f"leave out {wrong[0]} or --cluster"
        )
    machines = parse_cluster(
        cluster.cluster, per_host=options.per_host, inside=cluster.link_inside, between=cluster.link_between
    )
    fixed = {"shard", "tp", "checkpointing"} & set(told)
    setting = replace(options, ranks=machines.count, batch=str(machines.count), machine=machines.machine.name).setting()
    models: Sequence[str | Model] = answer.MODELS
    if options.model or options.against:
        models = named(options.model, options.against, options.group)
    result = answer.plan_cluster(
        machines, models, setting, tokens=cluster.tokens, step_tokens=cluster.step_tokens,
        utilization=cluster.utilization, context=setting.context if "context" in told else None, fixed=bool(fixed),
    )  # fmt: skip
    say(*text.lines(result))
    show(text.table(result))
    for model in result.models:
        say("", f"Layouts of {model.name}, the best first:")
        show(text.layout_table(model))
    if json:
        print_json(result.to_json())
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
    from diffattn.plan.blocks.block import BlockShape

    if isinstance(model.built, BlockShape):
        raise ConfigError(f"--measure of {model.name}", "a model that diffattn itself can build", "leave out --measure")
    with Board(keep=False) as board:
        board.importing()
        if setting.ranks > 1 or rank_here().world > 1:
            from diffattn.study.rank_check import measure_ranks

            return measure_ranks(model.built.plain(), model.attention, setting, on_stage=board)
        from diffattn.study.plan_check import measure_plan

        return measure_plan(model.built.plain(), model.attention, setting, on_stage=board)
