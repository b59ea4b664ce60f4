"""The verb ``diffattn generate``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffattn.generate.decoding import Decoding
from diffattn.generate.options import GenerateOptions
from diffattn.model.options import LoadOptions

if TYPE_CHECKING:
    from diffattn.generate.generation import Generated


def generate(
    folder: Path, prompt: str, decoding: Decoding, options: GenerateOptions, load: LoadOptions, *, json: bool = False
) -> int:
    """Continue a text with a model; the text comes on stdout, word by word.

    Examples:
        diffattn generate runs/first/model "The people of the United States"

    Args:
        folder: Folder of a model: of diffattn, or any language model that transformers loads.
        prompt: The text to go on from, in quotes; - reads it from stdin.
        json: Print the text, counts and seconds as JSON on stdout.
    """
    from diffattn.cli.terminal.board import Board
    from diffattn.model.trained import read_claim

    text = _stdin() if prompt == "-" else prompt
    claim = read_claim(folder)
    with Board(keep=False) as board:
        board.importing()
        from diffattn.generate.generation import check_prompt
        from diffattn.generate.generation import generate as run

        def write(piece: str) -> None:
            board.close()
            _write(piece)

        check_prompt(text)
        result = run(
            folder, text, decoding, **vars(options), **vars(load), on_text=None if json else write, on_stage=board
        )
    if json:
        from diffattn.cli.terminal.console import print_json

        print_json(dataclasses.asdict(result))
    else:
        _write("\n")
    print(_summary(result), file=sys.stderr)
    # All weights are read for it once more, so behind the text.
    trained = None if claim is None else claim.of_weights(folder)
    if trained is not None:
        print(f"this model: {trained.facts}", file=sys.stderr)
    if trained is not None and trained.advice is not None:
        print(f"note: {trained.advice}", file=sys.stderr)
    return 0


def _summary(result: Generated) -> str:
    from diffattn.humanize import seconds, size

    said = f"{result.prompt_tokens:,} + {result.new_tokens:,} tokens; loaded in {seconds(result.load_seconds or 0)}"
    if result.first_token_seconds is not None:
        said += f", first token after {seconds(result.first_token_seconds)}"
    if result.tokens_per_second is not None:
        rate = result.tokens_per_second * result.weight_bytes
        said += f", then {result.tokens_per_second:,.1f} tokens/s ({size(rate)}/s of weights)"
    return f"{said}; {seconds(result.seconds)} in all"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _stdin() -> str:
    from diffattn.errors import DataError

    try:
        # The line end that a shell puts behind a text is not a part of it.
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {error.start} of stdin, which is not UTF-8", "a prompt in UTF-8", "convert it"
        ) from error
