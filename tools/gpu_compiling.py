"""Compiles Triton kernels for a GPU that is not there, with exactly the arguments of the real launches.

A launch function is called on CPU tensors under a driver that only names a target. Triton then makes the signature,
the constants and the alignments as on that chip, and a hook takes them in place of the compilation and the launch.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import io
import re
import tempfile
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _Driver(DriverBase):
    """Stands for a chip: it names the target, and there is nothing that it could launch."""

    def __init__(self, chip: str) -> None:
        self.chip = chip

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError(f"{ty}: nothing is launched offline")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is timed offline")

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError("tensors lie on the CPU offline")

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.chip]

    def get_current_device(self) -> str:
        # Triton keeps the target of every device that it has met.
        return self.chip

    def get_current_stream(self, device: object) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    """One launch as Triton would compile it."""

    kernel: JITFunction
    chip: str
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    warps: int
    stages: int

    @property
    def key(self) -> str:
        """A digest of all that the code is made of: statements of the kernel and of what it calls, and arguments."""
        described = [
            *sorted(_statements(self.kernel)),
            self.chip,
            sorted(self.signature.items()),
            sorted((path, str(value)) for path, value in self.constants.items()),
            sorted(self.attributes.items()),
            self.warps,
            self.stages,
        ]
        return _digest(described)


@contextlib.contextmanager
def captured(chip: str) -> Iterator[list[Launch]]:
    """Collects the launches of the block, none of which takes place."""
    launches: list[Launch] = []

    def take(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        (attributes,) = compile["configs"]
        launches.append(
            Launch(
                fn.jit_function, chip, compile["signature"], compile["constants"], attributes,
                compile["num_warps"], compile["num_stages"],
            )
        )  # fmt: skip
        # Compiled elsewhere, says this; Triton then does not launch either.
        return True

    driver, hook = triton.runtime.driver._active, triton.knobs.runtime.jit_cache_hook
    triton.runtime.driver.set_active(_Driver(chip))
    triton.knobs.runtime.jit_cache_hook = take
    try:
        yield launches
    finally:
        triton.runtime.driver._active = driver
        triton.knobs.runtime.jit_cache_hook = hook


@functools.cache
def _statements(kernel: JITFunction) -> frozenset[str]:
    """The code of a kernel and of the kernels' functions that it calls, without comments and docstrings."""
    found: set[str] = set()
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        tree = ast.parse(function.src)
        (definition,) = tree.body
        assert isinstance(definition, ast.FunctionDef)
        if ast.get_docstring(definition) is not None:
            del definition.body[0]
        code = ast.unparse(definition)
        if code in found:
            continue
        found.add(code)
        names = {node.id for node in ast.walk(definition) if isinstance(node, ast.Name)}
        for name in names & function.fn.__globals__.keys():
            value = function.fn.__globals__[name]
            if isinstance(value, JITFunction):
                waiting.append(value)
            elif isinstance(value, triton.language.constexpr):
                found.add(f"{name} = {value.value}")
    return frozenset(found)


class KnownError(Exception):
    """Ends a compilation whose code is one of those that were compiled before; it names which."""


def compiled(launch: Launch, known: Container[str] = ()) -> tuple[str, dict[str, int | bool]]:
    """A digest of a launch's code before it is fitted to the chip, and what the fitted code takes of the chip.

    Raises:
        KnownError: the digest is among `known`. Names of variables and the order of files do not change it.
    """
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    digests: list[str] = []

    def look(backend: object = None, stages: dict[str, Any] | None = None, *_: object) -> tuple[str, str] | None:
        if stages is None:
            return "", ""
        fit = stages["ttgir"]

        def look_and_fit(code: Any, metadata: Any) -> Any:
            digests.append(_digest([launch.chip, launch.warps, launch.stages, _nameless(str(code))]))
            if digests[0] in known:
                raise KnownError(digests[0])
            return fit(code, metadata)

        stages["ttgir"] = look_and_fit
        return None

    said = io.StringIO()
    knobs = triton.knobs
    with contextlib.ExitStack() as stack:
        for each in (knobs.nvidia, knobs.compilation, knobs.cache, knobs.runtime):
            stack.enter_context(each.scope())
        # What the assembler says is not kept in Triton's cache.
        knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log = True, True
        knobs.runtime.add_stages_inspection_hook = look
        with contextlib.redirect_stdout(said):
            options = {"num_warps": launch.warps, "num_stages": launch.stages}
            code = triton.compile(source, TARGETS[launch.chip], options)
    taken = {"shared": code.metadata.shared}
    if launch.chip.startswith("gfx"):
        taken |= _of_amd(code.asm["amdgcn"])
    else:
        taken |= _of_nvidia(code.asm["ptx"], said.getvalue()) | {"tensor_memory": code.metadata.tmem_size or 0}
    return digests[0], taken


def _digest(values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _nameless(code: str) -> str:
    """Triton's own language without places in files, its values numbered in the order in which they appear."""
    code = re.sub(r"^#loc.*$", "", code, flags=re.MULTILINE)
    code = re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", code)
    numbers: dict[str, str] = {}
    return re.sub(r"%[\w$.-]+", lambda name: numbers.setdefault(name[0], f"%{len(numbers)}"), code)


def _of_nvidia(assembly: str, said: str) -> dict[str, int | bool]:
    (registers,) = re.findall(r"Used (\d+) registers", said)
    (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
    return {
        "registers": int(registers),
        "spilled": int(spilled),
        # The products by instruction: of Hopper, of Blackwell for data centres, of all others.
        **{name: len(re.findall(rf"\b{name}\.", assembly)) for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync")},
        "serialised": "serialized" in said,
    }


def _of_amd(assembly: str) -> dict[str, int | bool]:
    def stated(name: str) -> int:
        (number,) = re.findall(rf"^\s*\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        return int(number)

    return {
        "registers": stated("vgpr_count"),
        # Counted in registers of four bytes for each lane.
        "spilled": 4 * stated("vgpr_spill_count"),
        "mfma": len(re.findall(r"^\s*v_mfma", assembly, re.MULTILINE)),
    }
