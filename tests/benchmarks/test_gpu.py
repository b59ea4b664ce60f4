"""The prepared GPU command runs as it will on a GPU: alone, with torch, and a row for everything."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The package itself, before a benchmark loads it without its `__init__`.
import diffattn.ops.triton.configs as configs
from benchmarks import gpu_cases as cases
from benchmarks.gpu_checks import kernel_problems
from benchmarks.gpu_device import Device, short_name
from benchmarks.gpu_tables import RESULTS, read, tables

ROOT = Path(__file__).parents[2]
# A machine that has torch, Triton and what these need, and nothing else: every finder of modules finds those alone.
BARE = """
import runpy, sys

HERE = {"torch", "torchgen", "functorch", "triton", "numpy", "benchmarks", "diffattn"} | sys.stdlib_module_names
# What torch imports of other packages.
HERE |= {"typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock"}

class Few:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in HERE or top.startswith("_sysconfigdata"):
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Few, sys.meta_path)
for name in ("transformers", "safetensors"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} could be imported")
runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("gpu") / "rows.jsonl"
    command = [sys.executable, "-c", BARE, "--interpret", "--out", str(out)]
    # The package itself is not on the path: only what the command loads by file.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.mark.full
def test_a_run_says_once_where_it_is_from_and_every_section_gives_rows(rows: list[dict]) -> None:
    run, *measured = rows
    assert run["what"] == "run"
    assert {"command", "versions", "machine"} <= set(run)
    assert run["chip"] == "sm_90"
    assert set(run["blocks"]["v1 64"]) == {"forward", "queries", "keys", "decoding"}
    sections = {row["what"] for row in measured}
    wanted = {
        "ceilings",
        "serves",
        "served",
        "nan",
        "correctness",
        "timing",
        "decoding",
        "packed",
        "step",
        "launching",
        "subtraction",
    }
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


@pytest.mark.full
def test_what_serves_is_right(rows: list[dict]) -> None:
    checked = [row for row in rows if row["what"] == "correctness" and "errors" in row]
    assert {row["case"] for row in checked} >= {"softmax_math", "v1_padded_math", "v1_unequal_math", "v2_standard_math"}
    assert all(error < 1e-2 for row in checked for error in row["errors"].values())
    assert not any(sum(row["nan_values"].values()) for row in rows if row["what"] == "nan" and "nan_values" in row)


@pytest.mark.full
def test_the_kernels_run_or_say_why_not(rows: list[dict]) -> None:
    kernels = [row for row in rows if "triton" in row.get("case", "")]
    sections = {"correctness", "timing", "decoding", "packed", "step", "launching"}
    assert {row["what"] for row in kernels} - {"nan"} == sections
    for row in kernels:
        if importlib.util.find_spec("triton") is None:
            assert "triton" in row["unsupported"].lower()
        else:
            assert "unsupported" not in row
            assert row.get("same_bits", True)
            assert row.get("same_bits_in_graph", True)


@pytest.mark.full
def test_users_calls_are_measured_and_what_serves_them_is_named(rows: list[dict]) -> None:
    served = [row for row in rows if row["what"] == "served"]
    assert {row["standard"]["way"] for row in served} == {"v1_padded", "v2_standard"}
    assert all(row["standard"]["kernel"] in ("flash", "math") for row in served)
    if importlib.util.find_spec("triton") is not None:
        plain = [row for row in served if row["problem"]["dtype"] == "bfloat16" and row["call"] == "v1, 64 wide"]
        assert {row["auto"]["backend"] for row in plain} == {"fused_triton"}
    (wide, *_) = [row for row in served if row["problem"]["dtype"] == "float32"]
    assert wide["auto"]["backend"] == "standard"
    assert "float32" in wide["auto"]["passed_over"][0] or "Triton" in wide["auto"]["passed_over"][0]
    standard = [row for row in rows if row.get("case", "").endswith("diff_attention_standard")]
    assert {row["what"] for row in standard} == {"nan", "timing", "decoding", "packed", "step", "launching"}
    assert all(row["way"] in ("v1_padded", "v2_standard") for row in standard if row["what"] == "timing")


@pytest.mark.full
def test_one_and_four_queries_are_decoded(rows: list[dict]) -> None:
    decoded = [row for row in rows if row["what"] == "decoding" and row["case"] == "softmax_default"]
    assert [row["problem"]["queries"] for row in decoded] == [1, 4]


@pytest.mark.full
def test_packed_rows_are_right(rows: list[dict]) -> None:
    checked = [row for row in rows if row["what"] == "packed" and "errors" in row]
    assert {row["case"] for row in checked} >= {"v1_diff_attention_standard", "v2_diff_attention_standard"}
    assert all(error < 1e-2 for row in checked for error in row["errors"].values())


@pytest.mark.parametrize("chip", configs.TABLES)
@pytest.mark.parametrize("name", cases.PASSES)
def test_the_checks_on_a_card_take_every_entry_of_its_block_table(chip: str, name: str) -> None:
    device = Device(interpret=True)
    device.tiny = False
    problems = [problem for problem, _ in kernel_problems(device) if name != "decoding" or problem.queries <= 8]
    taken = {cases.blocks_of(kind, problem, chip)[name] for problem in problems for kind in ("v1", "v2")}
    widths = (16, 32, 64, 128, 256)
    assert taken == {
        cases.PASSES[name](chip, width, value_width, one_key)
        for width in widths
        for value_width in widths
        for one_key in (True, False)
    }


@pytest.mark.full
def test_tables_of_other_rows_have_the_columns_that_these_have(rows: list[dict]) -> None:
    renamed = [
        row | {"case": row["case"].replace("attention_fused_triton", "attention_auto")} if "case" in row else row
        for row in rows[1:]
    ]
    found = dict(tables({"a dry run": renamed}))
    head = "| width | tokens | softmax, PyTorch's choice | softmax, FlashAttention-2 | V1, padded call |"
    assert found["a dry run, forward"][0].startswith(head)
    assert {"a dry run, decoding, 1 query", "a dry run, decoding, 4 queries"} <= set(found)
    if importlib.util.find_spec("triton") is not None:
        assert "V1, `diff_attention`" in found["a dry run, forward"][0]
        assert len(found["a dry run, packed rows"]) == 2 + 4
    assert "decoding" in found["microseconds of the host"][4]


@pytest.mark.full
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
    for title, lines in tables(read()):
        assert "\n".join(lines) in text, title


def test_every_kept_check_of_the_kernels_passed() -> None:
    for rows in read().values():
        assert not [row for row in rows if row["what"] in ("failed", "stopped")]
        checks = [row for row in rows if "same_bits" in row]
        assert len(checks) == 28
        assert all(row["same_bits"] and max(row["errors"].values()) <= 0.0032 for row in checks)
