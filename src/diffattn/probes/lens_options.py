"""The options of the maps of one text, in a file that imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LensOptions:
    """The options of :func:`diffattn.probes.lens.lens` beside ``LoadOptions``."""

    text: str
    """The text that the model reads, up to 2048 tokens."""
    layers: tuple[int, ...] | None = None
    """Layers that the page shows, counted from 0. Default: all."""
    answer: str | None = None
    """A part of the text; the page counts attention to anything else as noise. Default: none."""
