"""The benchmark of ranks at its smallest: what a row says follows from the seconds that were measured."""

from benchmarks.scaling_ranks import Problem, step_rows


def test_efficiency_is_the_time_of_one_over_twice_that_of_two() -> None:
    problem = Problem("300K", "diff_v1", "float32", batch=4, context=16)
    seconds = {"one": [4.0, 4.0, 4.0], "apart": [2.0, 2.0, 2.0], "ddp": [2.5, 2.5, 2.5], "fsdp2": [2.2, 2.2, 2.2]}
    rows = {row["way"]: row for row in step_rows(problem, seconds)}
    assert "efficiency" not in rows["one"]
    assert rows["apart"]["efficiency"]["median"] == 1
    assert rows["ddp"]["efficiency"] == {"median": 0.8, "p20": 0.8, "p80": 0.8, "at_least": 0.85, "kept": False}
    assert rows["fsdp2"]["efficiency"]["kept"] is True
    assert rows["fsdp2"]["of_apart"]["median"] == 0.909091
    # Both train the same tokens in each step.
    assert rows["one"]["tokens_per_second"]["median"] == 16
    assert rows["ddp"]["tokens_per_second"]["median"] == 25.6
