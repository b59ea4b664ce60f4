"""The verbs of ``diffattn eval``: a verb for each study, ours and those of plug-ins."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from diffattn.cli.options import WIDTH
from diffattn.probes.options import EvaluateOptions
from diffattn.probes.registry import listing, load_study


def verb_of(study: str) -> Callable[..., int]:
    """Returns the function of ``diffattn eval STUDY``.

    Raises:
        ConfigError: there is no study of this name.
        UnsupportedError: the study is of a plug-in that is broken.
    """
    record = load_study(study)

    def verb(
        models: Annotated[tuple[str, ...], {"value": "MODEL"}],
        options: Any,
        shared: EvaluateOptions,
        *,
        png: Path | None = None,
        json: bool = False,
    ) -> int:
        from diffattn.cli.terminal.console import Console, print_json
        from diffattn.files import check_files

        check_files(png=png)
        with Console(f"eval {study}", Path(), resume=False, kept="rows" if shared.keep else "nothing") as console:
            console.importing()
            from diffattn.probes.run import evaluate
            from diffattn.report.study_chart import study_rows, write_study_png

            result = evaluate(
                study, models, options, shared, command=console.command, on_progress=console.counted,
                on_stage=console, on_note=console.note,
            )  # fmt: skip
        console.rows(study_rows(result.table))
        if png is not None:
            write_study_png(result.table, png)
        if json:
            print_json(result.to_json())
        return 0

    verb.__annotations__["options"] = record.options
    verb.__doc__ = f"""{record.sentence}

    Examples:
        diffattn eval {study} runs/first/model

    Args:
        models: Model folders, of diffattn or any language model of transformers; NAME=FOLDER,FOLDER is one model of
            several seeds.
    """
    return verb


def list_studies() -> int:
    """Prints the name and the sentence of every study, ours and those of plug-ins, in at most 80 columns.

    A plug-in that is broken has one line on stderr, and does not keep the others from theirs.
    """
    found, broken = listing()
    column = max(map(len, found)) + 4
    for name, sentence in found.items():
        print(textwrap.fill(sentence, WIDTH, initial_indent=f"  {name}".ljust(column), subsequent_indent=" " * column))
    for error in broken:
        print(f"diffattn: {error}", file=sys.stderr)
    return 0
