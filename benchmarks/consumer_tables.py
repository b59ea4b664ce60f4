"""The tables of docs/small_machines.md beside llama.cpp, made from the rows of `benchmarks.consumer`.

`python -m benchmarks.machines` writes the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "consumer.jsonl"
Row = dict[str, Any]
NAMES = {"softmax": "softmax", "diff_v2": "V2", "dex": "DEX", "diff_gda_v2": "GDA"}
# What 4 bits have to keep to be the default: perplexity over that of float32, and speed over llama.cpp's with as many.
MOST_WORSE, LEAST_SPEED = 1.03, 0.8
DECODING = ("decoding 128", "decoding 2048")


def read() -> list[tuple[Row, Row | None]]:
    """The speed of every form, with its perplexity where that was measured; a later row stands for an earlier one."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.exists() else []
    found: dict[str, dict[tuple[str, ...], Row]] = {"speed": {}, "perplexity": {}}
    for row in rows:
        found[row["measure"]][tuple(row[name] for name in ("model", "attention", "engine", "format"))] = row
    return [(row, found["perplexity"].get(key)) for key, row in found["speed"].items()]


def table() -> str:
    """Speed, memory and perplexity of each form; those of equal bits stand below each other."""
    head = ["model", "form", "perplexity / float32", "file, MB", "peak memory, MB", "first token, s",
            "prefill, tokens/s", "decoding behind 128", "behind 2,048", "of the memory's rate"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for row, quality in read():
        speed = row["tokens_per_second"]
        shares = " / ".join(f"{share:.0%}" for share in row["share_of_read_bandwidth"].values())
        lines.append([
            f"{row['model']}, {NAMES.get(row['attention'], row['attention'])}", f"{row['engine']} {row['format']}",
            _ratio(quality), f"{row['file_bytes'] / 1e6:.0f}", f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['first_token_seconds']['median']:.2f}",
            *(_rate(speed[phase]["median"]) for phase in ("prefill", *DECODING)), shares,
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(quality: Row | None) -> str:
    if quality is None:
        return "–"
    ratio = quality["perplexity_ratio_to_float32"]
    return f"{ratio['mean']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def verdicts() -> str:
    """Whether our int4 keeps its limits, for each model that llama.cpp runs with as many bits."""
    lines = list(_verdicts())
    return "\n".join(lines) if lines else "No rows yet."


def _verdicts() -> Iterator[str]:
    for row, quality in read():
        if (row["engine"], row["format"]) != ("onnxruntime", "int4") or quality is None:
            continue
        worse = quality["perplexity_ratio_to_float32"]["mean"]
        beside = row["ratio_to"]["softmax llama.cpp Q4_0"]
        speeds = [beside[phase]["median"] for phase in DECODING]
        kept = worse <= MOST_WORSE and min(speeds) >= LEAST_SPEED
        yield (
            f"- {row['model']}, {NAMES.get(row['attention'], row['attention'])}, int4: perplexity {worse - 1:+.1%} "
            f"(wanted: at most {MOST_WORSE - 1:+.0%}), {speeds[0]:.2f} and {speeds[1]:.2f} times llama.cpp's Q4_0 "
            f"behind 128 and 2,048 (wanted: {LEAST_SPEED}): {'kept' if kept else 'not kept'}."
        )
