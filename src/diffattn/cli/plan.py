"""``diffattn plan``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffattn.plan.setting import DEFAULT_SETTING, Setting

if TYPE_CHECKING:
    from diffattn.plan.named_model import Model
    from diffattn.study.plan_check import MeasuredRow


def plan(
    *,
    model: str | None = None,
    against: str | None = None,
    context: str = str(DEFAULT_SETTING.context),
    batch: str = str(DEFAULT_SETTING.batch),
    machine: str = DEFAULT_SETTING.machine.name if DEFAULT_SETTING.machine else "",
    precision: str = DEFAULT_SETTING.precision.name or "",
    weights_dtype: str | None = None,
    gradients_dtype: str | None = None,
    optimizer_dtype: str | None = None,
    activations_dtype: str | None = None,
    cache_dtype: str | None = None,
    master_dtype: str | None = None,
    backend: str = DEFAULT_SETTING.backend,
    checkpointing: bool = DEFAULT_SETTING.checkpointing,
    fsdp: int = DEFAULT_SETTING.fsdp,
    tp: int = DEFAULT_SETTING.tp,
    sweep: str | None = None,
    fits: str | None = None,
    measure: bool = False,
    json: bool = False,
    html: Path | None = None,
) -> Callable[[], int]:
    """Say what one model or two need before they are built: memory, time, disk.

    Nothing is trained and nothing is loaded, so the answer comes in a second. docs/plan.md explains each number.

    Examples:
        diffattn plan --model diff_v1:6.8B --against softmax:11B --context 4096
        diffattn plan --model diff_v1:1.4B --against softmax:1.4B --fits 8GiB

    Args:
        model: The model, as VARIANT:SIZE. VARIANT is softmax, diff_v1, diff_v2 or gated. SIZE is a preset such as 6.8B,
            a count such as 11B, a .toml file or a model's folder. A folder alone brings its own variant; a size alone
            means diff_v1. Default: diff_v1:6.8B.
        against: A second model to compare it with, written in the same way; a size alone means softmax. Default: none,
            or softmax:11B if no model is given either.
        context: Number of tokens in one sequence; 4k means 4096.
        batch: Number of sequences that are computed together.
        machine: H100 SXM, A100 80GB, RTX 4090, RTX 3060 12GB, Apple M2, DDR5 desktop or Raspberry Pi 5 (a part of the
            name is enough, such as "rtx 3060"), or a .json file.
        precision: Number formats of all parts: float32, autocast (float32 weights, bfloat16 products), bfloat16 or
            mixed (bfloat16 with a float32 copy of the weights). The short names fp32 and bf16 work too.
        weights_dtype: Format of the weights: float32, bfloat16, float16, int8 or int4. Default: as --precision says.
        gradients_dtype: Format of the gradients: float32, bfloat16 or float16. Default: as --precision says.
        optimizer_dtype: Format of the two numbers that AdamW keeps for each weight. Default: as --precision says.
        activations_dtype: Format of the results of layers. Default: as --precision says.
        cache_dtype: Format of the keys and values in the cache; int8 and int4 work too. Default: as --precision says.
        master_dtype: Format of the second copy of the weights. Default: as --precision says.
        backend: Way to compute attention: standard, fused, definition or materialised. The planner also knows two_calls
            and four_calls, two ways from the literature to compute V1 that diffattn itself does not have.
        checkpointing: Save memory in training by computing each layer twice.
        fsdp: Number of GPUs that share the weights, the gradients and the optimizer's numbers.
        tp: Number of GPUs that share the heads and the feed-forward network of each layer.
        sweep: Answer for several values as well: context=1k:128k or batch=1:64.
        fits: An amount of memory, such as 8GiB or 24GB: say the largest models, contexts and batches that it holds.
        measure: Also build the first model on this machine and print measured numbers beside the predicted ones.
        json: Print the answer as JSON on stdout.
        html: File to write a web page into, with the same numbers and with sliders.
    """

    def call() -> int:
        from diffattn.cli.arguments import command_line
        from diffattn.cli.terminal.console import print_json
        from diffattn.cli.terminal.screen import say
        from diffattn.cli.terminal.table import show
        from diffattn.files import check_files, write_text
        from diffattn.humanize import size
        from diffattn.plan import answer, search, text
        from diffattn.plan.named_model import named

        check_files(html=html)
        setting = Setting(
            context=context, batch=batch, machine=machine, backend=backend, checkpointing=checkpointing,
            precision=answer.precision_of(
                precision, weights=weights_dtype, gradients=gradients_dtype, optimizer=optimizer_dtype,
                activations=activations_dtype, cache=cache_dtype, master=master_dtype,
            ),
            fsdp=fsdp, tp=tp,
        )  # fmt: skip
        result = answer.plan(model, against, setting, command=command_line())
        printed = result.to_json()
        shown = [("", text.table(result)), ("", text.backend_table(result.backends))]
        if sweep is not None:
            rows = search.sweep(sweep, model, against, setting)
            printed["sweep"] = [row.to_json() for row in rows]
            shown.append(("", text.sweep_table(rows)))
        if fits is not None:
            found = search.fits(fits, model, setting)
            printed["fits"] = [row.to_json() for row in found]
            limit = found[0].limit
            shown.append((f"What {size(limit)} ({limit:,} bytes) hold at most:", text.fits_table(found)))
        if measure:
            measured = _measured(named(model, against)[0], setting)
            printed["measured"] = [row.to_json() for row in measured]
            shown.append(("", measured_table(measured)))
        if html is not None:
            from diffattn.report.plan_page import render_plan

            write_text(html, render_plan(result))
        say(text.setting_line(setting), *result.notes, *result.sentences)
        for title, lines in shown:
            if title:
                say("", title)
            show(lines)
        if json:
            print_json(printed)
        return 0

    return call


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
