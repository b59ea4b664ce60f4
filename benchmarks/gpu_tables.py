"""The tables of docs/gpu.md, made from the rows of each card: `python -m benchmarks.gpu_tables` prints them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
# Columns of the tables, by case. A table has those that its rows have: rows of older commands lack the last two.
USERS = {
    "v1_diff_attention_auto": "V1, `diff_attention`",
    "v2_diff_attention_auto": "V2, `diff_attention`",
}
CALLS = {
    "softmax_flash": "softmax, FlashAttention-2",
    "v1_padded_default": "V1, padded call",
    "v1_unequal_cudnn": "V1, unequal widths",
    "v1_fused_triton": "**V1, Triton**",
    "v2_standard_default": "V2, standard call",
    "v2_fused_triton": "**V2, Triton**",
} | USERS
DECODED = {
    "v1_padded_default": "V1, padded call",
    "v1_unequal_default": "V1, unequal widths",
    "v1_fused_triton": "**V1, Triton**",
    "v2_standard_default": "V2, standard call",
    "v2_fused_triton": "**V2, Triton**",
} | USERS
PACKED = {
    "fused_triton": "Triton, packed",
    "fused_triton_one_sequence": "Triton, one sequence",
    "diff_attention_auto": "`diff_attention`, packed",
    "diff_attention_standard": "standard call, packed",
}
PHASES = {"forward": "forward", "forward_backward": "forward and backward", "decoding": "decoding"}


def read() -> dict[str, list[Row]]:
    """The rows of each card, one file and one run each, by the card's full name."""
    cards: dict[str, list[Row]] = {}
    for path in sorted(RESULTS.glob("gpu_*.jsonl")):
        run, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        # benchmarks.gpu_offline's rows are of cards that nobody had.
        if (run.get("machine") or {}).get("gpu"):
            cards[run["machine"]["gpu"].removeprefix("NVIDIA ")] = rows
    return cards


def _problems(rows: list[Row], what: str, phase: str | None = None) -> dict[tuple[int, ...], dict[str, Row]]:
    """The cases of each problem: width, groups, batch, keys, queries."""
    found: dict[tuple[int, ...], dict[str, Row]] = {}
    for row in rows:
        if row["what"] == what and row.get("phase") == phase and "seconds" in row:
            size = row["problem"]
            key = (size["width"], size["groups"], size["batch"], size["keys"], size["queries"])
            found.setdefault(key, {})[row["case"]] = row
    return dict(sorted(found.items(), key=lambda item: (item[0][0], -item[0][1], item[0][3], item[0][2])))


