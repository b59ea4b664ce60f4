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
) -> Callable[[], int]:
    """Serve a model folder over OpenAI's HTTP interface, with vLLM or with transformers.

    Args:
        folder: config.json, safetensors and a tokenizer of a model of ours.
        engine: auto: vllm where it is installed, else transformers with continuous batching.
        host: Address to listen on; the default is reached from this machine alone.
        port: To listen on; 0 takes one that is free.
        api_key: That clients have to send. Default: DIFFATTN_API_KEY, which other users of the machine do not see.
        model_name: By which clients ask for the model. Default: the folder's name.
        dtype: Of the weights; auto: the checkpoint's.
        device: Where the model runs; auto: the GPU where there is one.
        max_context: Tokens of prompt and answer together. Default: the model's positions.
    """

    def call() -> int:
        from diffattn.serve.engines import serve as serve_folder

        serve_folder(
            folder, engine, host=host, port=port,
            api_key=os.environ.get("DIFFATTN_API_KEY") if api_key is None else api_key,
            model_name=model_name, dtype=dtype, device=device, max_context=max_context,
            on_note=lambda note: print(f"diffattn: {note}", file=sys.stderr, flush=True),
        )  # fmt: skip
        return 0

    return call
