"""The block table: pure Python, sizes that the kernels can take, and memory that the measured chip has."""

import itertools

import pytest
import torch

from diffattn.ops.triton.configs import (
    MOST_SPANS,
    Blocks,
    decoding_blocks,
    forward_blocks,
    heads_in_wave,
    key_walks,
    query_blocks,
    spans_of_keys,
)

CPU = torch.device("cpu")
# What a program may have on compute capability 9.0.
SHARED = 232_448
WIDTHS = [(16, 32, False), (64, 128, False), (96, 192, False), (128, 256, False), (256, 256, False)]
WIDTHS += [(16, 16, True), (64, 64, True), (80, 80, True), (128, 128, True), (256, 256, True), (64, 128, True)]
every_width = pytest.mark.parametrize(("width", "value_width", "one_key"), WIDTHS)


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def held_and_staged(blocks: Blocks, held: int, staged: int) -> int:
    """Bytes of tiles that stay and of tiles that the pipeline loads, in half precision."""
    return 2 * (held + max(1, blocks.stages - 1) * staged)


@every_width
def test_entries_are_sizes_that_the_kernels_take(width: int, value_width: int, one_key: bool) -> None:
    entries = [forward_blocks(width, value_width, one_key), query_blocks(width, value_width, one_key)]
    walks = key_walks(width, value_width, one_key)
    entries += [walk.blocks for walk in walks]
    entries.append(decoding_blocks(width, value_width, one_key))
    for blocks in entries:
        assert {blocks.rows, blocks.keys} <= {16, 32, 64, 128}
        assert blocks.warps in (1, 2, 4, 8)
        assert 1 <= blocks.stages <= 4
    # Every gradient is made once.
    assert sorted(itertools.chain(*[["k"] * walk.makes_k + ["v"] * walk.makes_v for walk in walks])) == ["k", "v"]


@every_width
def test_tiles_fit_into_the_measured_chip(width: int, value_width: int, one_key: bool) -> None:
    d, dv = power_of_two(width), power_of_two(value_width)
    keys = d if one_key else 2 * d
    forward = forward_blocks(width, value_width, one_key)
    together = forward.together
    staged = forward.keys * ((keys if together else d) + dv)
    assert held_and_staged(forward, forward.rows * d * (1 + together), staged) <= SHARED
    queries = query_blocks(width, value_width, one_key)
    assert held_and_staged(queries, queries.rows * (2 * d + dv), queries.keys * (keys + dv)) <= SHARED
    for blocks, makes_k, _ in key_walks(width, value_width, one_key):
        held = blocks.keys * (keys + (dv if makes_k else 0))
        assert held_and_staged(blocks, held, blocks.rows * (2 * d + dv)) <= SHARED


def test_a_wave_is_as_many_heads_as_have_a_place() -> None:
    # 132 multiprocessors, one program of 8 warps or two of 4 on each.
    assert heads_in_wave(CPU, 32, 8) == 4
    assert heads_in_wave(CPU, 64, 4) == 4
    assert heads_in_wave(CPU, 1024, 8) == 1


def test_spans_are_enough_for_the_chip_and_no_shorter_than_two_tiles() -> None:
    blocks = Blocks(16, 64, 4, 3)
    assert spans_of_keys(CPU, 8, 32768, blocks) == 33
    assert spans_of_keys(CPU, 8, 256, blocks) == 2
    assert spans_of_keys(CPU, 4096, 32768, blocks) == 1
    assert spans_of_keys(CPU, 1, 10**6, blocks) == MOST_SPANS
