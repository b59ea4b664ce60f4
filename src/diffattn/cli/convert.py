"""``diffattn convert``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

Target = Literal["softmax", "diff_v1", "diff_v2", "dex", "diffllama", "reference", "llama"]


def convert(
    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FROM")],
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INTO")],
    *,
    to: Target | None = None,
    noise: Literal["copy", "perturbed"] | None = None,
    noise_std: float | None = None,
    seed: int | None = None,
    dex_heads: str | None = None,
    json: bool = False,
) -> Callable[[], int]:
    """Convert a model folder to another kind of attention: exactly, or not at all.

    Examples:
        diffattn convert SmolLM2-135M runs/v2 --to diff_v2

    Args:
        src: Folder of a model: a Llama, Mistral, Qwen2, Qwen3, diffllama or diffattn model (docs/convert.md).
        dst: Folder to write; it must be new or empty.
        to: What to make of it. Default: diff_v1 of diffllama, softmax of Llama, the same version of the authors'
            own models.
        noise: With --to diff_v2. copy: the model computes the same as before. perturbed: its second map is changed a
            little, as a start for training.
        noise_std: With --noise perturbed: how much is changed, as a share of the spread of the weights. Default: 0.1.
        seed: With --noise perturbed: number that decides the changes. Default: 0.
        dex_heads: The heads that subtract, with --to dex: 0,2 for all layers, 0,2/1/ for each of three. Default: all.
        json: Print the result as JSON on stdout.
    """

    def call() -> int:
        from dataclasses import asdict

        from diffattn.cli.terminal.board import Board
        from diffattn.humanize import size

        given = {"noise": noise, "noise_std": noise_std, "seed": seed, "heads": _heads(dex_heads)}
        options = {name: value for name, value in given.items() if value is not None}
        with Board(keep=False) as board:
            board.importing()
            from diffattn.convert.convert import convert as run

            result = run(src, dst, to, on_stage=board, **options)
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

    return call


def _heads(text: str | None) -> Any:
    """``0,2`` as one list for all layers, ``0,2/1/`` as a list for each."""
    from diffattn.errors import ConfigError

    if text is None:
        return None
    try:
        layers = [[int(head) for head in layer.split(",") if head] for layer in text.split("/")]
    except ValueError:
        raise ConfigError(f"dex_heads is {text!r}; wanted numbers, such as 0,2 or 0,2/1/ for three layers") from None
    return layers if "/" in text else layers[0]
