"""The kernels compiled for GPUs that are not here: every entry of the block tables has a row, and keeps to its chip."""

import functools
import importlib.util
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: it compiles the kernels", allow_module_level=True)

from diffattn.ops.triton.configs import SHARED, TABLES
from tools.gpu_compiling import KnownError, Launch, compiled
from tools.gpu_offline import Case, cases, launches, rows_of, tables

ROOT = Path(__file__).parents[3]
ROWS = ROOT / "benchmarks" / "results" / "gpu_offline.jsonl"
(PINNED,) = re.findall(r"^triton==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
WAY_OUT = "make test-gpu-offline compiles what has no row, and writes it"
pinned = pytest.mark.skipif(version("triton") != PINNED, reason=f"the rows are Triton {PINNED}'s")

# Columns of tensor memory that a multiprocessor of Blackwell's has.
TENSOR_MEMORY = 512
# The kernels whose work is products of matrices. Those with few registers were cut short by the compiler.
PRODUCTS = {"noise", "output", "d_q", "d_kv", "d_k", "d_v", "span"}
FEWEST_REGISTERS = 64
# The instruction that multiplies on each chip; a decoded tile has 16 rows, too few for those of sm_90 and sm_100.
INSTRUCTION = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "mfma"}
# Bytes that a thread may spill into memory, and where it may spill more.
MOST_SPILLED = 64
SPILLED = {
    ("sm_80", "two keys, 256", "d_k"): 96,
    # The fastest of many on the card; those of 256 were run there but not timed.
    ("sm_90", "V1, 64", "d_kv"): 80,
    ("sm_90", "V1, 128", "output"): 400,
    ("sm_90", "V1, 128", "d_q"): 272,
    ("sm_90", "V1, 128", "d_k"): 608,
    ("sm_90", "V2, 64", "output"): 176,
    ("sm_90", "V2, 128", "d_q"): 232,
    ("sm_90", "V2, 256", "output"): 224,
    ("sm_90", "V2, 256", "d_q"): 1088,
    ("sm_90", "V2, 256", "d_k"): 280,
    ("sm_90", "V2, 256", "d_v"): 152,
    ("sm_90", "two keys, 256", "output"): 224,
    ("sm_90", "two keys, 256", "d_q"): 1496,
    ("sm_90", "two keys, 256", "d_k"): 384,
    ("sm_90", "two keys, 256", "d_v"): 216,
    ("sm_100", "V1, 128", "d_k"): 104,
    ("sm_100", "V2, 128", "d_kv"): 152,
    ("sm_100", "V2, 256", "d_k"): 144,
    ("sm_100", "two keys, 256", "d_k"): 416,
}
# Timed with Triton 3.6, and the fastest: with 3.7.1 its products wait for each other where nothing is saved.
SERIALISED = ("sm_90", "V2, 64", "causal", "output", False)


NAMES = ("chip", "shape", "mask", "kernel", "training")


def beyond(row: dict[str, Any]) -> list[str]:
    """What a row takes that it may not take."""
    taken, table = row["taken"], TABLES[row["chip"]]
    wrong = []
    if taken["shared"] > SHARED[table]:
        wrong.append("shared memory")
    if taken.get("tensor_memory", 0) > TENSOR_MEMORY:
        wrong.append("tensor memory")
    if taken["spilled"] > SPILLED.get((row["chip"], row["shape"], row["kernel"]), MOST_SPILLED):
        wrong.append("spills")
    if taken.get("serialised") and tuple(row[name] for name in NAMES) != SERIALISED:
        wrong.append("products that wait for each other")
    if row["kernel"] in PRODUCTS:
        if taken["registers"] <= FEWEST_REGISTERS:
            wrong.append("few registers")
        instruction = INSTRUCTION.get(table, "mma.sync")
        if row["kernel"] == "span" and table != "gfx942":
            instruction = "mma.sync"
        if not taken[instruction]:
            wrong.append(f"no {instruction}")
    return wrong


@functools.cache
def wanted() -> dict[str, tuple[Case, str, Launch]]:
    """The launches of today's kernels at every entry, by their keys."""
    return {launch.key: (case, kernel, launch) for case in cases() for kernel, _, launch in launches(case)}


@pinned
def test_every_entry_of_the_tables_has_a_row_of_todays_kernels() -> None:
    missing = {(*case, kernel) for key, (case, kernel, _) in wanted().items() if key not in rows_of(ROWS)}
    assert not missing, WAY_OUT


@pinned
def test_no_row_is_of_a_kernel_that_is_no_more() -> None:
    assert not rows_of(ROWS).keys() - wanted().keys(), WAY_OUT


def test_rows_say_what_made_them() -> None:
    for row in rows_of(ROWS).values():
        assert row["command"].startswith("python -m tools.gpu_offline")
        assert row["versions"]["triton"] == PINNED
    assert ROWS.stat().st_size < 500_000


def test_the_page_has_the_tables_of_the_rows() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert "\n".join(tables(list(rows_of(ROWS).values()))) in page, "python -m tools.gpu_offline --table prints them"


def test_every_row_keeps_to_its_chip() -> None:
    wrong = {(row["chip"], row["shape"], row["mask"], row["kernel"]): beyond(row) for row in rows_of(ROWS).values()}
    assert {case: found for case, found in wrong.items() if found} == {}


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        ({"shared": 232_449}, "shared memory"),
        ({"tensor_memory": 544}, "tensor memory"),
        ({"spilled": 5_972}, "spills"),
        ({"serialised": True}, "products that wait for each other"),
        ({"registers": 32}, "few registers"),
        ({"wgmma.mma_async": 0}, "no wgmma.mma_async"),
    ],
)
def test_what_a_chip_does_not_have_is_seen(planted: dict[str, int], said: str) -> None:
    taken = {"shared": 232_448, "tensor_memory": 512, "spilled": 0, "serialised": False, "registers": 255}
    case = Case("sm_90", "V1, 64", "bfloat16", "causal", training=True)
    row = {**case._asdict(), "kernel": "output", "taken": taken | {"wgmma.mma_async": 32}}
    assert beyond(row) == []
    assert beyond(row | {"taken": row["taken"] | planted}) == [said]


# Of each chip the forward pass and both passes behind it, which take about two seconds each.
@pinned
@pytest.mark.parametrize("shape", ["V1, 64", "V2, 64"])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_kernels_compile_for_a_gpu_that_is_not_here(chip: str, shape: str) -> None:
    case = Case(chip, shape, "bfloat16", "causal", training=True)
    found = {kernel: launch for kernel, _, launch in launches(case)}
    assert found.keys() == {"output", "sums", "d_q", "d_kv"}
    for kernel in ("output", "d_q", "d_kv"):
        _, taken = compiled(found[kernel])
        assert beyond(case._asdict() | {"kernel": kernel, "taken": taken}) == []


@pinned
def test_code_that_is_known_is_not_compiled_again() -> None:
    found = {kernel: launch for kernel, _, launch in launches(Case("sm_80", "V2, 64", "bfloat16", "causal", True))}
    code, _ = compiled(found["sums"])
    with pytest.raises(KnownError, match=code):
        compiled(found["sums"], {code})


def test_a_key_follows_the_statements_the_arguments_and_the_chip() -> None:
    one = Case("sm_80", "V2, 64", "bfloat16", "causal", training=True)
    others = [one._replace(chip="sm_86"), one._replace(dtype="float16"), one._replace(mask="ranges")]
    keys = [next(launch.key for _, _, launch in launches(case)) for case in (one, one, *others)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4
