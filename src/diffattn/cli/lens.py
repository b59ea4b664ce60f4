"""``diffattn lens``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro


def lens(
    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    *,
    text: str,
    html: Path = Path("lens.html"),
    png: Path | None = None,
    layer: int = 0,
    head: int = 0,
    layers: tuple[int, ...] | None = None,
    answer: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json: bool = False,
) -> Callable[[], int]:
    """Write a page on which one sees a model's attention maps, both halves of them and what is left.

    Args:
        models: A checkpoint folder, or two to be seen beside each other.
        text: What the model reads, up to 2048 tokens.
        html: Where to write the page.
        png: Where to write the maps of --layer and --head as a picture.
        layer: Layer of the picture, from 0.
        head: Output head of the picture, from 0.
        layers: Layers that the page holds, from 0. Default: all.
        answer: A part of the text; what later tokens attend to beside it counts as noise.
        dtype: Of the weights; auto is the file's.
        device: Where to run.
        json: Print what the page holds on stdout, as one object.
    """

    def call() -> int:
        from diffattn.cli.console import Console, print_json
        from diffattn.files import writable_folder, write_text
        from diffattn.report.lens_page import render_lens, write_lens_pngs
        from diffattn.study.lens import lens as read

        for target in (html, png):
            if target is not None:
                writable_folder(target.parent)
        with Console("lens", Path(), resume=False, kept="nothing") as console:
            result = read(
                models, text, layers=layers, answer=answer, picture=None if png is None else (layer, head),
                dtype=dtype, device=device, command=console.command,
            )  # fmt: skip
        if png is not None:
            write_lens_pngs(result, png)
        write_text(html, render_lens(result))
        console.note(f"{html} shows {len(result['tokens'])} tokens; open it in a browser")
        if json:
            print_json(result)
        return 0

    return call
