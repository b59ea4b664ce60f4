"""Rates of this machine, measured, and the time that a piece of work takes at least at such rates."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffattn.machine import processor_name


def roofline(flops: float, bytes_moved: float, machine: dict[str, Any], dtype: str) -> float:
    """Seconds of work that is limited by either its FLOPs or its bytes: ``max(flops/rate, bytes/bandwidth)``.

    >>> roofline(4e9, 1e9, {"flops": {"fp32": 2e9}, "bandwidth": 1e9}, "fp32")
    2.0
    """
    return max(flops / machine["flops"][dtype], bytes_moved / machine["bandwidth"])


def measure_machine(*, size: int = 2048, megabytes: int = 256, repeats: int = 3) -> dict[str, Any]:
    """This machine's rates with the threads that torch has now: the best of several runs each, JSON-able.

    ``flops``: FLOP/s of a product of two ``size`` × ``size`` matrices, by dtype; ``bandwidth``: bytes read and written
    per second by a copy of that many ``megabytes``; ``disk``: bytes read per second from a file of as many, which the
    system's cache was asked to forget; ``memory``: bytes of main memory.

    Args:
        size: rows of the matrices. Default: 2048.
        megabytes: of the copy and of the file, in 2²⁰ bytes. Default: 256.
        repeats: runs of each. Default: 3.

    Source: a rate is work over the least time; a copy counts 2 bytes per byte.

    >>> sorted(measure_machine(size=64, megabytes=1, repeats=1))
    ['bandwidth', 'disk', 'flops', 'memory', 'name', 'source']
    """
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        rates[name] = 2 * size**3 / _best(lambda a=a, b=b: a @ b, repeats)  # type: ignore[misc]
    source, target = (torch.ones(megabytes << 18) for _ in range(2))
    copied = 2 * source.nbytes / _best(lambda: target.copy_(source), repeats)
    return {
        "name": f"{processor_name()}, threads: {torch.get_num_threads()}",
        "flops": rates,
        "bandwidth": copied,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "disk": _disk_rate(megabytes << 20, repeats),
        "source": f"measured here: product of {size}³, copy and file of {megabytes} MB, best of {repeats}",
    }


def forget(file: Path) -> None:
    """Write the file through and ask the system to drop it from its cache, where it has a way to."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _disk_rate(size: int, repeats: int) -> float:
    block = bytes(1 << 20)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "block"
        with file.open("wb") as opened:
            for _ in range(size // len(block)):
                opened.write(block)

        def read() -> None:
            with file.open("rb", buffering=0) as opened:
                while opened.read(1 << 20):
                    pass

        return size / _best(read, repeats, before=lambda: forget(file))


def _best(function: Callable[[], object], repeats: int, before: Callable[[], None] | None = None) -> float:
    seconds = []
    for _ in range(1 + repeats):
        if before is not None:
            before()
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    # The first run warms up, unless there is no other.
    return min(seconds[1:])
