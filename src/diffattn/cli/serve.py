"""``diffattn serve``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro


def serve(
    folder: Annotated[Path, tyro.conf.Positional],
    *,
    engine: Literal["auto", "vllm", "transformers"] = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    model_name: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    max_context: int | None = None,
    allow_host: tuple[str, ...] = (),
) -> Callable[[], int]:
    """Serve a model over HTTP with OpenAI's interface.

    Examples:
        diffattn serve runs/first/model --port 8000

    Args:
        folder: Folder of a diffattn model, with its tokenizer.
        engine: Program that runs the model; auto: vllm where it is installed, else transformers.
        host: Address to listen on; 127.0.0.1 is reached from this machine alone.
        port: Port to listen on; 0 takes one that is free.
        api_key: Key that clients must send. Default: DIFFATTN_API_KEY, which other users of the machine do not see.
        model_name: Name that clients ask for. Default: the folder's name.
        dtype: Number format of the weights; auto: as in the file.
        device: Where to run: the processor (cpu) or a GPU (cuda); auto takes the GPU where there is one.
        max_context: Tokens of question and answer together, at most. Default: as many as the model can read.
        allow_host: Names by which clients may call this machine, beside its own.
    """

    def call() -> int:
        from diffattn.cli.terminal.board import Board

        with Board(keep=False) as board:
            board.importing()
            from diffattn.serve.engines import serve as serve_folder

            def note(line: str) -> None:
                # What a person should know while it serves stands alone; nothing changes behind it.
                board.close()
                print(f"diffattn: {line}", file=sys.stderr, flush=True)

            serve_folder(
                folder, engine, host=host, port=port,
                api_key=os.environ.get("DIFFATTN_API_KEY") if api_key is None else api_key,
                model_name=model_name, dtype=dtype, device=device, max_context=max_context, allow_host=allow_host,
                on_note=note, on_stage=board,
            )  # fmt: skip
        return 0

    return call
