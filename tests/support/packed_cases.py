"""Rows of several sequences, with and without padding, and what each sequence is alone."""

from __future__ import annotations

import functools
from typing import Any

import torch
from support.small_models import SHAPE, small_model, tokens
from torch import Tensor
from transformers import StaticCache

from diffattn.model.fused import DIFF_FUSED
from diffattn.variants import ATTENTIONS

LENGTH = 21
# What each row holds: sequences by their lengths, padding by its length below 0.
WHOLE = ((5, 9, 7), (1, 1, 19), (21,))
PADDED = ((-2, 5, 9, 5), (4, -3, 8, -1, 4, -1), (-6, 15))
IMPLEMENTATIONS = [
    (attention, implementation)
    for attention in ATTENTIONS
    for implementation in ("sdpa", "eager", DIFF_FUSED)
    if implementation != DIFF_FUSED or ATTENTIONS[attention].maps > 1
]


def spans(row: tuple[int, ...]) -> list[slice]:
    """Where the sequences of a row lie."""
    ends = torch.tensor(row).abs().cumsum(0).tolist()
    return [slice(end - size, end) for end, size in zip(ends, row, strict=True) if size > 0]


def real_of(rows: tuple[tuple[int, ...], ...]) -> Tensor:
    real = torch.zeros(len(rows), LENGTH, dtype=torch.bool)
    for b, row in enumerate(rows):
        for span in spans(row):
            real[b, span] = True
    return real


def positions_of(rows: tuple[tuple[int, ...], ...], padding: int = 1) -> Tensor:
    positions = torch.full((len(rows), LENGTH), padding)
    for b, row in enumerate(rows):
        for span in spans(row):
            positions[b, span] = torch.arange(span.stop - span.start)
    return positions


def visible_of(rows: tuple[tuple[int, ...], ...]) -> Tensor:
    """(B, 1, T, T), True where a query sees a key."""
    visible = torch.zeros(len(rows), 1, LENGTH, LENGTH, dtype=torch.bool)
    for b, row in enumerate(rows):
        for span in spans(row):
            visible[b, 0, span, span] = torch.ones(span.stop - span.start, span.stop - span.start).tril().bool()
    return visible


def alone(model, ids: Tensor, rows: tuple[tuple[int, ...], ...]) -> Tensor:
    """Logits of every sequence in a row of its own, zeros for padding."""
    logits = torch.zeros(*ids.shape, SHAPE.vocab_size)
    for b, row in enumerate(rows):
        for span in spans(row):
            logits[b : b + 1, span] = model(ids[b : b + 1, span], use_cache=False).logits
    return logits


def caches(model) -> dict[str, dict[str, Any]]:
    return {
        "no cache": {"use_cache": False},
        "default": {},
        "static": {"past_key_values": StaticCache(config=model.config, max_cache_len=LENGTH + 4)},
    }


@functools.cache
def twins(attention: str):
    """A model, and what it says of each sequence alone; without a difference the test would be none."""
    fields = {"dex_heads": [[1, 5], [], [0, 11, 3]]} if attention == "dex" else {}
    model, ids = small_model(attention, **fields), tokens(3, LENGTH)
    if attention == "dex":
        for layer in model.model.layers:
            if layer.self_attn.heads:
                torch.nn.init.normal_(layer.self_attn.dex.weight, std=0.3)
    model.set_attn_implementation("eager")
    expected = {rows: alone(model, ids, rows) for rows in (WHOLE, PADDED)}
    assert (model(ids).logits - expected[WHOLE]).abs().amax((1, 2))[:2].min() > 0.1
    return model, ids, expected
