"""The card that `benchmarks.gpu` runs on: its clock, its memory, its names, and why PyTorch refuses a call on it."""

from __future__ import annotations

import platform
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.bare import bare_module

configs = bare_module("ops.triton.configs")
Row = dict[str, Any]
# At most: a slower clock waits longer.
CYCLES_A_SECOND = 2_000_000_000


class Device:
    """Where a run takes place: its clock, its memory, its sizes."""

    def __init__(self, interpret: bool) -> None:
        self.tiny = interpret
        self.name = "cpu" if interpret else "cuda"
        self.backends = ["flash", "math"] if interpret else ["flash", "cudnn", "efficient", "math"]
        # The block table that the kernels take.
        self.chip = configs.chip_of(torch.device(self.name))
        # Softmax heads of most problems.
        self.heads = 2 if interpret else 16
        # What `diff_attention` is asked for: on a CPU "auto" takes another kernel.
        self.asked = "fused_triton" if interpret else "auto"

    def rounds(self, wanted: int) -> int:
        """How often the ways to compute a problem take turns."""
        return 1 if self.tiny else wanted

    def seconds(self, function: Callable[[], object], calls: int, ahead: float = 0.001) -> float:
        """Seconds of one of `calls` calls, by events around all of them.

        The card first waits `ahead` seconds, in which this process gets ahead of it: launches are not what is measured.
        """
        if self.tiny:
            return self.host_seconds(function, calls)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(round(ahead * CYCLES_A_SECOND))
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / calls

    def host_seconds(self, function: Callable[[], object], calls: int) -> float:
        """Seconds in which this process issues one of `calls` calls, whenever the card is done with it."""
        if self.tiny:
            # The interpreter is slow, and the numbers of a dry run mean nothing.
            calls = 1
        self.wait()
        began = time.perf_counter()
        for _ in range(calls):
            function()
        taken = (time.perf_counter() - began) / calls
        self.wait()
        return taken

    def wait(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def extra_bytes(self, function: Callable[[], object]) -> int:
        """The most that a call holds beyond what was held before it."""
        if self.tiny:
            return 0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        del result
        return peak - before


def provenance(device: Device) -> Row:
    """The command, the versions and the card, which the row that opens a run carries."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton_version}
    machine: Row = {"gpu": None}
    if not device.tiny:
        facts = torch.cuda.get_device_properties(0)
        versions |= {"cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda}
        machine = {"gpu": facts.name, "multiprocessors": facts.multi_processor_count}
        machine |= {"capability": f"{facts.major}.{facts.minor}", "memory_bytes": facts.total_memory}
    command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    return {"command": command, "versions": versions, "machine": machine, "chip": device.chip}


def short_name(gpu: str | None) -> str | None:
    """A card's name without its vendor, its memory and its form, for example "H100"; None in a dry run."""
    return gpu and re.split(r"[ -](?:SXM|PCIe|NVL|HBM|\d+GB)", gpu.removeprefix("NVIDIA "))[0]


def probe(function: Callable[[], object]) -> bool | str:
    """True, or in one line why PyTorch refuses."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            function()
        except (RuntimeError, ImportError) as error:
            # The warnings say more than "No available kernel". Those of backends that were not asked for say nothing.
            said = [str(w.message).split("(Triggered")[0].strip() for w in caught]
            silent = ("not used because", "runtime disabled", "not been runtime")
            reasons = [line for line in said if not any(word in line for word in silent)]
            return (reasons or [str(error).splitlines()[0]])[0][:300]
    return True
