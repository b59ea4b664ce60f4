"""Every entry of the block tables compiled for its chips, where there is no GPU: `make test-gpu-offline`.

A row is one kernel on one chip: its blocks, and the registers, spills and shared memory that the chip's own assembler
says it takes. Rows are written at once, so that a run that was cut off goes on where it ended. A row stays as long as
the kernel's statements, its arguments and Triton's version do; where only names changed, so that Triton makes the same
code, the row is renewed without compiling. `tests/ops/triton/test_offline.py` holds the rows to their bounds.

    python -m tools.gpu_offline --out benchmarks/results/gpu_offline.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from diffattn.ops.triton import backward, configs, decoding, forward, shared_backward, shared_forward
from tools.gpu_compiling import TARGETS, KnownError, Launch, captured, compiled

# Widths of queries and of values, whether both maps share their keys, and signal heads of a noise head. Each entry of a
# table serves one of them.
SHAPES = {
    "V1, 64": (64, 128, False, 1),
    "V1, 128": (128, 256, False, 1),
    "V2, 64": (64, 64, True, 1),
    "V2, 128": (128, 128, True, 1),
    "V2, 256": (256, 256, True, 1),
    "two keys, 256": (256, 256, False, 1),
    "V1, 32": (32, 64, False, 1),
    "GDA, 64": (64, 128, False, 4),
    "GDA, 128": (128, 256, False, 4),
    "GDA V2, 128": (128, 128, True, 4),
}
# Its entries are those of 64 but for decoding.
DECODED_ALONE = "V1, 32"
BATCH, LENGTH, HEADS, GROUPS = 2, 256, 4, 2


class Case(NamedTuple):
    """What is compiled together: a pass over one shape on one chip."""

    chip: str
    shape: str
    dtype: str
    mask: str
    training: bool


def cases() -> list[Case]:
    """Every shape on every chip, causal and with ranges of queries, in bfloat16; float16 once."""
    passes = [(mask, training) for mask in ("causal", "ranges") for training in (True, False)]
    all_of_them = [Case(chip, shape, "bfloat16", *each) for chip in TARGETS for shape in SHAPES for each in passes]
    once = [Case(chip, "V1, 64", "float16", "causal", training) for chip in TARGETS for training in (True, False)]
    return [case for case in all_of_them + once if case.shape != DECODED_ALONE or not case.training]


def launches(case: Case) -> Iterator[tuple[str, configs.Blocks | None, Launch]]:
    """The launches of a pass, by the names of what they make, with the entries that they take."""
    width, value_width, one_key, signals = SHAPES[case.shape]
    dtype = getattr(torch, case.dtype)
    entry = (case.chip, width, value_width, one_key)
    q = torch.empty(BATCH, LENGTH, HEADS, signals + 1, width, dtype=dtype)
    k = torch.empty(BATCH, LENGTH, GROUPS, 1 if one_key else 2, width, dtype=dtype)
    v = torch.empty(BATCH, LENGTH, GROUPS, value_width, dtype=dtype)
    queries = torch.zeros(2, BATCH, LENGTH, dtype=torch.int32) if case.mask == "ranges" else None
    q1, q2, k1, lam = q[:, :, :, :-1], q[:, :, :, -1], k[:, :, :, 0], torch.empty(BATCH, LENGTH, HEADS * signals)
    k2 = k1 if one_key else k[:, :, :, 1]
    rule: dict[str, Any] = {"causal": queries is None, "scale": 1.0, "queries": queries}
    blocks = configs.forward_blocks(*entry)
    if case.shape != DECODED_ALONE:
        saving = rule | {"save": case.training, "blocks": blocks}
        with captured(case.chip) as found:
            if signals > 1:
                saved = shared_forward.forward(q1, k1, q2, k2, v, lam, **saving)
            else:
                saved = forward.forward(q1.squeeze(3), k1, q2, k2, v, lam, **saving)
        yield from zip(["noise", "output"][2 - len(found) :], [blocks] * 2, found, strict=False)
    if case.training:
        sizes = configs.query_blocks(*entry), configs.key_walks(*entry)
        made = {"blocks": sizes} | rule
        with captured(case.chip) as found:
            if signals > 1:
                shared_backward.backward(saved[0], q, k1, k2, v, lam, *saved, **made)
            else:
                backward.backward(saved[0], q1.squeeze(3), k1, q2, k2, v, lam, *saved, **made)
        names = ["d_" + "kv"[not walk.makes_k : 1 + walk.makes_v] for walk in sizes[1]]
        # The signal heads' and the noise heads' launches for d_q are of one kernel.
        of_queries = ["d_q"] * (len(found) - 1 - len(names))
        entries = [None, *[sizes[0]] * len(of_queries), *(walk.blocks for walk in sizes[1])]
        yield from zip(["sums", *of_queries, *names], entries, found, strict=True)
    else:
        blocks = configs.decoding_blocks(*entry)
        eps = None if one_key else 1e-5
        with captured(case.chip) as found:
            decoding.decode(q1[:, :1], k1, q2[:, :1], k2, v, lam[:, :1], **rule, blocks=blocks, eps=eps)
        yield from zip(["span", "join"], [blocks, None], found, strict=True)


def _line(row: dict[str, Any]) -> str:
    """Returns a row as a line without spaces, since there are hundreds of rows in a file that git keeps."""
    return json.dumps(row, separators=(",", ":")) + "\n"


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file by their keys; where a key came twice, the later row."""
    if not path.exists():
        return {}
    return {row["key"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: of each chip with a table of its own its entries, and the most that their kernels take."""
    lines = []
    columns = {
        "output": ["noise", "output"],
        "d_q": ["d_q"],
        "d_k and d_v": ["d_kv", "d_k", "d_v"],
        "decoding": ["span"],
    }
    for chip in configs.SHARED:
        lines += ["", f"| {chip} | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
        for shape in SHAPES:
            mine = [row for row in rows if (row["chip"], row["shape"], row["dtype"]) == (chip, shape, "bfloat16")]
            if shape != DECODED_ALONE:
                cells = ["; ".join(filter(None, (_cell(mine, name) for name in names))) for names in columns.values()]
                lines.append(f"| {shape} | {' | '.join(cells)} |")
    return lines[1:]


def _cell(rows: list[dict[str, Any]], kernel: str) -> str:
    mine = [row for row in rows if row["kernel"] == kernel]
    if not mine:
        return ""
    blocks = configs.Blocks(**mine[0]["blocks"])
    # A kernel of one map has no such form.
    two_maps = SHAPES[mine[0]["shape"]][3] == 1
    marks = "*" * (two_maps and not blocks.together) + "°" * blocks.descriptors
    keys = f"{blocks.rows} × " * (kernel != "span") + str(blocks.keys)
    most = {name: max(row["taken"][name] for row in mine) for name in ("registers", "spilled", "shared")}
    return (
        f"{keys}{marks}, {blocks.warps}, {blocks.stages}: "
        f"{most['registers']}, {most['spilled']}, {round(most['shared'] / 1024)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines; rows in it that hold are kept")
    parser.add_argument("--table", action="store_true", help="only print the tables of docs/gpu.md from the file")
    arguments = parser.parse_args()
    out = arguments.out
    if arguments.table:
        print("\n".join(tables(list(rows_of(out).values()))))
        return
    origin = {
        "command": shlex.join(["python", "-m", "tools.gpu_offline", *sys.argv[1:]]),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
    }
    old = {key: row for key, row in rows_of(out).items() if row["versions"]["triton"] == triton.__version__}
    taken = {row["code"]: row["taken"] for row in old.values()}
    wanted: dict[str, dict[str, Any]] = {}
    with out.open("a", encoding="utf-8") as file:
        for case in cases():
            for kernel, blocks, launch in launches(case):
                if launch.key in wanted:
                    continue
                row = old.get(launch.key)
                if row is None:
                    try:
                        code, taken_now = compiled(launch, taken)
                        taken[code] = taken_now
                    except KnownError as known:
                        code = str(known)
                    sizes = None if blocks is None else blocks._asdict()
                    described = {"benchmark": "gpu_offline", "kernel": kernel, **case._asdict(), "blocks": sizes}
                    row = described | {"taken": taken[code], "key": launch.key, "code": code} | origin
                    file.write(_line(row))
                    file.flush()
                    print(json.dumps({name: row[name] for name in (*Case._fields, "kernel", "taken")}), flush=True)
                wanted[launch.key] = row
    # Rows that hold no longer go, in one step.
    whole = out.with_suffix(".new")
    whole.write_text("".join(map(_line, wanted.values())), encoding="utf-8")
    os.replace(whole, out)


if __name__ == "__main__":
    main()
