"""The section of `benchmarks.gpu` that measures rows of packed sequences, which see themselves alone."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import gpu_cases as cases
from benchmarks.gpu_cases import Call, Problem, make_call
from benchmarks.gpu_device import Device, Row, probe
from benchmarks.gpu_served import diff_attention
from benchmarks.gpu_timings import runner_of
from benchmarks.rows import pairwise, spread


def packed(device: Device) -> Iterator[Row]:
    """Sequences packed in one row, beside the same sequences as a batch and beside one sequence of the same length."""
    tokens, sequences = (24, 3) if device.tiny else (8192, 8)
    for width in (16,) if device.tiny else (64, 128):
        problem = Problem(1, tokens, tokens, device.heads, device.heads, width)
        for kind in ("v1", "v2"):
            yield from _packed(device, problem, kind, sequences)


def _packed(device: Device, problem: Problem, kind: str, sequences: int) -> Iterator[Row]:
    row_of = make_call(problem, kind, device.name)
    lengths = torch.full((sequences,), problem.queries // sequences, device=device.name)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    queries = cases.visibility.packed_queries(cu_seqlens, problem.queries, True, None)
    batch = as_batch(row_of, sequences)
    fused = functools.partial(cases.fused, backend="triton")
    forms: dict[str, tuple[Call, Callable[[Call], Tensor]]] = {
        "fused_triton": (row_of, functools.partial(fused, queries=queries)),
        "fused_triton_batch": (batch, fused),
        "fused_triton_one_sequence": (row_of, fused),
    }
    for asked in ("standard", device.asked):
        forms[f"diff_attention_{asked}"] = (
            row_of,
            functools.partial(diff_attention, backend=asked, cu_seqlens=cu_seqlens),
        )
    common: Row = {"what": "packed", "problem": problem._asdict(), "sequences": sequences}
    with torch.no_grad():
        d_output = torch.randn_like(cases.definition(batch))
    wanted = [x.flatten(0, 1)[None] for x in cases.wanted(batch, d_output)]
    errors: dict[str, dict[str, float]] = {}
    for name, (call, function) in forms.items():
        if call is row_of and not name.endswith("one_sequence"):

            def check(name: str = name, call: Call = call, function: Callable[[Call], Tensor] = function) -> None:
                got = cases.results(function, call, d_output.flatten(0, 1)[None])
                errors[name] = cases.relative_errors(got, wanted)

            probe(check)
    for phase in ("forward", "forward_backward"):
        for row in _timed(device, phase, forms):
            name = row.pop("name")
            row = common | {"phase": phase, "case": f"{kind}_{name}"} | row
            yield row | ({"errors": errors[name]} if name in errors else {})


def _timed(device: Device, phase: str, forms: dict[str, tuple[Call, Callable[[Call], Tensor]]]) -> Iterator[Row]:
    runners: dict[str, Callable[[], object]] = {}
    memory: dict[str, int] = {}
    for name, (call, function) in forms.items():

        def prepare(name: str = name, call: Call = call, function: Callable[[Call], Tensor] = function) -> None:
            runner = runner_of(phase, call, function)
            runner()
            memory[name] = device.extra_bytes(runner)
            runners[name] = runner

        said = probe(prepare)
        if said is not True:
            yield {"name": name, "unsupported": said}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(device.rounds(15)):
        for name, run in runners.items():
            seconds[name].append(device.seconds(run, 1, 0.02))
    for name, mine in seconds.items():
        ratios = {
            other: spread(pairwise(operator.truediv, mine, seconds[other]))
            for other in ("fused_triton_batch", "fused_triton_one_sequence")
            if other in seconds
        }
        row: Row = {"name": name, "rounds": len(mine), "seconds": spread(mine), "ratio_to": ratios}
        yield row | {"extra_peak_bytes": memory[name]}


def as_batch(call: Call, sequences: int) -> Call:
    """The sequences of one row as a batch of rows, with the same numbers."""
    q, k, v, lam = (
        x.detach().unflatten(1, (sequences, -1)).flatten(0, 1).requires_grad_()
        for x in (call.q, call.k, call.v, call.lam)
    )
    return call._replace(q=q, k=k, v=v, lam=lam)
