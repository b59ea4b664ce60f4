"""The verb ``diffattn serve``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from diffattn.model.options import LoadOptions
from diffattn.serve.options import ServeOptions


def serve(folder: Path, options: ServeOptions, load: LoadOptions) -> int:
    """Serve a model over HTTP with OpenAI's interface.

    Examples:
        diffattn serve runs/first/model --port 8000

    Args:
        folder: Folder of a diffattn model, with its tokenizer.
    """
    from diffattn.cli.terminal.board import Board

    with Board(keep=False) as board:
        board.importing()
        from diffattn.serve.engines import serve as serve_folder

        def note(line: str) -> None:
            # What a person should know while it serves stands alone; nothing changes behind it.
            board.close()
            print(f"diffattn: {line}", file=sys.stderr, flush=True)

        chosen = vars(options) | vars(load)
        if options.api_key is None:
            chosen["api_key"] = os.environ.get("DIFFATTN_API_KEY")
        serve_folder(folder, **chosen, on_note=note, on_stage=board)
    return 0
