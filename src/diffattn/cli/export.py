"""``diffattn export``."""

from __future__ import annotations

import sys
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
    """Write a model in the format of another program.

    Args:
        folder: A checkpoint of ours; diffattn convert makes one of a Llama or diffllama model.
        onnx: The format: a model.onnx for onnxruntime, in float32, with config.json and tokenizer beside it.
        out: Where to. Default: onnx, onnx-int8 or onnx-int4 in the folder.
        cache: Without it the graph takes no keys and values of earlier tokens and returns none.
        bits: Quantise the weights to 8 or 4 bits; the embedding and the output head to 8.
        block_size: Weights that share one scale, with --bits: 16, 32, 64, 128 or 256.
        check: Compare what was written with the torch model; status 1, and nothing kept, if they differ.
        json: Print one JSON object on stdout.
    """

    def note(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def call() -> int:
        from dataclasses import asdict

        from transformers.utils import logging as transformers_logging

        from diffattn.errors import ConfigError
        from diffattn.numbers import size
        from diffattn.serve.onnx_check import OnnxCheckError
        from diffattn.serve.onnx_export import export_onnx

        if not onnx:
            raise ConfigError("no format named; wanted --onnx: see diffattn export --help")
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        try:
            done = export_onnx(
                folder, out, cache=cache, bits=bits, block_size=block_size, check=check, on_progress=note
            )
        except OnnxCheckError as error:
            note(f"diffattn: {error}")
            return 1
        for line in done.check.lines() if done.check is not None else []:
            note(line)
        note(f"{done.folder}: {size(done.file_bytes)}, {done.attention}, {done.seconds:.0f} s")
        if json:
            from diffattn.cli.console import print_json

            print_json(asdict(done) | {"folder": str(done.folder)})
        return 0

    return call
