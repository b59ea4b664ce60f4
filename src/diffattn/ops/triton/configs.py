"""Sizes of the Triton kernels' blocks by width, for Hopper: a fixed table, so that every entry is one that was checked.

No autotuner: no pause in the first step, and the same bits in every run. Other cards have less shared memory for a
program and want entries of their own, which nobody has measured. Needs no Triton.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# The join of a decoded row holds as many partial outputs at once.
MOST_SPANS = 128


class Blocks(NamedTuple):
    """One entry: queries and keys of a tile, warps of a program, stages of the pipeline that loads tiles.

    `together` is the forward pass's form (see `forward.py`); `descriptors` loads tiles by Hopper's copy engine.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    together: bool = True
    descriptors: bool = False


class Walk(NamedTuple):
    """One launch of the kernel that walks over queries: its blocks, and whether it makes d_k, d_v or both."""

    blocks: Blocks
    makes_k: bool = True
    makes_v: bool = True


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def multiprocessors(device: torch.device) -> int:
    """Returns the number of the card's multiprocessors; an H100's where the interpreter stands in for one."""
    return 132 if device.type == "cpu" else _multiprocessors(device.index or 0)


def heads_in_wave(device: torch.device, blocks_of_a_head: int, warps: int) -> int:
    """Returns how many heads the card computes at once, when every one of their blocks has a place.

    They share keys and values in the card's cache, and the longest blocks of all of them begin first. With more heads
    at once they share less; with fewer the card waits for the last long blocks.
    """
    return max(1, round(multiprocessors(device) * max(1, 8 // warps) / max(1, blocks_of_a_head)))


def forward_blocks(width: int, value_width: int, one_key: bool) -> Blocks:
    """The entry of the forward pass."""
    if width > 128:
        return Blocks(128, 64, 8, 2, together=False, descriptors=True)
    if value_width > 128:
        return Blocks(128, 64, 8, 3, together=False)
    if width > 64:
        return Blocks(128, 64, 8, 3)
    return Blocks(64, 128, 4, 3) if one_key and value_width <= 64 else Blocks(64, 64, 4, 3)


def query_blocks(width: int, value_width: int, one_key: bool) -> Blocks:
    """The entry of the pass that makes d_q."""
    if width > 128:
        return Blocks(64, 64, 8, 1, descriptors=True)
    if width > 64 or value_width > 128:
        return Blocks(64, 64, 4, 2, descriptors=True)
    return Blocks(64, 64, 4, 3, descriptors=True) if one_key else Blocks(128, 64, 8, 3, descriptors=True)


def key_walks(width: int, value_width: int, one_key: bool) -> tuple[Walk, ...]:
    """The entries of the pass that makes d_k and d_v: two walks where both do not fit into registers together."""
    if width > 128:
        return (
            Walk(Blocks(32, 64, 4, 2, descriptors=True), makes_v=False),
            Walk(Blocks(64, 64, 4, 1, descriptors=True), makes_k=False),
        )
    if value_width > 128:
        return (
            Walk(Blocks(64, 128, 8, 1, descriptors=True), makes_v=False),
            Walk(Blocks(64, 128, 8, 2, descriptors=True), makes_k=False),
        )
    if one_key and width <= 64 and value_width <= 64:
        return (Walk(Blocks(64, 64, 4, 2, descriptors=True)),)
    return (Walk(Blocks(32, 64, 4, 3, descriptors=True)),)


def decoding_blocks(width: int, value_width: int, one_key: bool) -> Blocks:
    """The entry of decoding; its rows are the queries of a group, whatever the entry says."""
    if one_key and width <= 64:
        return Blocks(16, 32, 1, 3, descriptors=True)
    if value_width > 64 and width <= 64:
        return Blocks(16, 64, 4, 3, descriptors=True)
    return Blocks(16, 32, 2, 3, descriptors=True)


def spans_of_keys(device: torch.device, groups: int, keys: int, blocks: Blocks) -> int:
    """Into how many spans the keys of a call are cut: programs enough for the chip, two tiles of keys at least."""
    programs = (4 if blocks.warps == 1 else 2) * multiprocessors(device)
    return max(1, min(-(-programs // max(1, groups)), -(-keys // (2 * blocks.keys)), MOST_SPANS))
