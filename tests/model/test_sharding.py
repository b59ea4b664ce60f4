"""A model that is spread over ranks computes what one process computes, in every way of spreading it."""

from __future__ import annotations

import pytest
from support import sharded
from support.ranks import run_ranks

from diffattn.errors import ConfigError
from diffattn.model.sharding import mesh_sizes

# Sums in another order: of the losses as such, and of gradients as a part of the largest number of each.
LOSS, GRADIENT = 1e-6, 5e-6


@pytest.fixture(scope="module")
def four_ranks() -> dict[str, tuple[float, str, float]]:
    """What four ranks found, which is one launch for all tests."""
    ways = [("full", 1), ("hybrid", 1), ("none", 1), ("full", 2)]
    return run_ranks(sharded.errors, 4, list(sharded.MODELS), ways)[0]


@pytest.mark.parametrize("way", ["full 1", "hybrid 1", "none 1", "full 2"])
@pytest.mark.parametrize("name", sharded.MODELS)
def test_four_ranks_have_the_loss_and_the_gradients_of_one_process(name, way, four_ranks):
    loss, worst, gradient = four_ranks[f"{name} {way}"]
    assert abs(loss) <= LOSS
    assert gradient <= GRADIENT, worst


@pytest.mark.parametrize(
    ("shard", "tensor", "sizes"),
    [("full", 1, (1, 8, 1)), ("full", 2, (1, 4, 2)), ("none", 4, (2, 1, 4)), ("hybrid", 2, (2, 2, 2))],
)
def test_a_mesh_has_three_named_sizes_that_multiply_to_the_ranks(shard, tensor, sizes):
    assert mesh_sizes(8, shard=shard, tensor=tensor, per_host=4) == sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": "half"}, "shard='half'; wanted none, full or hybrid: correct the name"),
        ({"shard": "full", "tensor": 3}, "tensor parallelism over 3 ranks of 8; .*: take one of 1, 2, 4, 8"),
        ({"shard": "hybrid", "per_host": 3}, "shard='hybrid' with 8 ranks, 3 on each host and 1 for each layer"),
        ({"shard": "hybrid", "per_host": 2, "tensor": 4}, "2 on each host and 4 for each layer"),
    ],
)
def test_numbers_of_ranks_that_do_not_divide_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        mesh_sizes(8, **options)
