"""Ranks that meet, agree and end together, without a training."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import joined_ranks
from support.ranks import outcomes_of_ranks, run_ranks

from diffattn.errors import ConfigError
from diffattn.rank import rank_here
from diffattn.train.spread.layout import Layout
from diffattn.train.spread.ranks import joined


def test_ranks_hear_what_the_first_says(tmp_path: Path) -> None:
    heard = run_ranks(joined_ranks.talked, 3, tmp_path)
    turns = [[f"turn {turn} of rank 0", True, False, 1.0] for turn in range(2)]
    assert heard == [[*turns[0], *turns[1], "by rank 0"]] * 3


def test_one_process_joins_nobody() -> None:
    with joined(agree={"steps": 3}) as here:
        assert here.world == 1
        assert here.is_first
        assert here.share(lambda: 5) == here.first_on_host(lambda: 5) == 5
        assert here.mean(6.0, 2) == 3.0
        assert not here.any(False)


def test_ranks_that_disagree_name_the_option() -> None:
    ended = run_ranks(joined_ranks.ending, 3, [{"steps": 3}, {"steps": 3}, {"steps": 4}])
    assert [status for status, _ in ended] == [2, 2, 2]
    assert [line for _, line in ended if line] == [
        "steps is 3 on rank 0 and 4 on rank 2; wanted the same options on every rank: "
        "start all ranks by one command, with one environment"
    ]


def test_the_rank_that_fails_says_why_and_all_end() -> None:
    ended = run_ranks(joined_ranks.ending, 3, [{}] * 3, joined_ranks.rank_1_refuses)
    assert ended == [(2, ""), (2, "rank 1 has a bad disk; wanted a good one: mend it"), (2, "")]


def test_a_rank_that_is_killed_ends_the_others_with_one_line() -> None:
    first, second, third = outcomes_of_ranks(joined_ranks.ending, 3, [{}] * 3, joined_ranks.rank_1_is_killed)
    assert second.exitcode == -9
    lines = [outcome.value for outcome in (first, third) if outcome.value is not None]
    assert all(status == 1 for status, _ in lines)
    assert sum("another rank has ended" in line for _, line in lines) <= 1


def test_ranks_wait_for_a_first_that_lives() -> None:
    assert run_ranks(joined_ranks.ending, 2, [{}] * 2, joined_ranks.rank_0_is_late) == [(0, ""), (0, "")]


def test_a_wrapper_that_would_not_be_applied_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="ACCELERATE_USE_FSDP is set"), joined():
        pass


@pytest.mark.parametrize(
    "said", [{"RANK": "one", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "0"}]
)
def test_an_environment_that_is_no_rank_is_refused(said: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="in the environment"):
        rank_here(said)


def test_the_environment_of_this_process_is_read_when_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank_here().world == int(os.environ.get("WORLD_SIZE", "1"))
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    here = rank_here()
    assert (here.number, here.world, here.local, here.per_host) == (3, 8, 1, 2)


@pytest.mark.parametrize(
    ("layout", "world", "batch_size", "given"),
    [
        (Layout(shard="full"), 1, 4, "--shard full in one process"),
        (Layout(tensor_parallel=2), 1, 4, "--tp 2 in one process"),
        (Layout(tensor_parallel=2), 3, 4, "--tp 2 on 3 ranks"),
        (Layout(), 3, 4, "batch_size is 4 on 3 ranks"),
        (Layout(shard="full", tensor_parallel=2), 6, 4, "batch_size is 4 on 3 ranks"),
    ],
)
def test_a_layout_that_the_ranks_do_not_allow_is_refused(
    layout: Layout, world: int, batch_size: int, given: str
) -> None:
    with pytest.raises(ConfigError, match=given):
        layout.check(world, batch_size)


@pytest.mark.parametrize("options", [{"shard": "half"}, {"tensor_parallel": 0}])
def test_a_layout_that_is_none_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Layout(**options)  # type: ignore[arg-type]
