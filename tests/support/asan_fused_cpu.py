"""Runs the compiled kernel under AddressSanitizer and UBSan over the cases of its tests: `make asan`.

The sources are compiled with both into a temporary folder, and a second process loads that library in the place of the
cached one. The matrix products are torch's and are not compiled here: for their sake every input ends where a page
begins that nobody may read. Exit status 1 where anything is reported, 2 where there is no sanitizer.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from support.backends import fused_cpu_diff_attention
from support.comparison import Inputs, make_inputs
from support.fused_cases import CASES, DTYPES
from torch import Tensor

from diffattn.ops.cpu import compiling
from diffattn.ops.cpu.operator import decode, decodes
from diffattn.ops.visibility import seeing_queries

SANITIZE = "-O1 -g -fsanitize=address,undefined -fno-omit-frame-pointer"
WIDTHS = [(1, 1), (2, 5), (3, 16), (17, 31), (31, 17), (64, 128), (127, 2), (255, 256), (256, 251)]
QUERIES = [1, 2, 3, 5, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]


def main() -> int:
    recipe = compiling.BuildKey.of_this_machine()
    asked = [*recipe.compiler, "-print-file-name=libasan.so"]
    runtime = subprocess.run(asked, capture_output=True, text=True).stdout.strip() if recipe.compiler else ""
    if "/" not in runtime:
        print(f"{recipe.version} brings no libasan.so; wanted g++ and its sanitizers", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="diffattn-asan-") as scratch:
        flags = f"{recipe.flags.replace('-O3', '')} {SANITIZE}"
        print(f"compiling with {SANITIZE} …", flush=True)
        # Flags reach the compiler; to the linker they go with its name.
        sanitized = replace(recipe, flags=flags, compiler=[*recipe.compiler, *SANITIZE.split()])
        library = compiling._compile(sanitized, Path(scratch) / "work", Path(scratch) / "log")
        environment = os.environ | {
            "LD_PRELOAD": runtime,
            # The interpreter and torch keep what they allocate until the end.
            "ASAN_OPTIONS": "detect_leaks=0:exitcode=1",
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:exitcode=1",
            "KERNEL": str(library),
            # Nothing that is imported may load the cached one beside it.
            "DIFFATTN_FUSED": "0",
        }
        return subprocess.run([sys.executable, __file__, "inside"], env=environment).returncode


def guarded(x: Tensor) -> Tensor:
    """A copy of x, strides and all, whose memory ends where a page begins that nobody may touch."""
    size = x.untyped_storage().nbytes()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(start + pages), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    whole = torch.frombuffer(memory, dtype=x.dtype, count=size // x.itemsize, offset=pages - size)
    return whole.as_strided(x.size(), x.stride(), x.storage_offset()).copy_(x)


def run(x: Inputs, strided: bool) -> None:
    """Forward and backward, with the inputs as they are or as the last heads of wider rows."""
    tensors = [guarded(torch.cat([t, t], 2)[:, :, t.shape[2] :] if strided else t) for t in x[:6]]
    one_key = x.k2 is x.k1
    leaves = [t.requires_grad_() for t in tensors]
    leaves[3] = leaves[1] if one_key else leaves[3]
    output = fused_cpu_diff_attention(*leaves, **x.options)
    gradients = torch.autograd.grad(output, leaves, guarded(torch.ones_like(output)))
    assert all(result.isfinite().all() for result in (output, *gradients))
    T = x.q1.shape[1]
    queries = seeing_queries(T, x.k1.shape[1], False, torch.zeros(x.k1.shape[:2], dtype=torch.bool))
    for end in (T, T // 2):
        queries[1] = end
        fused_cpu_diff_attention(*leaves, queries=guarded(queries)).sum().backward()


@torch.no_grad()
def run_decoding(x: Inputs) -> None:
    """The same call as a layer makes it, with the norm behind it."""
    signals = x.q1.shape[2] // x.q2.shape[2]
    query = torch.cat([x.q1.unflatten(2, (-1, signals)), x.q2.unsqueeze(3)], dim=3).flatten(2, 3).transpose(1, 2)
    key = (x.k1 if x.k2 is x.k1 else torch.cat([x.k1, x.k2], dim=-1)).transpose(1, 2)
    given = [guarded(t) for t in (query, key, x.v.transpose(1, 2), x.lam)]
    if decodes(given[0], given[2], signals_per_noise=signals) and x.q1.shape[1] <= x.k1.shape[1]:
        gain = guarded(torch.ones(x.v.shape[-1]))
        assert decode(*given, gain=gain, eps=1e-5, signals_per_noise=signals).isfinite().all()


def inside() -> int:
    torch.ops.load_library(os.environ["KERNEL"])
    problems = [dict(options) for options in CASES.values()]
    for D, Dv in WIDTHS:
        problems += [{"T": T, "S": 41, "H": 2, "G": 1, "D": D, "Dv": Dv, "one_key": D % 2 == 1} for T in (3, 33)]
    problems += [{"B": 1, "T": T, "S": T + past, "H": 3, "G": 1} for T in QUERIES for past in (0, 1, 130)]
    problems += [{"B": 1, "T": T, "S": T + 130, "H": 6, "noise_heads": 2, "G": 1} for T in QUERIES]
    problems += [{"B": 1, "T": T, "S": T + 130, "H": 5, "noise_heads": 1, "G": 1, "window": 60} for T in QUERIES]
    problems += [{"T": 20, "S": S, "causal": False} for S in (1, 2, 127, 128, 129, 257)]
    for dtype in DTYPES:
        for number, problem in enumerate(problems):
            for strided in (False, True):
                torch.set_num_threads(1 + number % 3)
                try:
                    run(make_inputs(dtype=dtype, **problem), strided)
                    run_decoding(make_inputs(dtype=dtype, **problem))
                except BaseException:
                    print(f"in {problem}, strided={strided}, {dtype}", file=sys.stderr)
                    raise
    print(f"{4 * len(problems)} calls, forward, backward and as a layer decodes: nothing reported")
    return 0


if __name__ == "__main__":
    sys.exit(inside() if sys.argv[1:] == ["inside"] else main())
