"""``diffattn scale run`` and ``diffattn scale fit``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro


def scale_run(
    *,
    sizes: tuple[str, ...] = ("200k", "550k", "1.2M", "1.9M", "4.2M"),
    tokens: str = "8M",
    variants: tuple[str, ...] = ("softmax", "diff_v1", "diff_v2"),
    seeds: int = 3,
    text: str = "sotu",
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
    """Train a ladder of pairs, one row of JSON a run; what has a row in --out is skipped, so call it again to go on.

    Several processes may work on one --out: each takes runs that no other has.

    Args:
        sizes: Non-embedding parameters of the softmax models; depth and width follow a rule (docs/scaling.md).
        tokens: Training tokens of every run.
        variants: What to train at every size: softmax, diff_v1, diff_v2, gated, or one of them with a change, such as
            diff_v1+no_norm (docs/studies.md).
        seeds: Pairs at every size.
        text: A file, a folder, or a data set's id; sotu is 12 MB of public speeches that are installed with diffattn.
        vocab_size: Tokens of the tokenizer that is trained on the text.
        context: Tokens per block.
        needles: Share of the training tokens that repeat or ask for magic numbers of cities hidden in text. Blocks are
            then cut into pieces, of 16 tokens at first and of the whole context at last.
        match: parameters: V2's feed-forward width is narrowed until the totals match. shape: it has more parameters.
        batch_size: Blocks per step.
        learning_rate: Peak of the schedule at every size. Default: 4e-3 (N / 1M)^(-1/3), N without the embedding.
        device: Where to train.
        dtype: Of the products; bfloat16 is autocast over float32 weights.
        out: Folder of rows.jsonl and of the runs.
        json: Print the rows on stdout, as one object.
    """

    def call() -> int:
        from diffattn.cli.console import Console, print_json
        from diffattn.study.ladder import Ladder, run_ladder

        ladder = Ladder(
            sizes=sizes, tokens=tokens, variants=variants, seeds=seeds, text=text, vocab_size=vocab_size,
            context=context, needles=needles, match=match, batch_size=batch_size, learning_rate=learning_rate,
            device=device, dtype=dtype,
        )  # fmt: skip
        with Console("scale run", out, resume=True, kept="rows") as console:
            rows = run_ladder(ladder, out=out, command=console.command, on_progress=console.ladder)
        console.note(f"{len(rows)} rows: {out / 'rows.jsonl'}; fit them with: diffattn scale fit {out / 'rows.jsonl'}")
        if json:
            print_json({"rows": rows})
        return 0

    return call


def scale_fit(
    points: Annotated[str, tyro.conf.Positional],
    *,
    size: Literal["parameters", "non_embedding_parameters"] = "parameters",
    at: tuple[str, ...] = (),
    bootstrap: int = 1000,
    seed: int = 0,
    png: Path | None = None,
    html: Path | None = None,
    json: bool = False,
) -> Callable[[], int]:
    """Fit scaling laws to losses and say which softmax model each DIFF model equals, with intervals.

    Args:
        points: A .csv or .jsonl with attention, val_loss, and parameters or tokens or both, optionally seed; or
            figure3a, the points of the paper.
        size: The column that the sizes are in.
        at: Sizes (tokens, where these vary alone) to compare, such as 6.8B. Default: smallest, middle and largest.
        bootstrap: Draws behind the intervals.
        seed: Of the draws.
        png: Write the chart here.
        html: Write one page with chart and tables here.
        json: Print the result on stdout.
    """

    def call() -> int:
        from diffattn.cli.console import Console, print_json
        from diffattn.files import writable_folder, write_text
        from diffattn.plan.rule import parse_count
        from diffattn.report.scaling_page import equivalence_rows, number_rows, render_scaling, write_scaling_png
        from diffattn.study.scaling import fit_scaling

        console = Console("scale fit", Path(), resume=False)
        sizes = [parse_count(count) for count in at]
        result = fit_scaling(points, size=size, at=sizes, bootstrap=bootstrap, seed=seed, command=console.command)
        console.rows(equivalence_rows(result))
        console.rows(number_rows(result))
        for target in (png, html):
            if target is not None:
                writable_folder(target.parent)
        if png is not None:
            write_scaling_png(result, png)
        if html is not None:
            write_text(html, render_scaling(result))
        if json:
            print_json(result)
        return 0

    return call
