"""The numbers of the page's last panel are the planner's."""

import pytest

from diffattn.demo.panel import CLAIMED_SHARE, SIZES, panel
from diffattn.plan.answer import plan
from diffattn.plan.setting import Setting


@pytest.fixture(scope="module")
def rows():
    return panel()["rows"]


def test_sizes_go_from_a_million_to_seventy_billion(rows):
    assert [row["size"] for row in rows] == list(SIZES) == sorted(SIZES)
    assert (SIZES[0], SIZES[-1]) == (10**6, 7 * 10**10)
    for row in rows:
        for model in row["equal"].values():
            assert model["parameters"] == pytest.approx(row["size"], rel=0.02)


def test_models_of_a_row_are_as_large_as_each_other(rows):
    for row in rows:
        for model in row["equal"].values():
            assert model["parameters"] == pytest.approx(row["equal"]["softmax"]["parameters"], rel=0.006)
        assert row["smaller"]["parameters"] == pytest.approx(CLAIMED_SHARE * row["size"], rel=0.02)


def test_numbers_are_those_of_the_planner(rows):
    # Above half a billion the vocabulary is that of the planner's own sizes, and few channels are added to them.
    row = next(row for row in rows if row["size"] == 7 * 10**9)
    for attention, found in row["equal"].items():
        planned = plan(f"{attention}:about-7B", setting=Setting(context=4096)).model.estimate
        assert found["cache"] == planned.decoding.memory.cache
        for name, total in (
            ("parameters", planned.parameters.total),
            ("decoding", planned.decoding.memory.total),
            ("training", planned.training.memory.total),
        ):
            assert found[name] == pytest.approx(total, rel=0.02)


def test_the_cache_is_as_large_and_memory_is_not_twice_but_where_maps_are_written(rows):
    for row in rows:
        softmax = row["equal"]["softmax"]
        for name in ("diff_v1", "diff_v2"):
            model = row["equal"][name]
            assert model["cache"] == softmax["cache"]
            assert model["decoding"] <= 1.01 * softmax["decoding"]
            assert model["training"] <= 1.2 * softmax["training"]
            assert model["written"] > softmax["written"]
        assert row["smaller"]["decoding"] < softmax["decoding"]
