"""The attention call alone: the fused CPU kernel beside the softmax call that it replaces, and beside other ways.

Tensors of one layer with 16 softmax heads of width 64, laid out as the models lay them out, without projections, rotary
positions or norm. Forward, forward and backward with the most memory that they take, and one query over a cache. The
cases of a problem take turns within one process, A B C A B C, so that a ratio compares neighbours in time. One JSON
line per problem and case, and one per number format with the machine's own rates; a table on stderr at the end.

    python -m benchmarks.attention --threads 2 --out benchmarks/results/attention.jsonl
"""

from __future__ import annotations

import argparse
import operator
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# Idle threads sleep instead of spinning: spinning ones starve the others wherever the machine is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.attention_cases import (
    CACHED,
    CONTEXTS,
    DTYPES,
    ENTRIES,
    HEADS,
    PHASES,
    TWIN,
    WIDTH,
    Call,
    Entry,
    Problem,
    executed_flops,
)
from benchmarks.rows import Writer, in_turns, pairwise, provenance, spread
from diffattn.errors import UnsupportedError
from diffattn.train.measure import peak_bytes


def machine(dtype: str, repeats: int | None) -> dict[str, Any]:
    """This machine's rates: one 2048³ matrix product, and copies (read plus written) of two sizes.

    ``copy_cache`` copies as many bytes as a decoding step reads, ``copy_large`` far more than a processor's cache
    holds. The faster one counts for ``percent_of_copy``. Where a processor fetches what a copy overwrites, which is
    not counted, reading alone may exceed it.
    """
    rounds = 7 if repeats is None else repeats
    a, b = (torch.randn(2048, 2048).to(DTYPES[dtype]) for _ in "ab")
    rates: dict[str, Any] = {"matmul_flops_per_second": round(2 * 2048**3 / _seconds(partial(torch.mm, a, b), rounds))}
    for name, size in (("large", 2**28), ("cache", 2 * CACHED * HEADS * WIDTH * DTYPES[dtype].itemsize)):
        source, target = torch.ones(size // 4), torch.ones(size // 4)
        taken = _seconds(partial(target.copy_, source), 3 * rounds)
        rates[f"copy_{name}"] = {"bytes": size, "bytes_per_second": round(2 * size / taken)}
    return rates


def _seconds(function: Callable[[], object], rounds: int) -> float:
    """Median, after one call that does not count."""
    function()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return float(spread(seconds)["median"])


def run(problem: Problem, rates: dict[str, Any], repeats: int | None, cases: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of one problem: seconds of each case, then, of "forward_backward", the memory of each."""
    entries = [e for e in ENTRIES if problem.phase in e.phases and problem.queries <= e.up_to and e.name in cases]
    calls: dict[str, Call] = {}
    refused: dict[str, str] = {}
    for entry in entries:
        try:
            calls[entry.name] = Call(entry, problem)
        except UnsupportedError as error:
            refused[entry.name] = error.given
    # The first run's seconds do not count; of training, its memory does.
    peaks = {}
    for name, call in calls.items():
        if call.training:
            peaks[name] = peak_bytes(call.run, [], "cpu")
        else:
            call.run()
    seconds = in_turns(calls, repeats)

    def row(entry: Entry, phase: str, ratios: list[float] | None = None) -> dict[str, Any]:
        size = {"batch": 1, "queries": problem.queries, "keys": problem.keys, "heads": HEADS, "width": WIDTH}
        common = {"benchmark": "attention", "problem": size, "phase": phase, "dtype": problem.dtype, "case": entry.name}
        if ratios is None:
            return common | {"unsupported": refused[entry.name]}
        aim = {"aim": entry.aim[phase]} if phase in entry.aim else {}
        return common | {"ratio_to": {TWIN: spread(ratios, entry.at_most.get(phase)) | aim}, "gate": entry.gate}

    for entry in entries:
        if entry.name in refused:
            yield row(entry, problem.phase)
            continue
        mine = seconds[entry.name]
        median, flops = float(spread(mine)["median"]), executed_flops(entry, problem)
        timed = row(entry, problem.phase, pairwise(operator.truediv, mine, seconds[TWIN]))
        if entry.beside in seconds:
            ratios = pairwise(operator.truediv, mine, seconds[entry.beside])
            timed["ratio_to"][entry.beside] = spread(ratios, entry.beside_at_most.get(problem.phase))
        timed |= {
            "rounds": len(mine),
            "seconds": spread(mine),
            "executed_flops": flops,
            "executed_flops_per_second": round(flops / median),
            "percent_of_matmul": round(100 * flops / median / rates["matmul_flops_per_second"], 1),
        }
        if problem.phase == "decode":
            read = 2 * problem.keys * entry.groups * entry.width * DTYPES[problem.dtype].itemsize
            copied = max(rates[name]["bytes_per_second"] for name in ("copy_large", "copy_cache"))
            timed |= {"bytes_read": read, "bytes_per_second": round(read / median)}
            timed |= {"copy_bytes_per_second": copied, "percent_of_copy": round(100 * read / median / copied, 1)}
        yield timed
    for entry in entries:
        if entry.name in peaks:
            ratio = peaks[entry.name] / peaks[TWIN]
            kept = calls[entry.name].output_and_gradient_bytes
            memory = {"extra_peak_bytes": peaks[entry.name], "output_and_gradient_bytes": kept}
            yield row(entry, "memory", [ratio]) | memory


def summary(rows: list[dict[str, Any]]) -> Table:
    """One line per problem with each case's ratio to softmax, and its limit where it has one."""
    table = Table(
        "phase", "dtype", "keys", *(entry.name for entry in ENTRIES), title=f"ratios to {TWIN} (and to the case beside)"
    )
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        cells = lines.setdefault((row["phase"], row["dtype"], str(row["problem"]["keys"])), {})
        if "unsupported" in row:
            cells[row["case"]] = "unsupported"
            continue
        ratio = row["ratio_to"][TWIN]
        text = f"{ratio['median']:.2f}"
        if "kept" in ratio:
            colour = "red" if not ratio["kept"] else "green" if ratio["median"] <= ratio.get("aim", 9) else "yellow"
            text = f"[{colour}]{text} {'≤' if ratio['kept'] else '>'} {ratio['at_most']:.2f}[/]"
        text += "".join(f" ({r['median']:.2f})" for name, r in row["ratio_to"].items() if name != TWIN)
        cells[row["case"]] = text + (f", {row['percent_of_copy']:.0f}% of copy" if "percent_of_copy" in row else "")
    for key, cells in lines.items():
        table.add_row(*key, *(cells.get(entry.name, "") for entry in ENTRIES))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--repeats", type=int, help="rounds (default: 7 slow ones, 15 and more quick ones)")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES), help="default: all")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS), help="but for decode (default: all)")
    names = [entry.name for entry in ENTRIES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help=f"{TWIN} is always one (default: all)")
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # What PyTorch uses of the processor, which the environment can limit.
    used = {"threads": arguments.threads, "capability": torch.backends.cpu.get_cpu_capability()}
    write, rows, cases = Writer(arguments.out), [], [TWIN, *arguments.cases]
    for dtype in arguments.dtypes:
        origin = provenance("benchmarks.attention", **used)
        rates = machine(dtype, arguments.repeats)
        write({"benchmark": "attention", "dtype": dtype, "case": "machine"} | rates | origin)
        for phase in arguments.phases:
            sizes = [(1, CACHED)] if phase == "decode" else [(context, context) for context in arguments.contexts]
            for queries, keys in sizes:
                origin = provenance("benchmarks.attention", **used)
                for row in run(Problem(phase, dtype, queries, keys), rates, arguments.repeats, cases):
                    rows.append(row)
                    write(row | origin)
    console = Console(stderr=True)
    console.width = max(console.width, 200)
    console.print(summary(rows))


if __name__ == "__main__":
    main()
