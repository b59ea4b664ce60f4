"""Memory is counted exactly where the count can be written down, and time is positive."""

import dataclasses
from pathlib import Path

import pytest
import torch
from support.small_run import RECIPE, small_model

from diffattn.data.packing import PreparedData
from diffattn.train.measure import measure_load, measure_step, peak_bytes

MEBIBYTE = 2**20


def block(mebibytes: int) -> torch.Tensor:
    return torch.empty(mebibytes * MEBIBYTE, dtype=torch.uint8)


def one_after_another() -> None:
    for size in (3, 7, 5):
        block(size)


def all_at_once() -> None:
    kept = [block(size) for size in (3, 7, 5)]
    kept.clear()


def a_peak_in_the_middle() -> None:
    first = block(2)
    second = block(11)
    del second
    third = block(4)
    del first, third


def nothing() -> None:
    pass


@pytest.mark.parametrize(
    ("function", "mebibytes"), [(one_after_another, 7), (all_at_once, 15), (a_peak_in_the_middle, 13), (nothing, 0)]
)
def test_the_peak_of_a_function_is_exact(function, mebibytes: int) -> None:
    assert peak_bytes(function, [], "cpu") == mebibytes * MEBIBYTE


def test_what_is_alive_before_counts_once_per_storage() -> None:
    weight = block(6)
    views = [weight, weight[MEBIBYTE:], weight.view(2, -1)]
    assert peak_bytes(one_after_another, [*views, block(1)], "cpu") == (6 + 1 + 7) * MEBIBYTE


def test_what_ran_before_does_not_count() -> None:
    kept = [block(50)]
    all_at_once()
    assert peak_bytes(one_after_another, [], "cpu") == 7 * MEBIBYTE
    kept.clear()


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2"])
def test_a_step_costs_the_same_bytes_each_time_and_more_than_its_state(attention: str, data: PreparedData) -> None:
    costs = [measure_step(small_model(attention), data, RECIPE) for _ in range(2)]
    assert costs[0].peak_bytes == costs[1].peak_bytes
    assert min(cost.seconds for cost in costs) > 0
    weights = sum(weight.nbytes for weight in small_model(attention).parameters())
    logits = RECIPE.batch_size * 32 * 300 * 4
    # Weights, gradients, two moments; the logits and their gradient.
    assert costs[0].peak_bytes > max(4 * weights, 2 * weights + 2 * logits)
    assert costs[0].peak_bytes < 4 * weights + 20 * logits


def test_more_blocks_cost_more_and_accumulated_ones_do_not(data: PreparedData) -> None:
    def peak(batch_size: int, gradient_accumulation: int) -> int:
        recipe = dataclasses.replace(
            RECIPE, batch_size=batch_size, gradient_accumulation=gradient_accumulation, dtype="float32"
        )
        return measure_step(small_model(), data, recipe, steps=1).peak_bytes

    whole, parts, part = peak(8, 1), peak(2, 4), peak(2, 1)
    assert whole > 2 * part
    # Later passes have the gradients of the first in memory.
    weights = sum(weight.nbytes for weight in small_model().parameters())
    assert part <= parts <= part + weights


def test_loading_and_the_first_token_take_time(whole: Path) -> None:
    cost = measure_load(whole / "model", "cpu", repeats=2)
    assert 0 < cost.load_seconds < 60
    assert 0 < cost.first_token_seconds < 60
