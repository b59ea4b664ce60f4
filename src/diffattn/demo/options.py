"""The options of ``diffattn demo``, in a file that imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

# 32 leaves the weights as they are.
DEMO_BITS = (8, 4, 32)


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options of :func:`diffattn.demo.build.build_demo`."""

    bits: int = field(default=8, metadata={"choices": DEMO_BITS})
    """Bits of each weight in the page; 32 for exact floats, which make it about four times as large as 8."""
    text: str | None = None
    """The text that the page begins with. Default: one that hides a number among other sentences."""
    answer: str | None = None
    """The part of --text that its end asks for; the page marks it. Default: none, or the number that is hidden."""
    packages: Path | None = None
    """Folder with the archives of onnxruntime-web and @huggingface/tokenizers, for machines without npm. Default: npm
    fetches them once."""