def _columns(names: Mapping[str, str], found: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Those of the named cases that one of the problems has."""
    present = {case for cases in found for case in cases}
    return {case: title for case, title in names.items() if case in present}


def _table(head: list[str], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines)]


def _name(width: int, groups: int) -> str:
    return f"{width}" + (f", {groups} groups" if groups != 16 else "")


def _ratio(cases: Mapping[str, Row], case: str, twin: str) -> str:
    return f"{cases[case]['ratio_to'][twin]['median']:.2f}" if "ratio_to" in cases.get(case, {}) else "–"


def twin_of(cases: Mapping[str, Any]) -> str:
    """The softmax call that ratios are of: through cuDNN, or where a card has none by PyTorch's own choice."""
    return "softmax_cudnn" if "softmax_cudnn" in cases else "softmax_default"


TWINS = {"softmax_cudnn": "softmax, cuDNN", "softmax_default": "softmax, PyTorch's choice"}


def times(rows: list[Row], phase: str) -> list[str]:
    """Ratios to the softmax twin."""
    found = _problems(rows, "timing", phase)
    columns, lines = _columns(CALLS, found.values()), []
    twin = twin_of(_columns(TWINS, found.values()))
    for (width, groups, _, tokens, _), cases in found.items():
        ratios = [_ratio(cases, case, twin) for case in columns]
        taken = f"{1e3 * cases[twin]['seconds']['median']:.2f} ms"
        lines.append([_name(width, groups), str(tokens), taken, *ratios])
    return _table(["width", "tokens", TWINS[twin], *columns.values()], lines)


def decoding(rows: list[Row]) -> Iterator[tuple[int, list[str]]]:
    """Ratios to the fastest softmax call, a table for each number of queries."""
    found = _problems(rows, "decoding")
    columns = _columns(DECODED, found.values())
    for queries in sorted({key[4] for key in found}):
        lines = []
        for (width, groups, batch, keys, _), cases in ((k, c) for k, c in found.items() if k[4] == queries):
            twin = min(row["seconds"]["median"] for case, row in cases.items() if case.startswith("softmax"))
            ratios = [f"{cases[c]['seconds']['median'] / twin:.2f}" if c in cases else "–" for c in columns]
            lines.append([_name(width, groups), str(batch), str(keys), f"{1e6 * twin:.1f} µs", *ratios])
        yield queries, _table(["width", "batch", "keys", "softmax", *columns.values()], lines)


def packed(rows: list[Row]) -> list[str]:
    """Times of a row of packed sequences as ratios to those of the same sequences as a batch, through our kernels."""
    lines = []
    for phase, name in PHASES.items():
        for (width, *_), cases in _problems(rows, "packed", phase).items():
            for kind in ("v1", "v2"):
                batch = cases[f"{kind}_fused_triton_batch"]["seconds"]["median"]
                ratios = [_ratio(cases, f"{kind}_{case}", "fused_triton_batch") for case in PACKED]
                lines.append([f"{kind.upper()}, {name}", str(width), f"{1e3 * batch:.2f} ms", *ratios])
    return _table(["", "width", "Triton, a batch", *PACKED.values()], lines) if lines else []


def steps(cards: dict[str, list[Row]]) -> list[str]:
    found = {card: {row["case"]: row for row in rows if row["what"] == "step"} for card, rows in cards.items()}
    columns, lines = _columns(dict(list(CALLS.items())[1:]), found.values()), []
    for card, cases in found.items():
        taken = f"{1e3 * cases['softmax_default']['seconds']['median']:.1f} ms"
        lines.append([card, taken, *(_ratio(cases, case, "softmax_default") for case in columns)])
    return _table(["card", "softmax", *columns.values()], lines)


def memory(rows: list[Row]) -> list[str]:
    """Peak bytes of forward and backward beyond the inputs, as ratios to softmax's; the same at every length."""
    found = {key: c for key, c in _problems(rows, "timing", "forward_backward").items() if key[3] == 4096}
    columns, lines = _columns(dict(list(CALLS.items())[1:]), found.values()), []
    twin = twin_of(_columns(TWINS, found.values()))
    for (width, groups, *_), cases in found.items():
        bytes_of = {case: row["extra_peak_bytes"] for case, row in cases.items()}
        ratios = [f"{bytes_of[case] / bytes_of[twin]:.2f}" if case in cases else "–" for case in columns]
        lines.append([_name(width, groups), f"{bytes_of[twin] / 2**20:.0f} MiB", *ratios])
    return _table(["width", TWINS[twin], *columns.values()], lines)


def launching(cards: dict[str, list[Row]]) -> list[str]:
    found = {}
    for card, rows in cards.items():
        for phase in PHASES:
            cases = {r["case"]: r for r in rows if r["what"] == "launching" and r["phase"] == phase}
            found |= {(card, phase): cases} if cases else {}
    columns, lines = _columns(dict(list(CALLS.items())[1:]), found.values()), []
    for (card, phase), cases in found.items():
        taken = [
            f"{1e6 * cases[c]['host_seconds']['median']:.0f}" if "host_seconds" in cases.get(c, {}) else "–"
            for c in ("softmax_default", *columns)
        ]
        lines.append([card, PHASES[phase], *taken])
    return _table(["card", "", "softmax", *columns.values()], lines)


def tables(cards: dict[str, list[Row]]) -> Iterator[tuple[str, list[str]]]:
    for card, rows in cards.items():
        for phase in ("forward", "forward_backward"):
            yield f"{card}, {PHASES[phase]}", times(rows, phase)
    for card, rows in cards.items():
        for queries, lines in decoding(rows):
            yield f"{card}, decoding, {queries} {'query' if queries == 1 else 'queries'}", lines
    for card, rows in cards.items():
        if lines := packed(rows):
            yield f"{card}, packed rows", lines
    yield "a training step", steps(cards)
    yield "memory", memory(next(iter(cards.values())))
    yield "microseconds of the host", launching(cards)


if __name__ == "__main__":
    for title, lines in tables(read()):
        print(f"\n{title}\n\n" + "\n".join(lines))
