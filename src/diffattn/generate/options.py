"""The options with which a text is continued, beside those of decoding, in a file that imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The options of :func:`diffattn.generate.generation.generate` beside ``Decoding`` and ``LoadOptions``."""

    chat: bool = False
    """Put the prompt into the chat template of the model's tokenizer."""
    assistant: Path | None = None
    """Folder of a smaller model with the same tokenizer, which proposes tokens for this one to check. The text is the
    same, or as likely where tokens are drawn. Default: none."""
    attn_implementation: str | None = None
    """Program that computes the attention: diff_fused, sdpa, eager, ... Default: the model's own choice."""
