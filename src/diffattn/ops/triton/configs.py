"""Sizes of the Triton kernels' blocks by chip and width: fixed tables, so that every entry is one that was checked.

No autotuner: no pause in the first step, and the same bits in every run. The entries of sm_90 were timed on the card;
those of the other chips were compiled for them and chosen by registers, spills and shared memory. Needs no Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

# Of a query, a key or a value.
MOST_WIDTH = 256
# The join of a decoded row holds as many partial outputs at once.
MOST_SPANS = 128
# Calls of so few queries and without gradients are decoded.
MOST_DECODED = 8


class Blocks(NamedTuple):
    """One entry: queries and keys of a tile, warps of a program, stages of the pipeline that loads tiles.

    `together` is the forward pass's form (see `forward.py`); `descriptors` loads tiles by the chip's copy engine.
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


Entry = TypeVar("Entry")


class UpTo(NamedTuple):
    """The widest queries and values that an entry serves, and whether it serves only maps that share one key."""

    width: int
    value_width: int
    one_key: bool = False


Table = tuple[tuple[UpTo, Blocks], ...]
WalkTable = tuple[tuple[UpTo, tuple[Walk, ...]], ...]

# Bytes of shared memory that a program may have, by table.
SHARED = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}

# The table of each chip. A chip without one of its own takes that of its nearest relative with as much shared memory or
# less, where all of it compiles.
TABLES = {
    "sm_80": "sm_80",
    "sm_86": "sm_86",
    "sm_87": "sm_80",
    "sm_89": "sm_86",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "sm_103": "sm_100",
    "sm_110": "sm_100",
    "sm_120": "sm_86",
    "sm_121": "sm_86",
    "gfx90a": "gfx942",
    "gfx942": "gfx942",
    "gfx950": "gfx942",
}

# Of each table the first entry that holds both widths is taken.
FORWARD: dict[str, Table] = {
    "sm_80": (
        (UpTo(64, 64, one_key=True), Blocks(64, 64, 4, 3)),
        (UpTo(64, 128), Blocks(128, 32, 8, 3)),
        (UpTo(128, 128), Blocks(128, 32, 8, 2)),
        (UpTo(256, 256), Blocks(64, 32, 8, 2, together=False)),
    ),
    "sm_86": (
        (UpTo(64, 64, one_key=True), Blocks(64, 64, 4, 3)),
        (UpTo(128, 128), Blocks(128, 32, 8, 2)),
        (UpTo(256, 256), Blocks(64, 32, 8, 2, together=False)),
    ),
    "sm_90": (
        (UpTo(64, 64, one_key=True), Blocks(64, 128, 4, 3)),
        (UpTo(64, 128), Blocks(64, 64, 4, 3)),
        (UpTo(128, 128), Blocks(128, 64, 8, 3)),
        (UpTo(128, 256), Blocks(128, 64, 8, 3, together=False)),
        (UpTo(256, 256), Blocks(128, 64, 8, 2, together=False, descriptors=True)),
    ),
    "sm_100": (
        (UpTo(128, 128), Blocks(128, 64, 8, 3)),
        (UpTo(128, 256), Blocks(64, 64, 8, 2)),
        (UpTo(256, 256), Blocks(64, 64, 8, 2, together=False, descriptors=True)),
    ),
    "gfx942": (
        (UpTo(64, 64, one_key=True), Blocks(128, 64, 4, 2)),
        (UpTo(128, 128), Blocks(128, 32, 4, 2)),
        (UpTo(256, 256), Blocks(64, 32, 4, 2, together=False)),
    ),
}

