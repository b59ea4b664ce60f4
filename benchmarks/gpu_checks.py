"""Sections of `benchmarks.gpu` that ask what serves and whether it is right."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_cases as cases
from benchmarks.gpu_cases import WAYS, Call, Problem, make_call, padding_of
from benchmarks.gpu_device import Device, Row, probe
from benchmarks.gpu_served import sdpa_call, users_forms


def serves(device: Device) -> Iterator[Row]:
    """Which backend of SDPA serves which call, forward and backward, and which one PyTorch takes by itself."""
    T = 32 if device.tiny else 512
    grouped = {"heads": 16, "groups": 4}
    calls: list[tuple[str, str, Problem, bool]] = []
    for width in (64, 128):
        plain = Problem(2, T, T, 16, 16, width)
        calls += [(f"{way} {width}", way, plain, False) for way in WAYS if way not in ("v1_fused", "v2_fused")]
        calls += [(f"v1_unequal {width}, 4 groups", "v1_unequal", plain._replace(**grouped), False)]
    plain = Problem(2, T, T, 16, 16, 64)
    calls += [
        ("softmax 64, 4 groups", "softmax", plain._replace(**grouped), False),
        ("v1_unequal_repeated 64, 4 groups", "v1_unequal_repeated", plain._replace(**grouped), False),
        ("softmax 64, mask", "softmax", plain, True),
        ("v1_unequal 64, mask", "v1_unequal", plain, True),
        ("v1_padded 64, mask, 4 groups", "v1_padded", plain._replace(**grouped), True),
        ("v2_standard 64, mask, 4 groups", "v2_standard", plain._replace(**grouped), True),
        ("softmax 64, T < S, not causal", "softmax", plain._replace(queries=T // 2, causal=False), False),
        ("v1_unequal 64, T < S, not causal", "v1_unequal", plain._replace(queries=T // 2, causal=False), False),
        ("v1_padded 64, 1 query", "v1_padded", plain._replace(queries=1), False),
        ("v1_unequal 64, 1 query", "v1_unequal", plain._replace(queries=1), False),
        ("softmax 256", "softmax", plain._replace(width=256), False),
    ]
    for name, way, problem, masked in calls:
        call = make_call(problem, WAYS[way].kind, device.name)
        mask = torch.ones(2, 1, problem.queries, problem.keys, dtype=torch.bool, device=device.name).tril()
        run = functools.partial(WAYS[way].run, call, mask=mask if masked else None)
        row: Row = {"what": "serves", "call": name, "problem": problem._asdict(), "mask": masked}
        row["default"] = sdpa_call(lambda run=run: run("default"))["kernel"]
        for backend in device.backends:
            forward = probe(lambda run=run, backend=backend: run(backend))
            row[backend] = {"forward": forward}
            if forward is True:
                row[backend]["backward"] = probe(
                    lambda run=run, backend=backend, call=call: torch.autograd.grad(run(backend).sum(), call.leaves)
                )
        yield row


def nan(device: Device) -> Iterator[Row]:
    """Backward passes with a mask and scores near −100, where PyTorch's issue 196678 says that cuDNN gives NaN.

    Softmax attention with a mask tensor under each backend of PyTorch, and `diff_attention` with padding.
    """
    for T in (64, 128, 192, 256) if not device.tiny else (16,):
        problem = Problem(2, T, T, device.heads, device.heads, 16 if device.tiny else 64)
        mask = torch.ones(T, T, dtype=torch.bool, device=device.name).tril().expand(2, 1, T, T)
        ways: dict[str, tuple[str, Callable[[Call], Tensor]]] = {
            f"softmax_{backend}": ("softmax", functools.partial(cases.softmax, backend=backend, mask=mask))
            for backend in device.backends
        }
        padding = padding_of(problem, device.name)
        for name, (kind, function) in users_forms(device).items():
            ways[name] = kind, functools.partial(function, key_padding=padding)
        for name, (kind, function) in ways.items():
            call = make_call(problem, kind, device.name)
            with torch.no_grad():
                # Scores are the product of the means, times the width and 1 / √width.
                mean = (100 / call.q.shape[-1] ** 0.5) ** 0.5
                call.q.mul_(0.1).add_(mean)
                call.k.mul_(0.1).sub_(mean)
            row: Row = {"what": "nan", "case": name, "problem": problem._asdict(), "mask": True}

            def run(function: Any = function, call: Call = call, row: Row = row) -> None:
                grads = torch.autograd.grad(function(call).sum(), call.leaves)
                names = ("d_q", "d_k", "d_v", "d_lam")
                row["nan_values"] = {n: int(g.isnan().sum()) for n, g in zip(names, grads, strict=False)}

            said = probe(run)
            yield row if said is True else row | {"unsupported": said}


def compiling(device: Device) -> Iterator[Row]:
    """Compiles what the other sections want of the kernels, in several processes, into Triton's cache."""
    if device.tiny:
        return
    began = time.monotonic()
    jobs = [(Problem(2, 256, 256, 16, 16, width), kind, False) for width in (64, 128) for kind in ("v1", "v2")]
    jobs += [(problem, kind, padding) for problem, padding in kernel_problems(device) for kind in ("v1", "v2")]
    with torch.multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        failed = [said for said in pool.map(_compile, jobs, chunksize=1) if said]
    taken = round(time.monotonic() - began, 1)
    yield {"what": "compiling", "jobs": len(jobs), "seconds": taken, "failed": failed}


