"""Decoding behind short and long caches in onnxruntime: seconds of a token, where they go, bytes read, peak memory.

For each exported folder and each length of the cache one JSON line: seconds of a token, in turns with the other folders
and lengths; the part of them in each operator; the bytes of weights and cache that a token reads, and what share of the
measured read bandwidth that is, since no token can take less than its bytes. The caches hold random numbers, so that no
prefill is waited for. Peak memory is that of a process of its own, above what it held before it loaded the model: it
reads a prompt of the longest length in pieces of 512 and writes eight tokens.

    python -m benchmarks.onnx_decoding runs/v2/model/onnx-int4 runs/v2/model/onnx-int8 --threads 1
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.consumer_forms import file_bytes
from benchmarks.rows import Writer, in_turns, pairwise, provenance, spread
from diffattn.export.run import Cache, OnnxDecoder

GATE = "tests/export/test_shared_cache.py::test_steps_write_into_one_buffer_and_leave_earlier_caches_as_they_were"
PIECE, WRITTEN = 512, 8


class Decoding:
    """One folder behind a cache of one length, which stays: each step writes the same place."""

    def __init__(self, decoder: OnnxDecoder, cached: int) -> None:
        self.decoder, self.cached = decoder, cached
        random = np.random.default_rng(0)
        shapes = [value.shape() for value in decoder.empty_cache(1, cached + 1).values]
        # A graph that joins its cache takes one of the exact length.
        places = cached + 1 if decoder.shares_buffers else cached
        self.values = [
            decoder.value(random.standard_normal((1, heads, places, width), np.float32))
            for _, heads, _, width in shapes
        ]
        self.token = np.full((1, 1), 1, np.int64)

    def step(self) -> float:
        began = time.perf_counter()
        self.decoder.logits(self.token, cache=Cache(self.values, self.cached, [self.cached]), last=1)
        return time.perf_counter() - began

    @property
    def cache_bytes(self) -> int:
        return sum(4 * int(np.prod(value.shape())) for value in self.values)


def operators(folder: Path, threads: int, cached: int, steps: int = 8) -> dict[str, float]:
    """The share of each operator in the time of a token, by onnxruntime's own profile."""
    with tempfile.TemporaryDirectory() as name:
        decoder = OnnxDecoder(folder, threads=threads, profile=Path(name) / "profile")
        decoding = Decoding(decoder, cached)
        for _ in range(steps):
            decoding.step()
        events = json.loads(Path(decoder.session.end_profiling()).read_text())
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    total = sum(spent.values())
    return {name: round(part / total, 3) for name, part in sorted(spent.items(), key=lambda item: -item[1])[:5]}


def memory(folder: Path, threads: int, cached: int) -> int:
    """The most bytes that a process held above what it held before it loaded the model."""
    words = [sys.executable, "-m", "benchmarks.onnx_decoding", "--memory", str(folder), "--threads", str(threads)]
    done = subprocess.run([*words, "--cached", str(cached)], check=True, capture_output=True, text=True)
    return int(done.stdout)


def held(name: str) -> int:
    """``VmRSS``, the bytes of memory that this process holds, or ``VmHWM``, the most that it held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def measure_memory(folder: Path, threads: int, cached: int) -> int:
    before = held("VmRSS")
    decoder = OnnxDecoder(folder, threads=threads)
    ids = np.random.default_rng(0).integers(2, 100, (1, cached))
    cache = decoder.empty_cache(1, cached + WRITTEN)
    for start in range(0, cached, PIECE):
        _, cache = decoder.logits(ids[:, start : start + PIECE], cache=cache, last=1)
    for _ in range(WRITTEN):
        _, cache = decoder.logits(ids[:, :1], cache=cache, last=1)
    return held("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", help="exported folders; the same model in several forms")
    parser.add_argument("--cached", type=int, nargs="+", default=[128, 2048], help="tokens in the cache")
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime (default: 1)")
    parser.add_argument("--rounds", type=int, default=24, help="tokens of each folder and length (default: 24)")
    parser.add_argument("--memory", type=Path, help="print the memory of this folder alone, in bytes")
    parser.add_argument("--out", type=Path, help="also write the lines to this file, behind those that it holds")
    arguments = parser.parse_args()
    if arguments.memory:
        print(measure_memory(arguments.memory, arguments.threads, max(arguments.cached)))
        return
    # Not in the process whose memory is told.
    import torch

    from diffattn.study.machine_benchmark import read_rate

    row_of = Writer(arguments.out, keep=True)
    origin = provenance("benchmarks.onnx_decoding", threads=arguments.threads)
    origin["versions"]["onnxruntime"] = version("onnxruntime")
    torch.set_num_threads(arguments.threads)
    bandwidth = read_rate(512)
    least = min(arguments.cached)
    decodings: dict[tuple[Path, int], Decoding] = {}
    for folder in arguments.folders:
        decoder = OnnxDecoder(folder, threads=arguments.threads)
        for cached in arguments.cached:
            decodings[folder, cached] = Decoding(decoder, cached)
    calls: dict[str, Callable[[], float]] = {f"{folder}:{n}": each.step for (folder, n), each in decodings.items()}
    for call in calls.values():
        call()
    seconds = in_turns(calls, arguments.rounds)
    for (folder, cached), decoding in decodings.items():
        own, short = seconds[f"{folder}:{cached}"], seconds[f"{folder}:{least}"]
        read = file_bytes(folder) + decoding.cache_bytes
        longest = cached == max(arguments.cached)
        peak = memory(folder, arguments.threads, cached) if longest else None
        row: dict[str, Any] = {
            "benchmark": "onnx_decoding", "folder": str(folder), "cached": cached,
            "shares_buffers": decoding.decoder.shares_buffers, "file_bytes": file_bytes(folder),
            "cache_bytes": decoding.cache_bytes, "seconds": spread(own),
            f"ratio_to_{least}": spread(pairwise(lambda x, y: x / y, own, short)),
            "operators": operators(folder, arguments.threads, cached), "read_bandwidth": round(bandwidth),
            "share_of_bandwidth": round(read / spread(own)["median"] / bandwidth, 3),
            "least_seconds": round(read / bandwidth, 6), "peak_bytes": peak,
            "peak_limit": 2 * file_bytes(folder) + decoding.cache_bytes if longest else None, "gate": GATE,
        }  # fmt: skip
        row_of(row | origin)


if __name__ == "__main__":
    main()