# The pass that makes d_q.
QUERIES: dict[str, Table] = {
    "sm_80": (
        (UpTo(64, 128), Blocks(64, 32, 4, 2)),
        (UpTo(128, 128), Blocks(64, 64, 8, 2)),
        (UpTo(128, 256), Blocks(64, 32, 8, 2)),
        (UpTo(256, 256), Blocks(32, 32, 8, 1)),
    ),
    "sm_86": (
        (UpTo(64, 128), Blocks(64, 32, 4, 2)),
        (UpTo(128, 128), Blocks(64, 64, 8, 2)),
        (UpTo(128, 256), Blocks(64, 32, 8, 1)),
        (UpTo(256, 256), Blocks(32, 32, 8, 1)),
    ),
    "sm_90": (
        (UpTo(64, 128, one_key=True), Blocks(64, 64, 4, 3, descriptors=True)),
        (UpTo(64, 128), Blocks(128, 64, 8, 3, descriptors=True)),
        (UpTo(128, 256), Blocks(64, 64, 4, 2, descriptors=True)),
        (UpTo(256, 256), Blocks(64, 64, 8, 1, descriptors=True)),
    ),
    "sm_100": (
        (UpTo(64, 128, one_key=True), Blocks(64, 64, 4, 3, descriptors=True)),
        (UpTo(64, 128), Blocks(128, 64, 8, 3, descriptors=True)),
        (UpTo(128, 256), Blocks(64, 64, 4, 2, descriptors=True)),
        (UpTo(256, 256), Blocks(64, 64, 8, 1, descriptors=True)),
    ),
    "gfx942": (
        (UpTo(64, 64, one_key=True), Blocks(64, 64, 4, 2)),
        (UpTo(64, 128), Blocks(128, 32, 4, 2)),
        (UpTo(128, 128), Blocks(64, 32, 4, 2)),
        (UpTo(128, 256), Blocks(64, 32, 4, 1)),
        (UpTo(256, 256), Blocks(32, 16, 4, 1)),
    ),
}


def _in_two_walks(for_k: Blocks, for_v: Blocks) -> tuple[Walk, ...]:
    return Walk(for_k, makes_v=False), Walk(for_v, makes_k=False)


# The pass that makes d_k and d_v, in two walks where both do not fit into registers together.
KEYS: dict[str, WalkTable] = {
    "sm_80": (
        (UpTo(64, 64, one_key=True), (Walk(Blocks(16, 64, 4, 2)),)),
        (UpTo(64, 128), (Walk(Blocks(32, 32, 4, 2)),)),
        (UpTo(128, 128), (Walk(Blocks(64, 64, 8, 2)),)),
        (UpTo(128, 256), _in_two_walks(Blocks(32, 64, 8, 2), Blocks(64, 64, 8, 2))),
        (UpTo(256, 256), _in_two_walks(Blocks(32, 64, 8, 2), Blocks(32, 64, 8, 2))),
    ),
    "sm_86": (
        (UpTo(64, 64, one_key=True), (Walk(Blocks(16, 64, 4, 2)),)),
        (UpTo(64, 128), (Walk(Blocks(32, 32, 4, 2)),)),
        (UpTo(128, 128), (Walk(Blocks(64, 64, 8, 2)),)),
        (UpTo(128, 256), _in_two_walks(Blocks(32, 64, 8, 2), Blocks(32, 64, 8, 2))),
        (UpTo(256, 256), _in_two_walks(Blocks(32, 32, 8, 2), Blocks(32, 32, 4, 2))),
    ),
    "sm_90": (
        (UpTo(64, 64, one_key=True), (Walk(Blocks(64, 64, 4, 2, descriptors=True)),)),
        (UpTo(128, 128), (Walk(Blocks(32, 64, 4, 3, descriptors=True)),)),
        (
            UpTo(128, 256),
            _in_two_walks(Blocks(64, 128, 8, 1, descriptors=True), Blocks(64, 128, 8, 2, descriptors=True)),
        ),
        (
            UpTo(256, 256, one_key=True),
            _in_two_walks(Blocks(32, 64, 4, 2, descriptors=True), Blocks(64, 64, 4, 1, descriptors=True)),
        ),
        # With 4 warps its products would wait for each other.
        (
            UpTo(256, 256),
            _in_two_walks(Blocks(32, 64, 8, 1, descriptors=True), Blocks(64, 64, 4, 1, descriptors=True)),
        ),
    ),
    "sm_100": (
        (UpTo(64, 64, one_key=True), (Walk(Blocks(32, 64, 4, 2, descriptors=True)),)),
        (UpTo(64, 128), (Walk(Blocks(32, 64, 8, 3, descriptors=True)),)),
        (UpTo(128, 128), (Walk(Blocks(32, 64, 8, 2, descriptors=True)),)),
        (
            UpTo(128, 256),
            _in_two_walks(Blocks(64, 64, 8, 1, descriptors=True), Blocks(64, 128, 8, 1, descriptors=True)),
        ),
        (
            UpTo(256, 256),
            _in_two_walks(Blocks(32, 64, 8, 1, descriptors=True), Blocks(64, 64, 8, 1, descriptors=True)),
        ),
    ),
    "gfx942": (
        (UpTo(64, 64, one_key=True), (Walk(Blocks(32, 64, 4, 2)),)),
        (UpTo(128, 128), (Walk(Blocks(32, 64, 4, 1)),)),
        (UpTo(128, 256), (Walk(Blocks(32, 32, 4, 1)),)),
        (UpTo(256, 256), _in_two_walks(Blocks(16, 64, 4, 1), Blocks(16, 64, 4, 1))),
    ),
}

