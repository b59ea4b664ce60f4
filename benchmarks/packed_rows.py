"""Sequences packed in one row beside one sequence as long and a batch of them: the fused kernel, as JSON lines.

python -m benchmarks.packed_rows --threads 2 --out benchmarks/results/packed_rows.jsonl

V1's attention of 16 softmax heads of width 64, forward and backward. What a row costs that holds several sequences is
to be what they cost, not what a row of its length does: `of_one` is its time over that of one sequence.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import Writer, in_turns, pairwise, provenance, spread
from diffattn.ops.cpu import build
from diffattn.ops.cpu.operator import fused_cpu_diff_attention
from diffattn.ops.reference import Call as Arguments

HEADS, WIDTH = 8, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AT_MOST = 0.4


def packed(sequences: int, length: int) -> Tensor:
    """int32 (2, 1, S): a key is seen from its own query to the last one of its sequence."""
    place = torch.arange(sequences * length, dtype=torch.int32)
    return torch.stack([place, (place // length + 1) * length])[:, None]


class Call:
    """The kernel on `batch` rows; its runs return the seconds of one forward or one backward pass."""

    def __init__(self, batch: int, length: int, dtype: torch.dtype, queries: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        widths = (WIDTH, WIDTH, WIDTH, WIDTH, 2 * WIDTH)
        tensors = [torch.randn(batch, length, HEADS, width, generator=generator).to(dtype) for width in widths]
        self.inputs = [x.requires_grad_() for x in (*tensors, torch.full((batch, length, HEADS), 0.5))]
        self.queries = queries
        self.output = self.run()

    def run(self) -> Tensor:
        return fused_cpu_diff_attention(Arguments(*self.inputs, queries=self.queries))

    def forward(self) -> float:
        began = time.perf_counter()
        self.run()
        return time.perf_counter() - began

    def backward(self) -> float:
        began = time.perf_counter()
        torch.autograd.grad(self.output, self.inputs, torch.ones_like(self.output), retain_graph=True)
        return time.perf_counter() - began


def measure(sequences: int, length: int, dtype: str, repeats: int | None) -> list[dict[str, Any]]:
    """One row for each phase and case."""
    whole = sequences * length
    calls = {
        "one sequence": Call(1, whole, DTYPES[dtype]),
        "one sequence, by queries": Call(1, whole, DTYPES[dtype], packed(1, whole)),
        "packed": Call(1, whole, DTYPES[dtype], packed(sequences, length)),
        "batch": Call(sequences, length, DTYPES[dtype]),
    }
    rows = []
    for phase in ("forward", "backward"):
        runs: dict[str, Callable[[], float]] = {name: getattr(call, phase) for name, call in calls.items()}
        seconds = in_turns(runs, repeats)
        for name, values in seconds.items():
            ratios = pairwise(lambda x, y: x / y, values, seconds["one sequence"])
            rows.append({
                "phase": phase, "dtype": dtype, "case": name, "sequences": sequences, "length": length,
                "seconds": spread(values), "of_one": spread(ratios, AT_MOST if name == "packed" else None),
            })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    write = Writer(options.out)
    for dtype in DTYPES:
        where = provenance("benchmarks.packed_rows", threads=options.threads)
        reason = build.unavailable(DTYPES[dtype])
        if reason is not None:
            write({"dtype": dtype, "unsupported": reason} | where)
            continue
        for row in measure(options.sequences, options.length, dtype, options.repeats):
            write(row | where)


if __name__ == "__main__":
    main()
