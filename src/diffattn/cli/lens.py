"""The verbs ``diffattn lens`` and ``diffattn demo``: pages in which a model is looked at, and in which it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from diffattn.demo.options import DemoOptions
from diffattn.model.options import LoadOptions
from diffattn.probes.options import LensOptions


def lens(
    models: Annotated[tuple[str, ...], {"value": "MODEL"}],
    options: LensOptions,
    load: LoadOptions,
    *,
    html: Path = Path("lens.html"),
    png: Path | None = None,
    layer: int = 0,
    head: int = 0,
    json: bool = False,
) -> int:
    """Write a web page that shows a model's attention maps over a text.

    The page of a differential model shows both maps and what is left of them. Two models are shown beside each other.

    Examples:
        diffattn lens runs/first/model --text "We the people of the United States"

    Args:
        models: One or two model folders.
        html: File to write the page into.
        png: Picture file to write the maps of --layer and --head into.
        layer: Layer of the picture, counted from 0.
        head: Head of the picture, counted from 0.
        json: Print what the page holds as JSON on stdout.
    """
    from diffattn.cli.arguments import command_line
    from diffattn.cli.terminal.board import Board
    from diffattn.cli.terminal.console import print_json
    from diffattn.files import check_files, write_text

    check_files(html=html, png=png)
    with Board(keep=False) as board:
        board.importing()
        from diffattn.probes.lens import lens as read
        from diffattn.probes.lens import names_of
        from diffattn.report.lens_page import lens_pngs, render_lens, write_lens_pngs

        for picture in lens_pngs(names_of(models), png) if png is not None else ():
            check_files(html=html, png=picture)
        seen = read(
            models, **vars(options), picture=None if png is None else (layer, head), **vars(load),
            command=command_line(), on_stage=board,
        )  # fmt: skip
    if png is not None:
        write_lens_pngs(seen, png)
    write_text(html, render_lens(seen))
    board.note(f"{html} shows {len(seen.tokens)} tokens; open it in a browser")
    if json:
        print_json(seen.to_json())
    return 0


def demo(
    models: Annotated[tuple[str, ...], {"value": "MODEL"}],
    options: DemoOptions,
    *,
    out: Annotated[Path, {"value": "FILE"}] = Path("demo.html"),
    json: bool = False,
) -> int:
    """Write a web page in which models run: one file that needs no server and no network.

    Who opens it types a text, watches the models continue it, and sees their attention maps grow. Two models, such as
    a differential one and the softmax model that it replaces, are shown beside each other.

    Examples:
        diffattn demo runs/v2/model runs/softmax/model --out demo.html

    Args:
        models: One or two model folders.
        out: File to write the page into.
    """
    from diffattn.cli.arguments import command_line
    from diffattn.cli.terminal.board import Board
    from diffattn.cli.terminal.console import print_json
    from diffattn.files import check_files, write_bytes
    from diffattn.humanize import size

    check_files(out=out)
    with Board(keep=False) as board:
        board.importing()
        from diffattn.demo.build import build_demo

        done = build_demo(models, **vars(options), command=command_line(), on_stage=board)
    write_bytes(out, done.page)
    board.note(f"{out} is {size(len(done.page))} and holds {' and '.join(model['name'] for model in done.models)}; "
               "open it in a browser")  # fmt: skip
    if json:
        print_json(done.to_json())
    return 0
