"""``diffattn eval ablation``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal


def ablation(
    *,
    size: str = "550k",
    tokens: str = "8M",
    arms: tuple[str, ...] = (),
    seeds: int = 3,
    text: str = "sotu",
    vocab_size: int = 1024,
    context: int = 256,
    batch_size: int = 8,
    learning_rate: float | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    out: Path = Path("runs/ablation"),
    png: Path | None = None,
    json: bool = False,
) -> Callable[[], int]:
    """Train softmax, V1, V2 and gated attention, each with one thing changed at a time, and print one table.

    What has a row in --out is skipped, so call it again to go on; several processes may share one --out.

    Args:
        size: Non-embedding parameters of the softmax model; depth and width follow a rule (docs/scaling.md).
        tokens: Training tokens of every run.
        arms: What to train, such as softmax diff_v1 diff_v1+no_norm. Default: all of them.
        seeds: Pairs of each.
        text: A file, a folder, or a data set's id; sotu is 12 MB of public speeches that are installed with diffattn.
        vocab_size: Tokens of the tokenizer that is trained on the text.
        context: Tokens per block.
        batch_size: Blocks per step.
        learning_rate: Peak of the schedule. Default: that of scale run.
        device: Where to train.
        dtype: Of the products; bfloat16 is autocast over float32 weights.
        out: Folder of rows.jsonl and of the runs.
        png: Where to write the chart.
        json: Print the result on stdout, as one object.
    """

    def call() -> int:
        from diffattn.cli.console import Console, print_json
        from diffattn.files import writable_folder
        from diffattn.report.ablation_table import ablation_rows, write_ablation_png
        from diffattn.study.ablation import ablation as of_rows
        from diffattn.study.arms import ARMS
        from diffattn.study.ladder import Ladder, run_ladder

        ladder = Ladder(
            sizes=(size,), tokens=tokens, variants=arms or tuple(ARMS), seeds=seeds, text=text, vocab_size=vocab_size,
            context=context, batch_size=batch_size, learning_rate=learning_rate, device=device, dtype=dtype,
        )  # fmt: skip
        if png is not None:
            writable_folder(png.parent)
        with Console("eval ablation", out, resume=True, kept="rows") as console:
            rows = run_ladder(ladder, out=out, command=console.command, on_progress=console.ladder)
        result = of_rows(rows, command=console.command)
        console.rows(ablation_rows(result))
        if png is not None:
            write_ablation_png(result, png)
        if json:
            print_json(result)
        return 0

    return call
