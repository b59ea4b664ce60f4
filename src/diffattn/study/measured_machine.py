"""The rates of this machine, measured."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from diffattn.machine import processor_name
from diffattn.plan.hardware import Machine


def measure_machine(*, size: int = 2048, megabytes: int = 256, repeats: int = 3) -> Machine:
    """Measures this machine's rates with the threads that torch has now: the best of several runs each.

    ``flops`` are those of a product of two ``size`` × ``size`` matrices, by dtype; ``bandwidth`` is bytes read and
    written per second by a copy; ``disk`` bytes read per second from a file that the system's cache was asked to
    forget; ``memory`` the bytes of main memory.

    Args:
        size: rows of the matrices. Default: 2048.
        megabytes: size of the copy and of the file, in 2²⁰ bytes. Default: 256.
        repeats: runs of each. Default: 3.

    Source: a rate is work over the least time; a copy counts 2 bytes per byte.

    >>> measure_machine(size=64, megabytes=1, repeats=1).bandwidth > 0
    True
    """
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        rates[name] = 2 * size**3 / _best(lambda a=a, b=b: a @ b, repeats)  # type: ignore[misc]
    source, target = (torch.ones(megabytes << 18) for _ in range(2))
    copied = 2 * source.nbytes / _best(lambda: target.copy_(source), repeats)
    return Machine(
        name=f"{processor_name()}, threads: {torch.get_num_threads()}",
        flops=rates,
        bandwidth=copied,
        memory=main_memory(),
        disk=_disk_rate(megabytes << 20, repeats),
        source=f"measured here: product of {size}³, copy and file of {megabytes} MB, best of {repeats}",
    )


def main_memory() -> int:
    """Returns the bytes of this machine's main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def forget(file: Path) -> None:
    """Writes the file through and asks the system to drop it from its cache, where it has a way to."""
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