# The rows of a decoding tile are the queries of a group, whatever the entry says.
DECODING: dict[str, Table] = {
    "sm_80": (
        (UpTo(64, 128), Blocks(16, 64, 4, 3)),
        (UpTo(256, 256), Blocks(16, 32, 4, 3)),
    ),
    "sm_86": (
        (UpTo(64, 128), Blocks(16, 64, 4, 3)),
        (UpTo(256, 256), Blocks(16, 32, 4, 2)),
    ),
    "sm_90": (
        (UpTo(64, 256, one_key=True), Blocks(16, 32, 1, 3, descriptors=True)),
        (UpTo(64, 64), Blocks(16, 32, 2, 3, descriptors=True)),
        (UpTo(64, 256), Blocks(16, 64, 4, 3, descriptors=True)),
        (UpTo(256, 256), Blocks(16, 32, 2, 3, descriptors=True)),
    ),
    "sm_100": (
        (UpTo(64, 128), Blocks(16, 64, 4, 3, descriptors=True)),
        (UpTo(256, 256), Blocks(16, 32, 4, 3, descriptors=True)),
    ),
    "gfx942": (
        (UpTo(64, 128), Blocks(16, 64, 4, 2)),
        (UpTo(256, 256), Blocks(16, 32, 4, 2)),
    ),
}


@functools.cache
def _facts(index: int) -> tuple[str, int, int]:
    """A card's chip, its shared memory for a program in bytes, and its multiprocessors."""
    facts = torch.cuda.get_device_properties(index)
    chip = f"sm_{facts.major}{facts.minor}" if torch.version.hip is None else facts.gcnArchName.partition(":")[0]
    # NVIDIA's cards have more than this for a program that asks for it.
    shared = getattr(facts, "shared_memory_per_block_optin", facts.shared_memory_per_block)
    return chip, int(shared), facts.multi_processor_count


def _facts_of(device: torch.device) -> tuple[str, int, int]:
    """An H100's where the interpreter stands in for a card."""
    if device.type == "cpu":
        return "sm_90", SHARED["sm_90"], 132
    return _facts(torch.cuda.current_device() if device.index is None else device.index)


def chip_of(device: torch.device) -> str:
    """Returns the chip of a card as compilers name it, for example "sm_90" or "gfx942"."""
    return _facts_of(device)[0]


def shared_bytes(device: torch.device) -> int:
    """Returns how much shared memory a program may have on a card."""
    return _facts_of(device)[1]


def multiprocessors(device: torch.device) -> int:
    """Returns the number of a card's multiprocessors, which AMD calls compute units."""
    return _facts_of(device)[2]


