"""The prepared GPU command runs as it will on a GPU: alone, with torch, and a row for everything."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_device import short_name
from benchmarks.gpu_tables import RESULTS, read, tables

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("gpu") / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu", "--interpret", "--out", str(out)]
    # The package itself is not on the path: only what the command loads by file.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_a_run_says_once_where_it_is_from_and_every_section_gives_rows(rows: list[dict]) -> None:
    run, *measured = rows
    assert run["what"] == "run"
    assert {"command", "versions", "machine"} <= set(run)
    sections = {row["what"] for row in measured}
    wanted = {"ceilings", "serves", "nan", "correctness", "timing", "decoding", "step", "launching", "subtraction"}
    assert sections == wanted
    for row in measured:
        assert (row["benchmark"], row["gpu"]) == ("gpu", None)
        assert "at_second" in row
        assert not {"command", "versions", "machine"} & set(row)


@pytest.mark.parametrize(
    ("gpu", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 PCIe", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
        (None, None),
    ],
)
def test_a_row_names_its_card_shortly(gpu: str | None, short: str | None) -> None:
    assert short_name(gpu) == short


@pytest.mark.parametrize("card", ["h100", "h200"])
def test_a_cards_kept_rows_are_one_run_in_a_small_file(card: str) -> None:
    path = RESULTS / f"gpu_{card}.jsonl"
    assert path.stat().st_size < 500_000
    run, *measured = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    assert run["what"] == "run"
    assert short_name(run["machine"]["gpu"]) == run["gpu"] == card.upper()
    assert all(row["what"] != "run" and row["gpu"] == run["gpu"] for row in measured)


def test_what_serves_is_right(rows: list[dict]) -> None:
    checked = [row for row in rows if row["what"] == "correctness" and "errors" in row]
    assert {row["case"] for row in checked} >= {"softmax_math", "v1_padded_math", "v1_unequal_math", "v2_standard_math"}
    assert all(error < 1e-2 for row in checked for error in row["errors"].values())
    assert not any(sum(row["nan_values"].values()) for row in rows if row["what"] == "nan" and "nan_values" in row)


def test_the_kernels_run_or_say_why_not(rows: list[dict]) -> None:
    kernels = [row for row in rows if "triton" in row.get("case", "")]
    assert {row["what"] for row in kernels} == {"correctness", "timing", "decoding", "step", "launching"}
    for row in kernels:
        if importlib.util.find_spec("triton") is None:
            assert row["unsupported"] == "No module named 'triton'"
        else:
            assert "unsupported" not in row
            assert row.get("same_bits", True)


def test_refusals_are_reasons(rows: list[dict]) -> None:
    refused = [row for row in rows if row["what"] == "timing" and "unsupported" in row]
    assert refused
    assert all(len(row["unsupported"]) > 10 for row in refused)


def test_without_a_gpu_it_names_the_way_out() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "pass --interpret" in done.stderr


def test_the_tables_of_the_documentation_are_those_of_the_rows() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    for title, lines in tables():
        assert "\n".join(lines) in text, title


def test_every_kept_check_of_the_kernels_passed() -> None:
    for rows in read().values():
        assert not [row for row in rows if row["what"] in ("failed", "stopped")]
        checks = [row for row in rows if "same_bits" in row]
        assert len(checks) == 28
        assert all(row["same_bits"] and max(row["errors"].values()) <= 0.0032 for row in checks)
