"""The options with which a model is built or loaded, in a file that imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MATCHES = ("parameters", "shape")
Dtype = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The number format and the device with which :func:`diffattn.model.loading.load` loads a model."""

    dtype: Dtype = "auto"
    """Number format of the weights; auto takes that of the file."""
    device: Device = "auto"
    """Device to run on: the processor (cpu) or a GPU (cuda); auto takes the GPU where there is one."""
