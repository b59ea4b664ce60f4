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

    Nothing is trained and nothing is loaded, so it answers in a second.

    Examples:
        diffattn plan --model diff_v1:6.8B --against softmax:11B --context 4096
        diffattn plan --model diff_v1:1.4B --against softmax:1.4B --fits 8GiB

    Args:
        model: The model, as KIND:SIZE. KIND: softmax, diff_v1, diff_v2 or gated. SIZE: a preset such as 6.8B, a count
            such as 11B, a .toml file or a model's folder. A folder alone brings its own kind, a size alone is
            diff_v1's. Default: diff_v1:6.8B.
        against: A second model to compare it with, written in the same way; a size alone is softmax's. Default: none,
            or softmax:11B where no model is given either.
        context: Tokens that a model reads at once; 4k means 4096.
        batch: Texts that are computed together.
        machine: H100 SXM, A100 80GB, RTX 4090, RTX 3060 12GB, Apple M2, DDR5 desktop, Raspberry Pi 5 (part of a name
            is enough, such as "rtx 3060"), or a .json file.
        precision: Number formats: fp32, autocast, bf16 or mixed (bf16 with a second copy of the weights in fp32).
        weights_dtype: Format of the weights: fp32, bf16, fp16, int8, int4. Default: as --precision says.
        gradients_dtype: Format of the gradients: fp32, bf16, fp16. Default: as --precision says.
        optimizer_dtype: Format of what AdamW keeps of each weight. Default: as --precision says.
        activations_dtype: Format of the results of layers. Default: as --precision says.
        cache_dtype: Format of the keys and values that are kept; int8 and int4 too. Default: as --precision says.
        master_dtype: Format of the second copy of the weights. Default: as --precision says.
        backend: Way to compute attention: definition, fused, standard, two_calls, four_calls or materialised
            (docs/plan.md).
        checkpointing: Training saves memory by computing each layer twice.
        fsdp: GPUs that share weights, gradients and the optimizer's numbers.
        tp: GPUs that share the heads and the feed-forward network of each layer.
        sweep: Answer for a range as well: context=1k:128k or batch=1:64.
        fits: Memory with its unit, such as 8GiB or 24GB: say the largest shapes, contexts and batches that it holds.
        measure: Also build the first model here and put what is measured beside what is predicted.
        json: Print the answer as JSON on stdout.
        html: File to write a web page into, with the same numbers and sliders.
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
