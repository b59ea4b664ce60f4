"""The verb ``diffattn compare``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from diffattn.cli.arguments import check_given, given
from diffattn.cli.ranks import console_of_ranks
from diffattn.rank import rank_here
from diffattn.study.options import CompareOptions
from diffattn.train.spread.layout import Layout


def compare(
    options: CompareOptions, layout: Layout, *, out: Path | None = None, resume: bool = False, json: bool = False
) -> int:
    """Train softmax, V1 and V2 models on the same text; say what is gained at what cost.

    Examples:
        diffattn compare
        diffattn compare --text my-folder --seeds 5 --minutes 60

    Args:
        out: Folder to write the runs and the report into. Default: a new one in runs/.
        resume: Go on with the comparison in --out, or with the newest one in runs/.
    """
    from diffattn.cli.terminal.console import print_json

    with console_of_ranks("compare", out, resume, options.device, (options, layout)) as console:
        from diffattn.study.compare import compare as run

        if resume:
            options, layout = _stored(console.folder, given(options), given(layout))
        result = run(
            options,
            layout=layout,
            out=console.folder,
            resume=resume,
            command=console.command,
            on_note=console.note,
            on_stage=console,
            on_progress=lambda attention, seed, step: console.progress(f"{attention} seed {seed}", step),
        )
    console.table(result)
    console.note(f"report: {console.folder / 'report.html'}")
    if json:
        print_json(result.to_json())
    return 0


def _stored(folder: Path, others: Mapping[str, object], spread: Mapping[str, object]) -> tuple[CompareOptions, Layout]:
    """Returns the options of a comparison, once what was given beside ``--resume`` is known to be the same; the layout
    is that which is given."""
    from diffattn.plan.named_model import load_shape
    from diffattn.study.comparison import Stored
    from diffattn.train.own import same_shape, same_text

    stored = Stored.read(folder)
    has = dataclasses.asdict(stored.options)
    text, shape = others.get("text"), others.get("shape")
    if isinstance(text, tuple) and same_text(text, stored.options.text, stored.data_digest, stored.options.text_column):
        # It may have moved.
        has["text"] = text
    if shape and same_shape(load_shape(str(shape)).grouped(stored.options.group), stored.shape):
        has["shape"] = shape
    # It changes no number, so it may change.
    has["track"] = others.get("track", has["track"])
    check_given(folder, others, has, text_column="field")
    layout = dataclasses.replace(stored.layout.going_on(rank_here().world), **spread)  # type: ignore[arg-type]
    return dataclasses.replace(stored.options, text=has["text"], track=has["track"]), layout
