"""``diffattn train`` and ``compare`` on several ranks: one folder, one voice, one exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import commanded_ranks
from support.ranks import outcomes_of_ranks, run_ranks
from support.small_comparison import write_shape, write_text
from support.small_run import checkpoint_steps, partials, rows

STEPS = ["--steps", "8", "--checkpoints", "4", "--evaluations", "2", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("commands")
    write_shape(made)
    write_text(made)
    return made


def words(out: str, *more: str, verb: str = "train", text: str = "text") -> list[str]:
    model = ["--attention", "diff_v2"] if verb == "train" else ["--variants", "softmax", "diff_v2", "--seeds", "1"]
    return [verb, "--shape", "small.toml", "--text", text, *model, "--out", out, *more]


def one_line(ended: list[tuple[int, str, str]], status: int) -> str:
    """Returns the line that the ranks said together; all ended with the status."""
    assert [rank[0] for rank in ended] == [status] * len(ended), ended
    said = [line for _, out, error in ended for line in (out + error).splitlines() if line]
    assert len(said) == 1, said
    return said[0]


def test_rank_0_writes_and_speaks_alone(folder: Path) -> None:
    first, second = run_ranks(commanded_ranks.commanded, 2, [words("two", *STEPS, "--json")], folder)
    assert (first[0], second[0]) == (0, 0)
    assert second[1:] == ("", "")
    assert "held-out loss" in first[2]
    assert json.loads(first[1])["folder"] == "two"
    assert [row["step"] for row in rows(folder / "two") if "loss" in row] == list(range(1, 9))
    assert partials(folder / "two") == []
    assert json.loads((folder / "two/config.json").read_text())["options"]["layout"]["shard"] == "none"


def test_a_run_goes_on_with_another_number_of_ranks(folder: Path) -> None:
    shared = words("killed", *STEPS, "--shard", "full")
    outcomes = outcomes_of_ranks(commanded_ranks.commanded, 2, [shared], folder, (-1, 7))
    assert [outcome.exitcode for outcome in outcomes] == [-9, -9]
    assert checkpoint_steps(folder / "killed")[-1] in (2, 4)
    ended = run_ranks(commanded_ranks.commanded, 1, [["train", "--resume", "--out", "killed"]], folder)
    assert ended[0][0] == 0, ended
    run_ranks(commanded_ranks.commanded, 1, [words("undisturbed", *STEPS)], folder)
    expected = rows(folder / "undisturbed")
    for row, right in zip(rows(folder / "killed"), expected, strict=True):
        assert row == pytest.approx(right, abs=1e-5, rel=1e-5)


def test_a_rank_that_is_killed_ends_the_run_with_a_line(folder: Path) -> None:
    first, second = outcomes_of_ranks(commanded_ranks.commanded, 2, [words("lost", *STEPS)], folder, (1, 7))
    assert second.exitcode == -9
    status, out, error = first.value
    assert (status, out) == (1, "")
    (line,) = [line for line in error.splitlines() if line.startswith("diffattn: ")]
    assert "rank has ended" in line
    assert "Traceback" not in error
    ended = run_ranks(commanded_ranks.commanded, 2, [["train", "--resume", "--out", "lost"]], folder)
    assert [status for status, _, _ in ended] == [0, 0]


def test_a_signal_on_one_rank_saves_all(folder: Path) -> None:
    ended = run_ranks(commanded_ranks.interrupted, 2, words("stopped", *STEPS), folder, 6)
    assert [status for status, _, _ in ended] == [130, 130]
    assert "go on with: diffattn train --resume --out stopped" in ended[0][2]
    assert ended[1][1:] == ("", "")
    assert checkpoint_steps(folder / "stopped")[-1] == len([row for row in rows(folder / "stopped") if "loss" in row])


@pytest.mark.parametrize(
    ("count", "lists", "line"),
    [
        (2, [words("a", "--steps", "3"), words("a", "--steps", "4")], "steps is 3 on rank 0 and 4 on rank 1"),
        (3, [words("a")], "batch_size is 4 on 3 ranks"),
        (3, [words("a", "--tp", "3", "--batch-size", "3")], "3"),
        (2, [words("a"), words("a", "--stepz", "4")], "--stepz"),
        (2, [words("a", "--batch-size", "x")], "--batch-size 'x'"),
        (2, [words("a", "--device", "cuda")], "device is 'cuda'"),
        (2, [words("a", text="./nowhere.txt")], "nowhere.txt"),
        (2, [["generate", "--prompt", "x"]], "generate on 2 ranks"),
    ],
)
def test_a_mistake_is_one_line_and_ends_all(folder: Path, count: int, lists: list[list[str]], line: str) -> None:
    said = one_line(run_ranks(commanded_ranks.commanded, count, lists, folder), 2)
    assert said.startswith("diffattn: ")
    assert line in said
    assert not (folder / "a").exists()


@pytest.mark.parametrize("option", [["--shard", "full"], ["--tp", "2"]])
def test_one_process_has_nothing_to_share_with(folder: Path, option: list[str]) -> None:
    said = one_line(run_ranks(commanded_ranks.commanded, 1, [words("a", *option)], folder), 2)
    assert f"{' '.join(option)} in one process" in said
    assert not (folder / "a").exists()


def test_compare_trains_each_model_on_all_ranks(folder: Path) -> None:
    options = ["--steps", "2", "--device", "cpu", "--dtype", "float32", "--shard", "full", "--json"]
    first, second = run_ranks(commanded_ranks.commanded, 2, [words("both", *options, verb="compare")], folder)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert second[1:] == ("", "")
    result = json.loads(first[1])
    assert json.loads((folder / "both/result.json").read_text()) == result
    assert {*result["variants"]} == {"softmax", "diff_v2"}
    assert all(variant["train_peak_bytes"] > 0 for variant in result["variants"].values())
    assert (folder / "both/report.html").exists()
