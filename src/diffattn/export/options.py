"""The options of an export to ONNX, in a file that imports neither torch nor ONNX."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

BITS = (8, 4)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of :func:`diffattn.export.onnx.export_onnx`."""

    out: Path | None = None
    """Folder to write; it must be new or empty. Default: onnx, onnx-int8 or onnx-int4 in the model's folder."""
    cache: bool = True
    """Write a graph that keeps no keys and values of earlier tokens: simpler, but slow for writing text."""
    bits: int | None = field(default=None, metadata={"choices": BITS})
    """Bits of each weight: 8 changes texts hardly at all, and 4 may; with 4 the embedding and the output layer keep 8.
    Default: 32-bit floats."""
    block_size: int = 32
    """Weights that share one scale, with ``bits``: 16, 32, 64, 128 or 256."""
    repeat_heads: bool = False
    """Write each key/value head once for every query head that shares it, for engines that cannot share them, such as
    OpenVINO. The saved keys and values stay as they are."""
    maps: str | None = field(default=None, metadata={"value": "LAYER,LAYER"})
    """Layers, counted from 0, whose attention maps a program can draw: the graph also returns their queries and λ.
    Write all for all layers. Default: none."""
    check: bool = False
    """Compare the written model with the original; where they differ, nothing is kept and the exit status is 1."""