def _compile(job: tuple[Problem, str, bool]) -> str | None:
    """Training, inference and decoding on the tensors of one problem; None, or what went wrong."""
    problem, kind, padding = job
    try:
        call = make_call(problem, kind, "cuda")
        queries = cases.seeing_queries(call, padding_of(problem, "cuda")) if padding else None
        output = cases.fused(call, "triton", queries)
        output.backward(torch.ones_like(output))
        with torch.no_grad():
            cases.fused(call, "triton", queries)
            if not padding:
                cases.fused(call._replace(q=call.q[:, -1:], lam=call.lam[:, -1:]), "triton")
        torch.cuda.synchronize()
    except Exception as error:
        return f"{kind} {problem}: {error!r}"[:300]
    return None


def correctness(device: Device) -> Iterator[Row]:
    """Relative errors of outputs and gradients against the definition in float64, of every way and backend."""
    if device.tiny:
        problems = [Problem(1, 19, 19, 4, 4, 16), Problem(1, 19, 37, 4, 2, 16, causal=False)]
    else:
        base = Problem(2, 448, 448, 8, 8, 64)
        problems = [base, base._replace(width=128), base._replace(groups=4, heads=16), base._replace(dtype="float16")]
        problems += [base._replace(queries=200, causal=False)]
    for problem in problems:
        for kind in ("softmax", "v1", "v2"):
            ways = {
                f"{name}_{backend}": functools.partial(way.run, backend=backend)
                for name, way in WAYS.items()
                for backend in (["triton"] if way.run is cases.fused else device.backends)
                if way.kind == kind
            }
            yield from _correct(device, problem, kind, ways)


def kernel_problems(device: Device) -> list[tuple[Problem, bool]]:
    """Shapes that cross blocks, with and without padding; together they take every entry of the block table."""
    if device.tiny:
        base = Problem(2, 37, 37, 4, 2, 16)
        return [(base._replace(keys=53), False), (base, True)]
    base, few = Problem(2, 333, 333, 8, 4, 64), Problem(2, 1, 500, 8, 4, 64)
    problems = [(base, False), (base._replace(keys=403), False), (base, True), (base._replace(width=128), True)]
    problems += [(base._replace(width=width), False) for width in (16, 32, 48, 80, 96, 128)]
    problems += [(base._replace(dtype="float16"), False), (base._replace(queries=400, causal=False), False)]
    problems += [(few, False), (few._replace(queries=5), True), (few._replace(width=128), False)]
    # Widths that neither V1 nor V2 has in a model.
    for shape in (base, few):
        for width, value_width in ((64, 64), (64, 128), (128, 128), (128, 256), (200, 200), (256, 256)):
            problems.append((shape._replace(width=width, value_width=value_width), False))
    return problems


def kernels(device: Device) -> Iterator[Row]:
    """The Triton kernels alone, on shapes that cross blocks: errors, equal bits of two runs, no unwritten output."""
    for problem, padding in kernel_problems(device):
        for kind in ("v1", "v2"):
            ways = {f"{kind}_fused_triton": functools.partial(cases.fused, backend="triton")}
            blocks = cases.blocks_of(kind, problem, device.chip)
            for row in _correct(device, problem, kind, ways, padding, twice=True):
                yield row | {"blocks": blocks}


def _correct(
    device: Device,
    problem: Problem,
    kind: str,
    ways: dict[str, Callable[..., Tensor]],
    padding: bool = False,
    twice: bool = False,
) -> Iterator[Row]:
    call = make_call(problem, kind, device.name)
    key_padding, options = None, {}
    if padding:
        key_padding = padding_of(problem, device.name)
        options = {"queries": cases.seeing_queries(call, key_padding)}
    with torch.no_grad():
        d_output = torch.randn_like(cases.definition(call))
    wanted = cases.wanted(call, d_output, key_padding)
    for name, way in ways.items():
        row: Row = {"what": "correctness", "case": name, "problem": problem._asdict(), "padding": padding}
        function = functools.partial(way, **options)

        def check(row: Row = row, function: Callable[[Call], Tensor] = function) -> None:
            with cases.poisoned(twice):
                got = cases.results(function, call, d_output)
                row["errors"] = cases.relative_errors(got, wanted)
                if twice:
                    again = cases.results(function, call, d_output)
                    with torch.no_grad():
                        got, again = [*got, function(call)], [*again, function(call)]
                    row["same_bits"] = all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
                    row["errors"]["inference"] = cases.relative_errors(got[-1:], wanted)["output"]

        said = probe(check)
        yield row if said is True else row | {"unsupported": said}
