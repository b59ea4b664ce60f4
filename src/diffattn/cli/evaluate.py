"""``diffattn eval``: the paper's studies, each a verb of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from diffattn.study.options import OPTIONS

DESCRIPTIONS = {
    "retrieval": "How often the numbers hidden in a long text are copied, by depth and length.",
    "noise": "How much attention goes to a hidden answer and how much to the text around it.",
    "noise_by_head": "The same for every layer and head, over all depths.",
    "icl": "Accuracy against the number of demonstrations in the prompt, and over their orders.",
    "outliers": "The largest magnitudes of attention logits and hidden states.",
    "low_bit": "The loss where attention logits have 16, 8, 6 or 4 bits.",
    "standard": "Tasks of EleutherAI's lm-eval, two of which need no network.",
    "long_context": "The average loss up to each position of a long text.",
}


def _verb(study: str) -> Callable[..., Callable[[], int]]:
    def verb(
        models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
        *,
        options: Any,
        text: str = "sotu",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        keep: Path | None = None,
        png: Path | None = None,
        json: bool = False,
    ) -> Callable[[], int]:
        def call() -> int:
            from diffattn.cli.console import Console, print_json
            from diffattn.files import writable_folder
            from diffattn.report.study_chart import study_rows, write_study_png
            from diffattn.study.evaluation import evaluate

            if png is not None:
                writable_folder(png.parent)
            with Console(f"eval {study}", Path(), resume=False, kept="nothing" if keep is None else "rows") as console:
                result = evaluate(
                    study, models, options, text=text, dtype=dtype, device=device, keep=keep,
                    command=console.command, on_progress=console.counted,
                )  # fmt: skip
            console.rows(study_rows(result))
            if png is not None:
                write_study_png(result, png)
            if json:
                print_json(result)
            return 0

        return call

    verb.__annotations__["options"] = OPTIONS[study]
    verb.__doc__ = f"""{DESCRIPTIONS[study]}

    Args:
        models: Checkpoint folders, ours or any causal model of transformers; NAME=FOLDER,FOLDER for several seeds.
        options: Its own.
        text: A file, a folder, or a data set's id; its held-out documents are read.
        dtype: Of the weights; auto is the file's.
        device: Where to run.
        keep: A folder for what is measured of each run, so that a study that is cut goes on.
        png: Where to write the chart.
        json: Print the result on stdout, as one object.
    """
    return verb


EVAL: dict[str, Callable[..., Callable[[], int]]] = {f"eval {study}": _verb(study) for study in DESCRIPTIONS}
