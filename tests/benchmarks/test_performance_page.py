"""The ratios of docs/performance.md and of the README's table are those of the rows."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
PHASES = {"forward": "forward", "forward and backward": "forward_backward", "decoding": "decode"}


def rows(name: str) -> list[dict[str, Any]]:
    text = (ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def table(page: str, corner: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table whose first cell begins with a text."""
    lines = page[page.index(f"\n| {corner}") :].strip().split("\n\n")[0].splitlines()
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return head, body


def ratio_of_attention(file: str, case: str, phase: str, dtype: str, keys: int) -> str:
    (found,) = (
        row
        for row in rows(file)
        if (row["case"], row.get("phase"), row["dtype"]) == (case, phase, dtype) and row["problem"]["keys"] == keys
    )
    return f"{found['ratio_to']['softmax']['median']:.2f}"


def test_attention() -> None:
    cases = ["v1_fused", "v1_standard", "v2_fused", "v2_standard", "v1_fused", "v2_fused"]
    files = ["attention.jsonl"] * 4 + ["attention_avx2.jsonl"] * 2
    _, body = table(PAGE, "| V1, fused")
    assert len(body) == 8
    for name, *cells in body:
        dtype, phase, *_ = name.split(", ")
        keys = int(re.findall(r"\d{4}", name)[0])
        for cell, case, file in zip(cells, cases, files, strict=True):
            if cell != "–":
                assert cell == ratio_of_attention(file, case, PHASES[phase], dtype, keys), (name, case)


def test_shared_noise_heads() -> None:
    _, body = table(PAGE, "forward | 4:1")
    assert len(body) == 4
    for name, *cells in body:
        dtype, keys = re.fullmatch(r"(\w+), (\d+) tokens", name).groups()  # type: ignore[union-attr]
        (found,) = (
            row
            for row in rows("attention_shared.jsonl")
            if (row["case"], row["dtype"]) == ("gda_fused", dtype) and row["problem"]["keys"] == int(keys)
        )
        assert cells == [f"{found['ratio_to'][to]['median']:.2f}" for to in ("v1_grouped_fused", "softmax")], name
        assert found["ratio_to"]["v1_grouped_fused"]["kept"], name


def ratio_of_a_step(model: str, to: str, dtype: str, problem: tuple[int, int]) -> str:
    (found,) = (
        row
        for row in rows("training_step.jsonl")
        if (row["model"], row["problem"]["dtype"]) == (model, dtype)
        and (row["problem"]["batch"], row["problem"]["context"]) == problem
    )
    return f"{found['ratio_to'][to]['median']:.2f}"


def test_training_steps() -> None:
    cases = [("softmax", "llama"), ("diff_v1", "softmax"), ("diff_v1", "diffllama"), ("diff_v2", "softmax")]
    _, body = table(PAGE, "30M shape")
    assert len(body) == 4
    for name, *cells in body:
        dtype, batch, context = re.fullmatch(r"(\w+), (\d)×(\d+) tokens", name).groups()  # type: ignore[union-attr]
        expected = [ratio_of_a_step(*case, dtype, (int(batch), int(context))) for case in cases]
        assert cells == expected, name


def test_the_readme() -> None:
    head, body = table((ROOT / "README.md").read_text(encoding="utf-8"), "| V1, float32")
    expected = []
    for phase, keys in (("forward", 2048), ("forward_backward", 2048), ("decode", 4096)):
        expected.append(
            [
                ratio_of_attention(
                    "attention.jsonl", f"{name.split(', ')[0].lower()}_fused", phase, name.split(", ")[1], keys
                )
                for name in head[1:]
            ]
        )
    expected.append(
        [
            ratio_of_a_step(f"diff_{name.split(', ')[0].lower()}", "softmax", name.split(", ")[1], (4, 512))
            for name in head[1:]
        ]
    )
    assert [cells for _, *cells in body] == expected
