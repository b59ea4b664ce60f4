"""The verbs ``diffattn convert`` and ``diffattn export``: a model's folder as another program reads it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from diffattn.convert.options import ConvertOptions
from diffattn.errors import ConfigError
from diffattn.export.options import ExportOptions


def convert(
    src: Annotated[Path, {"value": "FROM"}],
    dst: Annotated[Path, {"value": "INTO"}],
    options: ConvertOptions,
    *,
    json: bool = False,
) -> int:
    """Convert a model folder to another kind of attention: exactly, or not at all.

    Examples:
        diffattn convert SmolLM2-135M runs/v2 --to diff_v2

    Args:
        src: Folder of a Llama-like, diffllama, Motif or diffattn model or of a LoRA adapter, or a GGUF file
            (docs/convert.md).
        dst: Folder to write; it must be new or empty.
    """
    from diffattn.cli.terminal.board import Board
    from diffattn.humanize import size

    heads = _heads(options.dex_heads)
    said = {"noise": options.noise, "noise_std": options.noise_std, "seed": options.seed, "heads": heads}
    with Board(keep=False) as board:
        board.importing()
        from diffattn.convert.convert import convert as run
        from diffattn.data.tokenizer import read_chat_template

        template = None if options.chat_template is None else read_chat_template(options.chat_template)
        given: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
        result = run(src, dst, options.to, chat_template=template, on_stage=board, **given)
    print(f"{result.source} → {result.target}: {result.changed}; {result.exact}", file=sys.stderr)
    before = "" if result.parameters == result.source_parameters else f" (were {result.source_parameters:,})"
    print(
        f"{result.parameters:,} parameters{before}, {size(result.bytes)} of {result.dtype}: {result.folder}",
        file=sys.stderr,
    )
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if json:
        from diffattn.cli.terminal.console import print_json

        facts = asdict(result)
        print_json({"from": facts.pop("source"), "to": facts.pop("target")} | facts)
    return 0


def _heads(text: str | None) -> list[int] | list[list[int]] | None:
    """Returns ``0,2`` as one list for all layers, ``0,2/1/`` as a list for each.

    >>> _heads("0,2"), _heads("0,2/1/")
    ([0, 2], [[0, 2], [1], []])
    """
    if text is None:
        return None
    try:
        layers = [[int(head) for head in layer.split(",") if head] for layer in text.split("/")]
    except ValueError:
        raise ConfigError(
            f"--dex-heads {text!r}", "numbers of heads", "write 0,2, or 0,2/1/ for three layers"
        ) from None
    return layers if "/" in text else layers[0]


def export(folder: Path, options: ExportOptions, *, onnx: bool = False, json: bool = False) -> int:
    """Write a model in the format of another program, ONNX.

    Examples:
        diffattn export runs/first/model --onnx --bits 8 --check

    Args:
        folder: Folder of a diffattn model; diffattn convert makes one of a Llama or diffllama model.
        onnx: Write ONNX for onnxruntime: model.onnx with float32 weights, config.json and the tokenizer.
    """
    from diffattn.cli.terminal.board import Board
    from diffattn.humanize import size

    if not onnx:
        raise ConfigError("no format", "--onnx", "see diffattn export --help")
    with Board() as board:
        board.importing()
        from diffattn.export.check import OnnxCheckError
        from diffattn.export.onnx import export_onnx

        try:
            done = export_onnx(folder, **vars(options), on_stage=board)
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
