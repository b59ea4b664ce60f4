"""Rows of people's machines, which `diffattn doctor --benchmark` wrote: checks what was posted and keeps it.

    diffattn doctor --benchmark | python -m benchmarks.machines -
    python -m benchmarks.machines posted.txt

A posted text may hold more than its row. A row that is whole goes to `benchmarks/results/machines.jsonl`. Then the
tables of docs/small_machines.md are written anew, from all rows there and from the planner; without a file only that.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import sys
from pathlib import Path

from benchmarks import consumer_tables
from diffattn.errors import ConfigError, DiffattnError
from diffattn.files import parse_json, write_text
from diffattn.humanize import size
from diffattn.plan.estimate import estimate
from diffattn.plan.named_model import parse_model
from diffattn.plan.setting import Setting, precision_of
from diffattn.results.machine import MachineRow, Speed

ROWS = Path(__file__).parent / "results" / "machines.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "small_machines.md"
# What the page's tables begin and end with, by what they are made of.
BEGIN, END = "<!-- {}: made by python -m benchmarks.machines -->", "<!-- end of the table -->"
# The planner's table: sizes that a Raspberry Pi may run, and how many bits a weight has.
BOARD, PLANNED, BITS = "Raspberry Pi 5", ("30M", "smollm2-135M", "llama-3.2-1B"), (8, 4)
# A row is under 10,000 characters, and no issue has a million.
MOST = 1_000_000
# The speeds of the table: engine, bits, and what stands above them.
COLUMNS = (("torch", 32, "torch, float32"), ("onnxruntime", 8, "onnxruntime, int8"))
MARKDOWN = re.compile(r"([\\`*_{}\[\]()#!|~])")


def found_in(text: str) -> MachineRow:
    """Returns the one row in a text, such as an issue: a line that begins as a row of a machine does.

    Raises:
        ConfigError: none or several, or one that is not as it was measured.
    """
    lines = [line for line in map(str.strip, text.splitlines()) if re.match(r'\{\s*"benchmark"\s*:', line)]
    if len(lines) != 1:
        raise ConfigError(
            f"a text with {len(lines)} rows", "one", "give the line of JSON that diffattn doctor --benchmark prints"
        )
    try:
        values = parse_json(lines[0], unique=True)
    except ValueError as error:
        raise ConfigError(f"a row that is no JSON ({error})", "the whole line", "copy it again, to its end") from None
    return MachineRow.from_json(values)


def read() -> list[MachineRow]:
    """Returns the rows that are kept, in the order in which they came."""
    return [found_in(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []


def add(row: MachineRow) -> None:
    """Keeps a row behind the others.

    Raises:
        ConfigError: it is there already.
    """
    if row in read():
        raise ConfigError(f"a row of {row.name!r} that is there already", "a new one", "nothing is left to do")
    with ROWS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row.to_json()) + "\n")


def table(rows: list[MachineRow]) -> str:
    """Returns the table of the page."""
    head = ["machine", "threads", "others' load", "memory reads, GB/s"]
    for _, _, title in COLUMNS:
        head += [f"{title}: tokens/s behind 128", "behind 2,048", "V2 / softmax"]
    head += ["of the bound"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [_cell(f"{row.name}, {row.architecture}, {row.date}"), str(row.threads), f"{row.load:.1f}",
                 f"{row.rates.read / 1e9:.1f}"]  # fmt: skip
        for engine, bits, _ in COLUMNS:
            cells += _speeds(row, engine, bits)
        shares = [speed.reached for speed in row.speeds if speed.phase == "decoding"]
        lines.append([*cells, f"{min(shares):.0%} to {max(shares):.0%}" if shares else "–"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _speeds(row: MachineRow, engine: str, bits: int) -> list[str]:
    """V2's tokens per second behind both lengths of a cache, and what they are of softmax's."""
    found = {
        (speed.attention, speed.tokens): speed
        for speed in row.speeds
        if (speed.engine, speed.bits, speed.phase) == (engine, bits, "decoding")
    }
    pairs: list[tuple[Speed, Speed]] = [
        (found["diff_v2", tokens], found["softmax", tokens])
        for tokens in (128, 2048)
        if ("diff_v2", tokens) in found and ("softmax", tokens) in found
    ]
    if len(pairs) < 2:
        return ["–"] * 3
    medians = [(one.tokens_per_second.median, twin.tokens_per_second.median) for one, twin in pairs]
    ratios = " / ".join(f"{one / twin:.2f}" for one, twin in medians)
    return [*(f"{one:.3g}" for one, _ in medians), ratios]


def _cell(text: str) -> str:
    """What somebody's system calls itself, so that it is no markup of the page."""
    return MARKDOWN.sub(r"\\\1", html.escape(text, quote=False))


def plan_table() -> str:
    """Returns what the planner says of small models on a Raspberry Pi 5, DIFF beside softmax."""
    head = ["model", "weights", "tokens/s at most, behind 128", "behind 2,048", "memory behind 2,048",
            "first token behind 128"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for name in PLANNED:
        for bits in BITS:
            for attention in ("softmax", "diff_v2"):
                model = parse_model(f"{attention}:{name}")
                short, long = (
                    estimate(model.built, attention, Setting(context=context, machine=BOARD, precision=precision))
                    for precision in [precision_of("fp32", weights=f"int{bits}")]
                    for context in (128, 2048)
                )
                speeds = [f"{one.decoding.tokens_per_second:.3g}" for one in (short, long)]
                lines.append([f"{attention}:{name}", f"int{bits}", *speeds, size(long.inference_peak),
                              f"{short.first_token_seconds:.2g} s"])  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def page_with(page: str, tables: dict[str, str]) -> str:
    """Returns the page with its tables replaced."""
    for name, table_of in tables.items():
        begin = BEGIN.format(name)
        before, _, behind = page.partition(begin)
        page = f"{before}{begin}\n\n{table_of}\n\n{behind[behind.index(END) :]}"
    return page


def tables() -> dict[str, str]:
    """Returns the tables of the page by what they are made of."""
    return {
        "planner": plan_table(), "llama.cpp": consumer_tables.table(), "verdicts": consumer_tables.verdicts(),
        "rows": table(read()),
    }  # fmt: skip


def write_page() -> None:
    """Writes the tables of the page anew."""
    write_text(PAGE, page_with(PAGE.read_text(encoding="utf-8"), tables()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="what was posted; - for standard input; none to write the tables only")
    given = parser.parse_args().file
    try:
        if given is not None:
            with sys.stdin if given == "-" else open(given, encoding="utf-8", errors="replace") as file:
                row = found_in(file.read(MOST))
            add(row)
            print(f"{row.name}: kept in {ROWS.name}, and in the table of {PAGE.name}", file=sys.stderr)
        write_page()
    except OSError as error:
        sys.exit(f"benchmarks.machines: {given!r} cannot be read ({error.strerror}); wanted a file: check its name")
    except DiffattnError as error:
        sys.exit(f"benchmarks.machines: {error}")


if __name__ == "__main__":
    main()
