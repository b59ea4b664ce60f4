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

from diffattn.errors import UnsupportedError
from diffattn.machine import cache_folder
from diffattn.ops.cpu import compiling, shipped
from diffattn.ops.torch_private import constant_while_compiled

# What the kernel serves; products of the latter two are of float32 where the processor has none of bfloat16.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Status:
    """What the kernel is and can do in this process; `dataclasses.asdict` gives JSON.

    Fields: `active`, the dtypes that it serves; `reasons`, a sentence for each dtype that it does not; `pending`, True
    where the first use will compile it; `path` of the finished library and its `compile_seconds`; `shipped`, whether a
    wheel brought it, and `shipped_refused`, why one that a wheel brought is not used; `bf16_products`, whether
    the processor multiplies bfloat16 (else its products are of float32), None while nothing is loaded.
    """

    active: tuple[str, ...]
    reasons: dict[str, str]
    pending: bool
    path: str | None
    shipped: bool
    shipped_refused: str | None
    capability: str
    compiler: str | None
    torch: str
    threads: int
    bf16_products: bool | None
    compile_seconds: float | None
    cache: str


@dataclass(frozen=True)
class _Outcome:
    """What this process has settled on: the library, or why there is none, and what its bfloat16 products are of."""

    built: compiling.Built | None
    failure: str | None
    bf16_products: bool | None


_lock = threading.Lock()
_outcome: _Outcome | None = None


def unavailable(dtype: torch.dtype) -> str | None:
    """None where the compiled kernel is loaded and serves `dtype`, else one sentence: the reason and the way out.

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
    recipe = compiling.Recipe.of_this_machine()
    found = None if force else compiling.find(recipe) or shipped.find(recipe)
    built = found or compiling.build(recipe, force=force, keep=True)
    with _lock:
        if _outcome is not None and _outcome.built is None:
            _outcome = None
    return built


def status() -> Status:
    """What is active in this process and why; loads a kernel that was compiled before, but compiles none."""
    outcome = None if _never() else _settle(may_compile=False)
    recipe = compiling.Recipe.of_this_machine()
    waits = "fused_cpu: not compiled yet; the first use compiles it, or now: diffattn doctor --build"
    none_yet = _never() or (waits if recipe.compiler else str(compiling.no_compiler()))
    reasons = {dtype: _reason(outcome, dtype) if outcome else none_yet for dtype in DTYPES}
    built = outcome.built if outcome else compiling.find(recipe) or shipped.find(recipe)
    return Status(
        active=tuple(_name(dtype) for dtype, reason in reasons.items() if reason is None),
        reasons={_name(dtype): reason for dtype, reason in reasons.items() if reason is not None},
        pending=reasons[DTYPES[0]] == waits,
        path=built.path if built else None,
        shipped=built is not None and built.shipped,
        shipped_refused=shipped.refused(recipe),
        capability=torch.backends.cpu.get_cpu_capability(),
        compiler=recipe.version,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        bf16_products=outcome.bf16_products if outcome else None,
        compile_seconds=built.seconds if built else None,
        cache=str(cache_folder()),
    )


def _never() -> str | None:
    off = os.environ.get("DIFFATTN_FUSED") == "0"
    return "fused_cpu: switched off by DIFFATTN_FUSED=0" if off else compiling.unserved_system()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reason(outcome: _Outcome, dtype: torch.dtype) -> str | None:
    if outcome.failure is not None:
        return outcome.failure
    if dtype not in DTYPES:
        return f"fused_cpu: {_name(dtype)} inputs are not supported; it serves {', '.join(map(_name, DTYPES))}"
    return None


def _settle(*, may_compile: bool) -> _Outcome | None:
    """The outcome of this process; None where there is none yet and it may not compile."""
    global _outcome
    with _lock:
        if _outcome is None:
            try:
                _outcome = _load_or_compile(may_compile)
            except UnsupportedError as error:
                _outcome = _Outcome(None, str(error), None)
                compiling.say(str(error))
        return _outcome


def _load_or_compile(may_compile: bool) -> _Outcome | None:
    recipe = compiling.Recipe.of_this_machine()
    # What was compiled here comes first: a person may have asked for it.
    compiled = compiling.find(recipe)
    for found in (compiled, shipped.find(recipe)):
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
    built = compiling.build(recipe, force=compiled is not None)
    try:
        return _load(built)
    except UnsupportedError:
        shutil.rmtree(Path(built.path).parent, ignore_errors=True)
        raise


def _load(built: compiling.Built) -> _Outcome:
    try:
        # In a thread of its own, where no fake tensors, autocast or default device of the caller reach the question.
        with ThreadPoolExecutor(1) as apart:
            return _Outcome(built, None, apart.submit(_load_and_ask, built.path).result())
    except (OSError, RuntimeError, AttributeError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UnsupportedError(
            f"fused_cpu: the compiled kernel could not be loaded ({reason}); "
            "name another compiler with CXX, then run: diffattn doctor --build"
        ) from None


def _load_and_ask(path: str) -> bool:
    """Loads the library; whether the processor multiplies bfloat16."""
    torch.ops.load_library(path)
    return bool(torch.ops.diffattn.fused_cpu_bfloat16_products())
