"""``diffattn eval``: the paper's studies, each a verb of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from diffattn.probes.options import OPTIONS

DESCRIPTIONS = {
    "retrieval": "How often a model finds numbers hidden in a long text.",
    "noise": "How much attention goes to a hidden answer, and how much to other text.",
    "noise_by_head": "As eval noise, for every layer and head.",
    "icl": "How well a model learns from examples in its prompt, and from their order.",
    "outliers": "The largest attention logits and hidden states of a model.",
    "low_bit": "The loss where attention logits have 16, 8, 6 or 4 bits.",
    "standard": "Tasks of the program lm-eval; two of them need no network.",
    "long_context": "The mean loss up to each position of a long text.",
}


def _verb(study: str) -> Callable[..., Callable[[], int]]:
    def verb(
        models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
        *,
        options: Any,
        text: str = "sotu",
        field: str = "text",
        lossy_tokenizer: bool = False,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        keep: Path | None = None,
        png: Path | None = None,
        json: bool = False,
    ) -> Callable[[], int]:
        def call() -> int:
            from diffattn.cli.terminal.console import Console, print_json
            from diffattn.files import check_files

            check_files(png=png)
            with Console(f"eval {study}", Path(), resume=False, kept="nothing" if keep is None else "rows") as console:
                console.importing()
                from diffattn.probes.run import evaluate
                from diffattn.report.study_chart import study_rows, write_study_png

                result = evaluate(
                    study, models, options, text=text, text_column=field, lossy_tokenizer=lossy_tokenizer,
                    dtype=dtype, device=device, keep=keep, command=console.command, on_progress=console.counted,
                    on_stage=console, on_note=console.note,
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

    Examples:
        diffattn eval {study} runs/first/model

    Args:
        models: Model folders, of diffattn or any language model of transformers; NAME=FOLDER,FOLDER is one model of
            several seeds.
        text: What to read: a file, a folder, or a data set's id; only the part that is held out from training is read.
        field: Name of the field that holds the text, where the text is rows of JSON, CSV or Parquet.
        lossy_tokenizer: Use a tokenizer that loses more than 1% of the text.
        dtype: Number format of the weights; auto: as in the file.
        device: Where to run: the processor (cpu) or a GPU (cuda); auto takes the GPU where there is one.
        keep: Folder to keep what is measured, so that a study that was stopped can go on.
        png: Picture file to write the chart into.
        json: Print the result as JSON on stdout.
    """
    return verb


EVAL: dict[str, Callable[..., Callable[[], int]]] = {f"eval {study}": _verb(study) for study in DESCRIPTIONS}
