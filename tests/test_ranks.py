"""The helper that runs tests on several ranks."""

from __future__ import annotations

import time

import pytest
from support import ranks_self
from support.ranks import outcomes_of_ranks, run_ranks


def test_each_rank_takes_part() -> None:
    assert run_ranks(ranks_self.summed, 3, 10) == [(0, 33), (1, 33), (2, 33)]


def test_a_rank_that_fails_ends_the_others() -> None:
    began = time.monotonic()
    first, second = outcomes_of_ranks(ranks_self.one_fails, 2)
    assert second.exitcode == 1
    assert "rank 1 cannot" in (second.error or "")
    assert first.exitcode != 0
    assert time.monotonic() - began < 60
    with pytest.raises(AssertionError, match="rank 1 cannot"):
        run_ranks(ranks_self.one_fails, 2)
