"""What the planner says of the Triton kernel without torch, against the kernel's own block table."""

from dataclasses import replace

import pytest
import torch

from diffattn.attention_flops import ONE_WALK
from diffattn.ops.triton import configs
from diffattn.plan.activations import TRITON_CHIPS, WIDEST, serving
from diffattn.plan.hardware import Machine
from diffattn.plan.inference import LEAST_SPAN, MOST_SPANS
from diffattn.plan.shape import ModelShape
from diffattn.variants import VARIANTS

SHAPE = ModelShape.preset("3M").grouped(3)
# Widths of a softmax head; V1's values are twice as wide.
WIDTHS = (16, 32, 64, 66, 80, 96, 128, 130, 256)
FORMS = {"diff_v1": False, "diff_v2": True, "diff_gda": False, "diff_gda_v2": True}


def widths(attention: str, width: int) -> tuple[int, int, bool]:
    return width, VARIANTS[attention].heads(replace(SHAPE, head_dim=width)).width, FORMS[attention]


def test_chips_and_widths_are_those_of_the_table() -> None:
    assert set(TRITON_CHIPS) == set(configs.TABLES)
    assert WIDEST == configs.MOST_WIDTH
    assert MOST_SPANS == configs.MOST_SPANS
    tiles = [blocks.keys for table in configs.DECODING.values() for _, blocks in table]
    assert 2 * min(tiles) == LEAST_SPAN


@pytest.mark.parametrize("attention", FORMS)
@pytest.mark.parametrize("chip", [*TRITON_CHIPS, "sm_70"])
def test_auto_takes_the_kernel_where_the_table_does(chip: str, attention: str) -> None:
    machine = Machine("card", chip=chip)
    for width in WIDTHS:
        shape, sizes = replace(SHAPE, head_dim=width), widths(attention, width)
        shared = VARIANTS[attention].shares_noise
        for context in (9, 4096, 8192, 8193, 16384):
            for trains in (False, True):
                found = serving(shape, attention, machine, activations="bf16", context=context, trains=trains)
                taken = configs.refusal(chip, 10**6, *sizes) is None and (
                    configs.passed_over(chip, *sizes, queries=context, training=trains, masked=False, shared=shared)
                    is None
                )
                assert found == ("fused_triton" if taken else "standard"), (width, context, trains)


@pytest.mark.parametrize("attention", FORMS)
@pytest.mark.parametrize("chip", [chip for chip in TRITON_CHIPS if chip.startswith("sm_")])
def test_walks_are_those_of_nvidias_chips(chip: str, attention: str) -> None:
    """AMD's have one walk for V1's wide heads, too; no machine of the planner has such a chip."""
    for width in WIDTHS:
        sizes = widths(attention, width)
        if sizes[1] <= WIDEST:
            assert len(configs.key_walks(chip, *sizes)) == (2 if sizes[1] > ONE_WALK else 1)


@pytest.mark.parametrize("attention", FORMS)
def test_spans_of_keys_are_no_more_than_are_counted(attention: str) -> None:
    for width in (64, 128):
        blocks = configs.decoding_blocks("sm_90", *widths(attention, width))
        for keys in (1, 65, 1000, 32768):
            spans = configs.spans_of_keys(torch.device("cpu"), 1, keys, blocks)
            assert spans <= min(-(-keys // LEAST_SPAN), MOST_SPANS)
