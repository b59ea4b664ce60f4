"""``diffattn generate``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro


def generate(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    num_beams: int = 1,
    chat: bool = False,
    cache: Literal["dynamic", "static", "quantized"] = "dynamic",
    assistant: Path | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    attn_implementation: str | None = None,
    json: bool = False,
) -> Callable[[], int]:
    """Continue a text with a model; the text comes on stdout, word by word.

    Examples:
        diffattn generate runs/first/model "The people of the United States"

    Args:
        folder: Folder of a model: of diffattn, or any language model that transformers loads.
        prompt: The text to go on from, in quotes; - reads it from stdin.
        max_new_tokens: Tokens to write at most.
        temperature: 0 always takes the likeliest token; above 0 tokens are drawn, the higher the freer.
        top_p: Draw from the likeliest tokens that together have this probability, 0 to 1.
        top_k: Draw from so many of the likeliest tokens; 0 means all.
        min_p: Draw from the tokens that have at least this part of the likeliest one's probability, 0 to 1.
        repetition_penalty: Above 1, tokens that the text has already become less likely; 1 changes nothing.
        seed: Number that decides the draws.
        num_beams: Keep so many texts at a time and print the likeliest, once it is whole.
        chat: Put the prompt into the chat template of the model's tokenizer.
        cache: How earlier tokens are kept. dynamic: it grows. static: full size at once. quantized: in 4 bits each.
        assistant: Folder of a smaller model with the same tokenizer, which proposes tokens for this one to check.
        dtype: Number format of the weights; auto: as in the file.
        device: Where to run: the processor (cpu) or a GPU (cuda); auto takes the GPU where there is one.
        attn_implementation: Program for the attention: diff_fused, sdpa, eager, ... Default: the model's own choice.
        json: Print the text, counts and seconds as JSON on stdout.
    """

    def call() -> int:
        from dataclasses import asdict

        from diffattn.cli.terminal.board import Board
        from diffattn.humanize import seconds, size
        from diffattn.model.trained import read_claim

        text = _stdin() if prompt == "-" else prompt
        claim = read_claim(folder)
        with Board(keep=False) as board:
            board.importing()
            from diffattn.generate.generation import Decoding, check_prompt
            from diffattn.generate.generation import generate as run

            def write(piece: str) -> None:
                board.close()
                _write(piece)

            decoding = Decoding(
                max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
                repetition_penalty=repetition_penalty, seed=seed, num_beams=num_beams, cache=cache,
            )  # fmt: skip
            check_prompt(text)
            result = run(
                folder, text, decoding, chat=chat, dtype=dtype, device=device,
                attn_implementation=attn_implementation, assistant=assistant, on_text=None if json else write,
                on_stage=board,
            )  # fmt: skip
        if json:
            from diffattn.cli.terminal.console import print_json

            print_json(asdict(result))
        else:
            _write("\n")
        speed = ""
        if result.tokens_per_second is not None:
            rate = result.tokens_per_second * result.weight_bytes
            speed = f", then {result.tokens_per_second:,.1f} tokens/s ({size(rate)}/s of weights)"
        first = (
            "" if result.first_token_seconds is None else f", first token after {seconds(result.first_token_seconds)}"
        )
        print(
            f"{result.prompt_tokens:,} + {result.new_tokens:,} tokens; loaded in {seconds(result.load_seconds)}"
            f"{first}{speed}; {seconds(result.seconds)} in all",
            file=sys.stderr,
        )
        # All weights are read for it once more, so behind the text.
        trained = None if claim is None else claim.of_weights(folder)
        if trained is not None:
            print(f"this model: {trained.facts}", file=sys.stderr)
        if trained is not None and trained.advice is not None:
            print(f"note: {trained.advice}", file=sys.stderr)
        return 0

    return call


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _stdin() -> str:
    from diffattn.errors import DataError

    try:
        # The line end that a shell puts behind a text is not a part of it.
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} of stdin is not UTF-8; a prompt in UTF-8 is wanted: convert it") from error
