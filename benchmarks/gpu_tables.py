"""The tables of docs/gpu.md, made from the rows of each card: `python -m benchmarks.gpu_tables` prints them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
# Columns of the tables of times, by case.
CALLS = {
    "softmax_flash": "softmax, FlashAttention-2",
    "v1_padded_default": "V1, padded call",
    "v1_unequal_cudnn": "V1, unequal widths",
    "v1_fused_triton": "**V1, Triton**",
    "v2_standard_default": "V2, standard call",
    "v2_fused_triton": "**V2, Triton**",
}
DECODED = {
    "v1_padded_default": "V1, padded call",
    "v1_unequal_default": "V1, unequal widths",
    "v1_fused_triton": "**V1, Triton**",
    "v2_standard_default": "V2, standard call",
    "v2_fused_triton": "**V2, Triton**",
}
PHASES = {"forward": "forward", "forward_backward": "forward and backward"}


def read() -> dict[str, list[Row]]:
    """The rows of each card, one file and one run each, by the card's full name."""
    cards: dict[str, list[Row]] = {}
    for path in sorted(RESULTS.glob("gpu_*.jsonl")):
        run, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        cards[run["machine"]["gpu"].removeprefix("NVIDIA ")] = rows
    return cards


def _problems(rows: list[Row], what: str, phase: str | None = None) -> dict[tuple[int, ...], dict[str, Row]]:
    found: dict[tuple[int, ...], dict[str, Row]] = {}
    for row in rows:
        if row["what"] == what and row.get("phase") == phase and "seconds" in row:
            size = row["problem"]
            key = (size["width"], size["groups"], size["batch"], size["keys"])
            found.setdefault(key, {})[row["case"]] = row
    return dict(sorted(found.items(), key=lambda item: (item[0][0], -item[0][1], item[0][3], item[0][2])))


def _table(head: list[str], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines)]


def times(rows: list[Row], phase: str) -> list[str]:
    """Ratios to cuDNN's softmax twin."""
    lines = []
    for (width, groups, _, tokens), cases in _problems(rows, "timing", phase).items():
        name = f"{width}" + (f", {groups} groups" if groups != 16 else "")
        ratios = [f"{cases[case]['ratio_to']['softmax_cudnn']['median']:.2f}" for case in CALLS]
        lines.append([name, str(tokens), f"{1e3 * cases['softmax_cudnn']['seconds']['median']:.2f} ms", *ratios])
    return _table(["width", "tokens", "softmax, cuDNN", *CALLS.values()], lines)


def decoding(rows: list[Row]) -> list[str]:
    """Ratios to the fastest softmax call."""
    lines = []
    for (width, groups, batch, keys), cases in _problems(rows, "decoding").items():
        twin = min(row["seconds"]["median"] for case, row in cases.items() if case.startswith("softmax"))
        name = f"{width}" + (f", {groups} groups" if groups != 16 else "")
        ratios = [f"{cases[case]['seconds']['median'] / twin:.2f}" for case in DECODED]
        lines.append([name, str(batch), str(keys), f"{1e6 * twin:.1f} µs", *ratios])
    return _table(["width", "batch", "keys", "softmax", *DECODED.values()], lines)


def steps(cards: dict[str, list[Row]]) -> list[str]:
    lines = []
    for card, rows in cards.items():
        cases = {row["case"]: row for row in rows if row["what"] == "step"}
        taken = f"{1e3 * cases['softmax_default']['seconds']['median']:.1f} ms"
        lines.append(
            [card, taken] + [f"{cases[c]['ratio_to']['softmax_default']['median']:.2f}" for c in list(CALLS)[1:]]
        )
    return _table(["card", "softmax", *list(CALLS.values())[1:]], lines)


def memory(rows: list[Row]) -> list[str]:
    """Peak bytes of forward and backward beyond the inputs, as ratios to softmax's; the same at every length."""
    lines = []
    for (width, groups, _, tokens), cases in _problems(rows, "timing", "forward_backward").items():
        if tokens == 4096:
            twin = cases["softmax_cudnn"]["extra_peak_bytes"]
            name = f"{width}" + (f", {groups} groups" if groups != 16 else "")
            ratios = [f"{cases[case]['extra_peak_bytes'] / twin:.2f}" for case in list(CALLS)[1:]]
            lines.append([name, f"{twin / 2**20:.0f} MiB", *ratios])
    return _table(["width", "softmax, cuDNN", *list(CALLS.values())[1:]], lines)


def launching(cards: dict[str, list[Row]]) -> list[str]:
    lines = []
    for card, rows in cards.items():
        for phase, name in PHASES.items():
            cases = {r["case"]: r for r in rows if r["what"] == "launching" and r["phase"] == phase}
            taken = [f"{1e6 * cases[c]['host_seconds']['median']:.0f}" for c in ("softmax_default", *list(CALLS)[1:])]
            lines.append([card, name, *taken])
    return _table(["card", "", "softmax", *list(CALLS.values())[1:]], lines)


def tables() -> Iterator[tuple[str, list[str]]]:
    cards = read()
    for card, rows in cards.items():
        for phase, name in PHASES.items():
            yield f"{card}, {name}", times(rows, phase)
    for card, rows in cards.items():
        yield f"{card}, decoding", decoding(rows)
    yield "a training step", steps(cards)
    yield "memory", memory(next(iter(cards.values())))
    yield "microseconds of the host", launching(cards)


if __name__ == "__main__":
    for title, lines in tables():
        print(f"\n{title}\n\n" + "\n".join(lines))
