import json

import torch
from support.fused_cases import require_kernel

from benchmarks import packed_rows


def test_every_case_is_timed_in_both_phases_and_dtypes(tmp_path) -> None:
    for dtype in packed_rows.DTYPES.values():
        require_kernel(dtype)
    threads, path = torch.get_num_threads(), tmp_path / "rows.jsonl"
    packed_rows.main(
        ["--sequences", "3", "--length", "20", "--threads", str(threads), "--repeats", "1", "--out", str(path)]
    )
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({(row["phase"], row["dtype"], row["case"]) for row in rows}) == len(rows) == 16
    assert all(row["seconds"]["median"] > 0 and row["command"] for row in rows)
    assert all(row["of_one"]["median"] == 1 for row in rows if row["case"] == "one sequence")
    assert all(("kept" in row["of_one"]) == (row["case"] == "packed") for row in rows)


def test_what_is_not_served_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(packed_rows.build, "unavailable", lambda dtype: "fused_cpu: switched off")
    packed_rows.main(["--out", str(tmp_path / "rows.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["dtype"], row["unsupported"]) for row in rows] == [
        (dtype, "fused_cpu: switched off") for dtype in packed_rows.DTYPES
    ]


def test_packed_queries_are_those_of_each_sequence() -> None:
    assert packed_rows.packed(2, 3).tolist() == [[[0, 1, 2, 3, 4, 5]], [[3, 3, 3, 6, 6, 6]]]
