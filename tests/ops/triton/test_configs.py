"""The block tables: an entry for every chip and width, sizes that the kernels take, and memory that there is."""

import itertools

import pytest
import torch

from diffattn.ops.triton.configs import (
    DECODING,
    FORWARD,
    KEYS,
    MOST_SPANS,
    QUERIES,
    SHARED,
    TABLES,
    Blocks,
    chip_of,
    decoding_blocks,
    forward_blocks,
    heads_in_wave,
    key_walks,
    passed_over,
    query_blocks,
    refusal,
    shared_bytes,
    spans_of_keys,
)

CPU = torch.device("cpu")
WIDTHS = range(16, 257, 16)
# Softmax maps with keys of their own, and maps that share one key, at every pair of widths.
CASES = list(itertools.product(WIDTHS, WIDTHS, (False, True)))
every_chip = pytest.mark.parametrize("chip", TABLES)


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def held_and_staged(blocks: Blocks, held: int, staged: int) -> int:
    """Bytes of tiles that stay and of tiles that the pipeline loads, in half precision."""
    return 2 * (held + max(1, blocks.stages - 1) * staged)


@every_chip
def test_every_width_has_entries_of_sizes_that_the_kernels_take(chip: str) -> None:
    for width, value_width, one_key in CASES:
        case = (chip, width, value_width, one_key)
        assert refusal(chip, SHARED[TABLES[chip]], width, value_width, one_key) is None
        walks = key_walks(*case)
        entries = [forward_blocks(*case), query_blocks(*case), decoding_blocks(*case)]
        for blocks in [*entries, *(walk.blocks for walk in walks)]:
            assert {blocks.rows, blocks.keys} <= {16, 32, 64, 128}
            assert blocks.warps in (1, 2, 4, 8)
            assert 1 <= blocks.stages <= 4
        # Every gradient is made once.
        assert sorted(itertools.chain(*[["k"] * walk.makes_k + ["v"] * walk.makes_v for walk in walks])) == ["k", "v"]


@every_chip
def test_tiles_that_lie_in_shared_memory_fit_into_it(chip: str) -> None:
    # Tiles that stay lie there on Hopper and on Blackwell for data centres, elsewhere in registers.
    staying = TABLES[chip] in ("sm_90", "sm_100")
    for width, value_width, one_key in CASES:
        case, d, dv = (chip, width, value_width, one_key), power_of_two(width), power_of_two(value_width)
        keys = d if one_key else 2 * d
        forward, queries = forward_blocks(*case), query_blocks(*case)
        together = forward.together
        held = staying * forward.rows * d * (1 + together)
        taken = [held_and_staged(forward, held, forward.keys * ((keys if together else d) + dv))]
        held = staying * queries.rows * (2 * d + dv)
        if TABLES[chip] != "gfx942":
            taken.append(held_and_staged(queries, held, queries.keys * (keys + dv)))
            for blocks, makes_k, _ in key_walks(*case):
                held = staying * blocks.keys * (keys + (dv if makes_k else 0))
                taken.append(held_and_staged(blocks, held, blocks.rows * (2 * d + dv)))
        assert max(taken) <= SHARED[TABLES[chip]], case


def test_tables_hold_the_chips_they_are_made_for_and_no_entry_is_out_of_reach() -> None:
    assert set(TABLES.values()) == SHARED.keys()
    for tables in (FORWARD, QUERIES, KEYS, DECODING):
        assert tables.keys() == SHARED.keys()
        for rows in tables.values():
            limits = [most for most, _ in rows]
            for earlier, later in itertools.combinations(limits, 2):
                holds = later.width <= earlier.width and later.value_width <= earlier.value_width
                assert not (holds and (later.one_key or not earlier.one_key)), (earlier, later)


def test_the_copy_engine_is_used_only_where_there_is_one() -> None:
    for name in ("sm_80", "sm_86", "gfx942"):
        entries = [blocks for tables in (FORWARD, QUERIES, DECODING) for _, blocks in tables[name]]
        entries += [walk.blocks for _, walks in KEYS[name] for walk in walks]
        assert not any(blocks.descriptors for blocks in entries)


def test_the_interpreter_stands_in_for_the_card_that_was_measured() -> None:
    assert (chip_of(CPU), shared_bytes(CPU)) == ("sm_90", 232_448)


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (("sm_75", 65_536, 64, 128, False), "a GPU of type sm_75 is not supported; it serves sm_80, sm_86, "),
        (("gfx1100", 65_536, 64, 128, False), "a GPU of type gfx1100 is not supported; it serves sm_80, sm_86, "),
        (("sm_90", 101_376, 64, 128, False), "a GPU with 101376 bytes of shared memory for a program is not supported"),
        (("sm_90", 232_448, 64, 257, False), "heads of 257 are not supported; it serves widths up to 256"),
        (("sm_80", 166_912, 320, 64, True), "heads of 320 are not supported; it serves widths up to 256"),
    ],
)
def test_what_the_tables_do_not_serve_is_said(case: tuple[str, int, int, int, bool], sentence: str) -> None:
    said = refusal(*case)
    assert said is not None
    assert said.startswith(sentence)


V1, V2, WIDE_V2, WIDEST_V2 = (64, 128, False), (64, 64, True), (128, 128, True), (256, 256, True)
UNMEASURED = "V2 without a mask is left to PyTorch's kernels where nobody has measured which is faster"
LONG = "PyTorch's kernels are faster in training V2 with heads wider than 64 and more than 8,192 queries"


@pytest.mark.parametrize(
    ("chip", "case", "queries", "training", "masked", "sentence"),
    [
        ("sm_90", V1, 16384, True, False, None),
        ("gfx942", V1, 16384, True, False, None),
        ("sm_90", V2, 16384, True, False, None),
        ("sm_90", WIDE_V2, 8192, True, False, None),
        ("sm_90", WIDE_V2, 16384, False, False, None),
        ("sm_90", WIDE_V2, 16384, True, False, LONG),
        ("sm_90", WIDE_V2, 16384, True, True, None),
        ("sm_90", WIDEST_V2, 2048, False, False, UNMEASURED),
        ("sm_80", V2, 2048, True, False, UNMEASURED),
        ("sm_80", V2, 2048, True, True, None),
        ("sm_80", V2, 8, False, False, None),
        ("sm_80", V2, 8, True, False, UNMEASURED),
    ],
)
def test_auto_takes_what_was_measured_or_must_be_faster(
    chip: str, case: tuple[int, int, bool], queries: int, training: bool, masked: bool, sentence: str | None
) -> None:
    assert passed_over(chip, *case, queries, training, masked) == sentence


def test_auto_leaves_shared_noise_heads_of_one_key_to_the_standard_call_until_they_are_measured() -> None:
    sentence = "maps of one key that share noise heads are left to PyTorch's kernels, since nobody has measured them"
    assert passed_over("sm_90", *V2, 2048, True, False, shared=True) == sentence
    # In the standard call V1's queries are half zeros; a mask and few queries have no fast kernel there.
    assert passed_over("sm_90", *V1, 2048, True, False, shared=True) is None
    assert passed_over("sm_90", *V2, 2048, True, True, shared=True) is None
    assert passed_over("sm_80", *V2, 8, False, False, shared=True) is None


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


def test_calls_without_rows_or_keys_have_sizes_too() -> None:
    assert heads_in_wave(CPU, 0, 8) >= 1
    assert spans_of_keys(CPU, 0, 0, Blocks(16, 64, 4, 3)) == 1
