"""The compiled CPU kernel of this process: loaded once, compiled on first use, or the reason why there is none.

``compiling.py`` compiles and keeps it, ``shipped.py`` finds the one that a wheel brought; ``DIFFATTN_FUSED=0`` switches
it off.
"""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from diffattn.config_fields import dtype_name
from diffattn.errors import UnsupportedError
from diffattn.machine import cache_folder
from diffattn.ops.cpu import compiling, shipped
from diffattn.ops.torch_private import constant_while_compiled

# The kernel serves these; products of the latter two are of float32 where the processor has none of bfloat16.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Status:
    """The state of the kernel in this process; `dataclasses.asdict` gives JSON."""

    active: tuple[str, ...]
    """The dtypes that it serves."""
    reasons: dict[str, str]
    """A sentence for each dtype that it does not serve."""
    pending: bool
    """True where the first use will compile it."""
    path: str | None
    """The file of the finished library."""
    shipped: bool
    """True where a wheel brought it."""
    shipped_refused: str | None
    """Why one that a wheel brought is not used."""
    capability: str
    """The instruction set of the processor, by PyTorch's name."""
    compiler: str | None
    """The compiler and its version."""
    torch: str
    """The version of PyTorch."""
    threads: int
    """The threads that it uses."""
    bf16_products: bool | None
    """True where the processor multiplies bfloat16, else its products are of float32; None while nothing is loaded."""
    compile_seconds: float | None
    """The seconds that compiling it took."""
    cache: str
    """The cache folder."""


@dataclass(frozen=True)
class _Outcome:
    """The library that this process has settled on, or why there is none, and whether it multiplies bfloat16."""

    built: compiling.Built | None
    failure: str | None
    bf16_products: bool | None


_lock = threading.Lock()
_outcome: _Outcome | None = None


def unavailable(dtype: torch.dtype) -> str | None:
    """Returns None where the kernel is loaded and serves `dtype`, else one sentence: the reason and the way out.

    The first call in a process loads the kernel, or compiles it, which takes about 30 s on two cores and says so on
    stderr; whatever comes of that holds for the process. `torch.compile` takes the answer as a constant.
    """
    if off := _never():
        return off
    outcome = _outcome or _settle(may_compile=True)
    assert outcome is not None
    return _reason(outcome, dtype)


constant_while_compiled(unavailable)


def compile_kernel(*, force: bool = False) -> compiling.Built:
    """Compile ahead of time, or find what was compiled or shipped; with `force` compile in any case.

    A process that has no kernel loaded takes the new one with its next call; one that has keeps what it has.

    Raises: `UnsupportedError` with the reason and the way out.
    """
    global _outcome
    build_key = compiling.BuildKey.of_this_machine()
    found = None if force else compiling.find(build_key) or shipped.find(build_key)
    built = found or compiling.build(build_key, force=force, keep=True)
    with _lock:
        if _outcome is not None and _outcome.built is None:
            _outcome = None
    return built


def status() -> Status:
    """Returns what is active in this process and why; it loads a kernel that was compiled before, but compiles none."""
    outcome = None if _never() else _settle(may_compile=False)
    build_key = compiling.BuildKey.of_this_machine()
    waits = "fused_cpu: not compiled yet; the first use compiles it, or now: diffattn doctor --build"
    none_yet = _never() or (waits if build_key.compiler else _sentence(compiling.no_compiler()))
    reasons = {dtype: _reason(outcome, dtype) if outcome else none_yet for dtype in DTYPES}
    built = outcome.built if outcome else compiling.find(build_key) or shipped.find(build_key)
    return Status(
        active=tuple(dtype_name(dtype) for dtype, reason in reasons.items() if reason is None),
        reasons={dtype_name(dtype): reason for dtype, reason in reasons.items() if reason is not None},
        pending=reasons[DTYPES[0]] == waits,
        path=built.path if built else None,
        shipped=built is not None and built.shipped,
        shipped_refused=shipped.refused(build_key),
        capability=torch.backends.cpu.get_cpu_capability(),
        compiler=build_key.version,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        bf16_products=outcome.bf16_products if outcome else None,
        compile_seconds=built.seconds if built else None,
        cache=str(cache_folder()),
    )


def _never() -> str | None:
    off = os.environ.get("DIFFATTN_FUSED") == "0"
    return "fused_cpu: switched off by DIFFATTN_FUSED=0" if off else compiling.unserved_system()


def _sentence(error: UnsupportedError) -> str:
    """Returns an error as a backend answers that it does not serve a call: what is so, and the way out."""
    return f"{error.given}; {error.way_out}"


def _reason(outcome: _Outcome, dtype: torch.dtype) -> str | None:
    if outcome.failure is not None:
        return outcome.failure
    if dtype not in DTYPES:
        return (
            f"fused_cpu: {dtype_name(dtype)} inputs are not supported; it serves {', '.join(map(dtype_name, DTYPES))}"
        )
    return None


def _settle(*, may_compile: bool) -> _Outcome | None:
    """Returns the outcome of this process; None where there is none yet and it may not compile."""
    global _outcome
    with _lock:
        if _outcome is None:
            try:
                _outcome = _load_or_compile(may_compile)
            except UnsupportedError as error:
                _outcome = _Outcome(None, _sentence(error), None)
                compiling.say(_sentence(error))
        return _outcome


def _load_or_compile(may_compile: bool) -> _Outcome | None:
    build_key = compiling.BuildKey.of_this_machine()
    # A kernel that was compiled here comes first, because a person may have asked for it.
    compiled = compiling.find(build_key)
    for found in (compiled, shipped.find(build_key)):
        if found is None:
            continue
        try:
            return _load(found)
        except UnsupportedError:
            # A sound file can be refused, by another C library than it was linked against for one; then it is made
            # anew. What was loaded cannot be loaded again beside itself.
            if found.path in torch.ops.loaded_libraries:
                raise
    if not may_compile:
        return None
    built = compiling.build(build_key, force=compiled is not None)
    try:
        return _load(built)
    except UnsupportedError:
        shutil.rmtree(Path(built.path).parent, ignore_errors=True)
        raise


def _load(built: compiling.Built) -> _Outcome:
    try:
        # A thread of its own keeps the caller's fake tensors, autocast and default device away from the question.
        with ThreadPoolExecutor(1) as apart:
            return _Outcome(built, None, apart.submit(_load_and_ask, built.path).result())
    except (OSError, RuntimeError, AttributeError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UnsupportedError(
            f"fused_cpu: the compiled kernel could not be loaded ({reason})",
            "a kernel that loads",
            "name another compiler with CXX, then run: diffattn doctor --build",
        ) from None


def _load_and_ask(path: str) -> bool:
    """Loads the library; returns whether the processor multiplies bfloat16."""
    torch.ops.load_library(path)
    return bool(torch.ops.diffattn.fused_cpu_bfloat16_products())
