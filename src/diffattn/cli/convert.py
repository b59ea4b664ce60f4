"""``diffattn convert``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

Target = Literal["softmax", "diff_v1", "diff_v2", "dex", "diffllama", "reference", "llama"]


def convert(
    src: Annotated[Path, tyro.conf.Positional],
    dst: Annotated[Path, tyro.conf.Positional],
    *,
    to: Target | None = None,
    noise: Literal["copy", "perturbed"] | None = None,
    noise_std: float | None = None,
    seed: int | None = None,
    dex_heads: str | None = None,
    json: bool = False,
) -> Callable[[], int]:
    """Convert a checkpoint folder into another architecture: lossless, or refused with the reason.

    Args:
        src: Folder of a diffllama, Llama-like or reference model (docs/convert.md), or of one of ours.
        dst: Folder to write; new or empty.
        to: What to make of it. Default: diff_v1 of diffllama, softmax of Llama, the same version of a reference model.
        noise: To diff_v2. copy: the function is kept. perturbed: the second map is moved, as a start for training.
        noise_std: Of perturbed, in units of the standard deviation of the layer's W_Q. Default: 0.1.
        seed: Of perturbed. Default: 0.
        dex_heads: To dex. Heads that subtract, such as 0,2 for all layers or 0,2/1/ for each of three. Default: all.
        json: Print the result on stdout.
    """

    def call() -> int:
        from dataclasses import asdict

        from transformers.utils import logging as transformers_logging

        from diffattn.convert.convert import convert as run
        from diffattn.numbers import size

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        given = {"noise": noise, "noise_std": noise_std, "seed": seed, "heads": _heads(dex_heads)}
        result = run(src, dst, to, **{name: value for name, value in given.items() if value is not None})
        print(f"{result.source} → {result.target}: {result.changed}; {result.exact}", file=sys.stderr)
        before = "" if result.parameters == result.source_parameters else f" (were {result.source_parameters:,})"
        print(
            f"{result.parameters:,} parameters{before}, {size(result.bytes)} of {result.dtype}: {result.folder}",
            file=sys.stderr,
        )
        for note in result.notes:
            print(f"note: {note}", file=sys.stderr)
        if json:
            from diffattn.cli.console import print_json

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
