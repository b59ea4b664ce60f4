"""Runs a model under another attention implementation for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers import PreTrainedModel


@contextlib.contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Runs a model under the implementation of this name while the block lasts, then under its own again.

    Args:
        model: any model of ``transformers``.
        name: the name of an attention implementation, such as ``"sdpa"``.

    Raises:
        ValueError: the model does not have this implementation; it keeps its own.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
