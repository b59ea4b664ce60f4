"""The prepared GPU command: what serves differential attention on a card, how exactly, how fast, in how much memory.

One run of at most ten minutes, with torch and Triton alone (nothing of diffattn's `__init__` is imported). A JSON line
is flushed after every row, so that a run that is cut off leaves what it measured. The ways to compute a problem take
turns, A B A B, within one process; seconds are events on the device, warm, and a ratio compares neighbours in time.
The first row, `run`, holds the command, the versions and the card; the others name the card. One file a card:

    python -m benchmarks.gpu --out benchmarks/results/gpu_h100.jsonl

`--interpret` runs the same sections on the CPU with tiny sizes, Triton's kernels in its interpreter: a dry run whose
numbers mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

if "--interpret" in sys.argv:
    # Triton reads this when a kernel is decorated.
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.gpu_cases import Problem, blocks_of
from benchmarks.gpu_checks import compiling, correctness, kernels, nan, serves
from benchmarks.gpu_decoding import decoding
from benchmarks.gpu_device import Device, provenance, short_name
from benchmarks.gpu_packed import packed
from benchmarks.gpu_served import served
from benchmarks.gpu_timings import ceilings, launching, step, subtraction, timing
from benchmarks.interpreter import mend_interpreter
from benchmarks.rows import Writer

SECTIONS = {
    section.__name__: section
    for section in (
        ceilings,
        compiling,
        serves,
        served,
        nan,
        kernels,
        timing,
        decoding,
        packed,
        step,
        launching,
        subtraction,
        correctness,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of JSON lines; rows are also printed")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=570, help="after as many no row is waited for; default 570")
    parser.add_argument("--interpret", action="store_true", help="a dry run on the CPU with tiny sizes")
    arguments = parser.parse_args()
    if not arguments.interpret and not torch.cuda.is_available():
        parser.error("no GPU is visible to PyTorch; wanted one: pass --interpret for a dry run on the CPU")
    if arguments.interpret and importlib.util.find_spec("triton") is not None:
        mend_interpreter()
    device = Device(arguments.interpret)
    write, origin, began = Writer(arguments.out), provenance(device), time.monotonic()
    common = {"benchmark": "gpu", "gpu": short_name(origin["machine"]["gpu"])}
    blocks = {
        f"{kind} {width}": blocks_of(kind, Problem(1, 1, 1, 2, 2, width), device.chip)
        for kind in ("v1", "v2")
        for width in (64, 128)
    }
    write(common | {"what": "run"} | origin | {"blocks": blocks})
    failed = False
    for name in arguments.sections:
        try:
            for row in SECTIONS[name](device):
                write(common | row | {"at_second": round(time.monotonic() - began, 1)})
                if time.monotonic() - began > arguments.seconds:
                    write(common | {"what": "stopped", "section": name})
                    return
        except Exception as error:
            # Device time is scarce: one section's mistake must not cost the others.
            write(common | {"what": "failed", "section": name, "error": repr(error)[:500]})
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