def heads_in_wave(device: torch.device, blocks_of_a_head: int, warps: int) -> int:
    """Returns how many heads the card computes at once, when every one of their blocks has a place.

    They share keys and values in the card's cache, and the longest blocks of all of them begin first. With more heads
    at once they share less; with fewer the card waits for the last long blocks.
    """
    return max(1, round(multiprocessors(device) * max(1, 8 // warps) / max(1, blocks_of_a_head)))


def _entries(
    tables: Mapping[str, Sequence[tuple[UpTo, Entry]]], chip: str, width: int, value_width: int, one_key: bool
) -> list[Entry]:
    """The entries that hold two widths; the first of them is the one that is taken."""
    return [
        entry
        for most, entry in tables[TABLES[chip]]
        if width <= most.width and value_width <= most.value_width and (one_key or not most.one_key)
    ]


def forward_blocks(chip: str, width: int, value_width: int, one_key: bool) -> Blocks:
    """The entry of the forward pass, for a chip and widths to which `refusal` answers None."""
    return _entries(FORWARD, chip, width, value_width, one_key)[0]


def query_blocks(chip: str, width: int, value_width: int, one_key: bool) -> Blocks:
    """The entry of the pass that makes d_q."""
    return _entries(QUERIES, chip, width, value_width, one_key)[0]


def key_walks(chip: str, width: int, value_width: int, one_key: bool) -> tuple[Walk, ...]:
    """The entries of the pass that makes d_k and d_v."""
    return _entries(KEYS, chip, width, value_width, one_key)[0]


def decoding_blocks(chip: str, width: int, value_width: int, one_key: bool) -> Blocks:
    """The entry of decoding."""
    return _entries(DECODING, chip, width, value_width, one_key)[0]


def spans_of_keys(device: torch.device, groups: int, keys: int, blocks: Blocks) -> int:
    """Into how many spans the keys of a call are cut: programs enough for the chip, two tiles of keys at least."""
    programs = (4 if blocks.warps == 1 else 2) * multiprocessors(device)
    return max(1, min(-(-programs // max(1, groups)), -(-keys // (2 * blocks.keys)), MOST_SPANS))


def refusal(chip: str, shared: int, width: int, value_width: int, one_key: bool) -> str | None:
    """Returns None where the tables serve a chip and two widths, else the rest of a sentence that says why not.

    Args:
        chip: what `chip_of` says.
        shared: what `shared_bytes` says.
        width: of queries and keys.
        value_width: of values.
        one_key: whether both maps share their keys, as those of V2 do.
    """
    if chip not in TABLES:
        return f"a GPU of type {chip} is not supported; it serves {', '.join(TABLES)}"
    if shared < SHARED[TABLES[chip]]:
        return (
            f"a GPU with {shared} bytes of shared memory for a program is not supported; "
            f"it needs {SHARED[TABLES[chip]]} on {chip}"
        )
    if not all(_entries(tables, chip, width, value_width, one_key) for tables in (FORWARD, QUERIES, KEYS, DECODING)):
        return f"heads of {max(width, value_width)} are not supported; it serves widths up to {MOST_WIDTH}"
    return None


def passed_over(
    chip: str,
    width: int,
    value_width: int,
    one_key: bool,
    queries: int,
    training: bool,
    masked: bool,
    shared: bool = False,
) -> str | None:
    """Returns None where the kernels are the best choice for a call, else the rest of a sentence that says why not.

    Where a mask is passed, PyTorch's fastest kernels refuse the call. V1 has no form in them without padding or wide
    values. So the question is one for V2 alone, which is one standard call of twice the heads, or of fewer where they
    share noise heads.

    Args:
        chip: a chip to which `refusal` answers None.
        width: of queries and keys.
        value_width: of values.
        one_key: whether both maps share their keys, as those of V2 do.
        queries: how many a sequence has.
        training: whether the call takes gradients.
        masked: whether the keys are masked beyond `causal`.
        shared: whether output heads share noise heads.
    """
    decoded = queries <= MOST_DECODED and not training
    if masked or decoded or not one_key:
        return None
    if shared:
        return "maps of one key that share noise heads are left to PyTorch's kernels, since nobody has measured them"
    if TABLES[chip] != "sm_90" or max(width, value_width) > 128:
        return "V2 without a mask is left to PyTorch's kernels where nobody has measured which is faster"
    # benchmarks/results/gpu_h100.jsonl and gpu_h200.jsonl: 0.94 times their time at 8,192 queries, 1.07 at 16,384.
    if training and max(width, value_width) > 64 and queries > 8192:
        return "PyTorch's kernels are faster in training V2 with heads wider than 64 and more than 8,192 queries"
    return None
