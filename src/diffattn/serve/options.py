"""The options of a server, in a file that imports no engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Engine = Literal["auto", "vllm", "transformers"]


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The options of :func:`diffattn.serve.engines.serve` beside ``LoadOptions``."""

    engine: Engine = "auto"
    """Program that runs the model. auto: vllm where it is installed, else transformers."""
    host: str = "127.0.0.1"
    """Address to listen on; 127.0.0.1 is reached from this machine alone."""
    port: int = 8000
    """Port to listen on; 0 takes one that is free."""
    api_key: str | None = None
    """Key that clients must send. Default: the environment's DIFFATTN_API_KEY, which other users of the machine do not
    see."""
    model_name: str | None = None
    """Name that clients ask for. Default: the folder's name."""
    max_context: int | None = None
    """Tokens of question and answer together, at most. Default: as many as the model can read."""
    allow_host: tuple[str, ...] = ()
    """Names by which clients may call this machine, beside its own."""
