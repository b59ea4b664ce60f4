"""``diffattn plan``."""

from __future__ import annotations

import json as json_lines
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def plan(
    *,
    model: str = "diff_v1:6.8B",
    against: str = "softmax:11B",
    context: str = "4k",
    batch: str = "1",
    machine: str = "H100 SXM",
    precision: str = "mixed",
    weights_dtype: str | None = None,
    gradients_dtype: str | None = None,
    optimizer_dtype: str | None = None,
    activations_dtype: str | None = None,
    cache_dtype: str | None = None,
    master_dtype: str | None = None,
    backend: str = "standard",
    checkpointing: bool = False,
    fsdp: int = 1,
    tp: int = 1,
    sweep: str | None = None,
    fits: str | None = None,
    measure: bool = False,
    json: bool = False,
    html: Path | None = None,
) -> Callable[[], int]:
    """Say what a DIFF model and a softmax model need before anything is built: memory, FLOPs, seconds, disk.

    Args:
        model: variant:size: softmax, diff_v1, diff_v2 or gated, and a preset such as 6.8B, a .toml file, a checkpoint's
            folder, or a count such as 11B. A checkpoint alone brings its own variant.
        against: The other model, written alike.
        context: Tokens in a sequence; 4k is 4096.
        batch: Sequences.
        machine: H100 SXM, A100 80GB, RTX 4090, RTX 3060 12GB, Apple M2, DDR5 desktop, Raspberry Pi 5, or a .json file.
        precision: fp32, autocast, bf16 or mixed (bf16 with a float32 master copy and optimizer).
        weights_dtype: In place of the precision's: fp32, bf16, fp16, int8 or int4 (integers: inference alone).
        gradients_dtype: In place of the precision's: fp32, bf16 or fp16.
        optimizer_dtype: Of AdamW's two moments, in place of the precision's.
        activations_dtype: In place of the precision's.
        cache_dtype: In place of the precision's; int8 and int4 too.
        master_dtype: Of a second copy of the weights that the optimizer updates.
        backend: definition, fused, standard, two_calls, four_calls or materialised (docs/plan.md).
        checkpointing: Compute each layer again in its backward pass.
        fsdp: Ranks that share weights, gradients and optimizer state.
        tp: Ranks that share heads and the feed-forward network.
        sweep: Rows along one axis: context=1k:128k or batch=1:64.
        fits: Memory such as 8GiB; say the largest shapes, contexts and batches that it holds.
        measure: Build the model here, measure it, and put what is measured beside what is predicted.
        json: Print one JSON object on stdout.
        html: Write one page with the same numbers and sliders here.
    """

    def call() -> int:
        from diffattn.plan import answer, tables
        from diffattn.plan import sweep as along
        from diffattn.plan.named_model import parse_model

        changed = {"weights": weights_dtype, "gradients": gradients_dtype, "optimizer": optimizer_dtype,
                   "activations": activations_dtype, "cache": cache_dtype, "master": master_dtype}  # fmt: skip
        dtypes = answer.precision_of(precision, **changed)
        place: dict[str, Any] = {"context": along.parse_tokens(context), "batch": along.parse_tokens(batch, "batch"),
                                 "precision": dtypes, "backend": backend, "checkpointing": checkpointing}  # fmt: skip
        command = shlex.join(["diffattn", *sys.argv[1:]])
        result = answer.plan(model, against, **place, machine=machine, fsdp=fsdp, tp=tp, command=command)
        shown = [tables.table(result), tables.backend_table(result)]
        if sweep is not None:
            result["sweep"] = along.sweep(sweep, model, against, **place, machine=machine)
            shown.append(along.sweep_table(result["sweep"]))
        if fits is not None:
            result["fits"] = along.fits(fits, model, **place)
            shown.append(along.fits_table(result["fits"]))
        if measure:
            result["measured"] = _measured(parse_model(model), place, precision, changed)
            shown.append(measured_table(result["measured"]))
        if html is not None:
            from diffattn.report.plan_page import render_plan

            _write(html, render_plan(result))
        for rows in shown:
            show(rows)
        print("\n\n".join([*result["sentences"], *result["notes"]]), file=sys.stderr)
        if json:
            json_lines.dump(result, sys.stdout, indent=1, ensure_ascii=False)
            sys.stdout.write("\n")
        return 0

    return call


def show(rows: Sequence[Sequence[str]]) -> None:
    """A table on stderr; the first row is its header."""
    import rich.box
    from rich.table import Table

    from diffattn.cli.screen import screen

    table = Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, title in enumerate(rows[0]):
        words = all(row[place][:1] not in "0123456789–" for row in rows[1:])
        table.add_column(title, justify="left" if words else "right")
    for row in rows[1:]:
        table.add_row(*row)
    screen().print(table, markup=False)


def measured_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What was predicted beside what was measured, as text.

    >>> measured_table([{"what": "cache", "unit": "bytes", "predicted": 100, "measured": 80, "ratio": 1.25}])[1]
    ['cache', 'bytes', '100', '80', '1.250×']
    """
    head = ["what", "unit", "predicted", "measured", "predicted / measured"]
    return [
        head,
        *(
            [row["what"], row.get("unit", ""), _shown(row["predicted"]), _shown(row["measured"]),
             f"{row['ratio']:.3f}×"]
            for row in rows
        ),
    ]  # fmt: skip


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _measured(
    model: Any, place: dict[str, Any], precision: str, changed: dict[str, str | None]
) -> list[dict[str, Any]]:
    from diffattn.errors import ConfigError

    if any(changed.values()):
        raise ConfigError(
            f"--measure given with dtypes of single parts; a precision by name is what can be built; leave out the "
            f"others, as in --precision {precision}"
        )
    from diffattn.study.measured_plan import measure_plan

    return measure_plan(model.built, model.attention, **(place | {"precision": precision}))


def _write(file: Path, text: str) -> None:
    from diffattn.errors import ConfigError

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--html {str(file)!r} given; a file that can be written is wanted; the system says: {error.strerror}"
        ) from error
