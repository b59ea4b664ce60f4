"""``diffattn export``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro


def export(
    folder: Annotated[Path, tyro.conf.Positional],
    *,
    onnx: bool = False,
    out: Path | None = None,
    cache: bool = True,
    bits: Literal[8, 4] | None = None,
    block_size: int = 32,
    check: bool = False,
    json: bool = False,
) -> Callable[[], int]:
    """Write a model in the format of another program, ONNX.

    Examples:
        diffattn export runs/first/model --onnx --bits 8 --check

    Args:
        folder: Folder of a diffattn model; diffattn convert makes one of a Llama or diffllama model.
        onnx: Write ONNX for onnxruntime: model.onnx with float32 weights, config.json and the tokenizer.
        out: Folder to write; it must be new or empty. Default: onnx, onnx-int8 or onnx-int4 in the model's folder.
        cache: Write a graph that keeps nothing of earlier tokens: simpler, but slow for writing text.
        bits: Store the weights as 8-bit or 4-bit numbers (the embedding and the output layer always as 8-bit). Default:
            32-bit floats.
        block_size: With --bits: how many weights share one scale: 16, 32, 64, 128 or 256.
        check: Compare the written model with the original; where they differ, nothing is kept and the exit status is 1.
        json: Print the result as JSON on stdout.
    """

    def call() -> int:
        from dataclasses import asdict

        from diffattn.cli.terminal.board import Board
        from diffattn.errors import ConfigError
        from diffattn.humanize import size

        if not onnx:
            raise ConfigError("no format named; wanted --onnx: see diffattn export --help")
        with Board() as board:
            board.importing()
            from diffattn.export.check import OnnxCheckError
            from diffattn.export.onnx import export_onnx

            try:
                done = export_onnx(
                    folder, out, cache=cache, bits=bits, block_size=block_size, check=check, on_stage=board
                )
            except OnnxCheckError as error:
                board.close(failed=True)
                board.note(f"diffattn: {error}")
                return 1
        for line in done.check.lines() if done.check is not None else []:
            board.note(line)
        board.note(f"{done.folder}: {size(done.file_bytes)}, {done.attention}, {done.seconds:.0f} s")
        if json:
            from diffattn.cli.terminal.console import print_json

            print_json(asdict(done) | {"folder": str(done.folder)})
        return 0

    return call
