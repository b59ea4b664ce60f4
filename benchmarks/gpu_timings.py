"""Sections of `benchmarks.gpu` that measure time and memory of training and of whole calls."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_cases as cases
from benchmarks.gpu_cases import WAYS, Call, Problem, executed_flops, make_call
from benchmarks.gpu_device import Device, Row, probe
from benchmarks.gpu_served import served_by, users_forms
from benchmarks.gpu_step import training_step
from benchmarks.rows import pairwise, spread

TOKENS = 16384


def ceilings(device: Device) -> Iterator[Row]:
    """What the card does at best: a large matrix product and a large copy, counted as bytes read plus written."""
    n = 64 if device.tiny else 8192
    a, b = (torch.randn(n, n, device=device.name).bfloat16() for _ in "ab")
    source = torch.randn(n * n, device=device.name)
    target = torch.empty_like(source)
    product, copy = functools.partial(torch.mm, a, b), functools.partial(target.copy_, source)
    rates = {}
    for name, call, work in (("matmul_flops", product, 2 * n**3), ("copy_bytes", copy, 8 * n * n)):
        device.seconds(call, 3)
        rates[f"{name}_per_second"] = round(work / spread([device.seconds(call, 5) for _ in range(9)])["median"])
    yield {"what": "ceilings", **rates}


FUSED = {
    f"{way}_triton": (WAYS[way].kind, functools.partial(WAYS[way].run, backend="triton"))
    for way in ("v1_fused", "v2_fused")
}


def forms(device: Device) -> dict[str, tuple[str, Callable[[Call], Tensor]]]:
    """What is timed, by name: the kind of its call and the function."""
    named: dict[str, tuple[str, Callable[[Call], Tensor]]] = {}
    for way, backends in (
        ("softmax", ("flash", "cudnn", "default")),
        ("v1_padded", ("flash", "cudnn", "default")),
        ("v1_unequal", ("cudnn",)),
        ("v1_unequal_repeated", ("efficient",)),
        ("v1_two_calls", ("cudnn",)),
        ("v2_standard", ("flash", "cudnn", "default")),
    ):
        for backend in backends:
            named[f"{way}_{backend}"] = (WAYS[way].kind, functools.partial(WAYS[way].run, backend=backend))
    return named | FUSED | users_forms(device)


def compared_with_twins(seconds: dict[str, list[float]], mine: list[float]) -> Row:
    """The time of one case as a ratio to that of each softmax call, round by round."""
    return {twin: spread(pairwise(operator.truediv, mine, seconds[twin])) for twin in seconds if "softmax" in twin}


def timing(device: Device) -> Iterator[Row]:
    """Forward, and forward and backward with its memory; 16k tokens in sequences of 2k to 16k."""
    lengths, heads = (16,) if device.tiny else (4096, 2048, 8192, 16384), device.heads
    problems = []
    for T in lengths:
        batch = 1 if device.tiny else TOKENS // T
        problems += [Problem(batch, T, T, heads, heads, width) for width in ((16,) if device.tiny else (64, 128))]
    if not device.tiny:
        problems.insert(2, Problem(4, 4096, 4096, 16, 4, 64))
        problems.insert(3, Problem(4, 4096, 4096, 16, 4, 128))
    for problem in problems:
        calls = {kind: make_call(problem, kind, device.name) for kind in ("softmax", "v1", "v2")}
        for phase in ("forward", "forward_backward"):
            yield from _timed(device, problem, phase, calls)


def runner_of(phase: str, call: Call, function: Callable[[Call], Tensor]) -> Callable[[], Any]:
    """What is timed: a call without gradients, or with its backward pass where the phase is "forward_backward"."""
    if phase != "forward_backward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(call)

        return forward
    d_output = torch.randn_like(function(call).detach())
    return lambda: torch.autograd.grad(function(call), call.leaves, d_output)


def _timed(device: Device, problem: Problem, phase: str, calls: dict[str, Call]) -> Iterator[Row]:
    common: Row = {"what": "timing", "phase": phase, "problem": problem._asdict()}
    runners: dict[str, Callable[[], object]] = {}
    memory: dict[str, int] = {}
    for name, (kind, function) in forms(device).items():

        def prepare(name: str = name, kind: str = kind, function: Callable[[Call], Tensor] = function) -> None:
            runner = runner_of(phase, calls[kind], function)
            runner()
            memory[name] = device.extra_bytes(runner)
            runners[name] = runner

        said = probe(prepare)
        if said is not True:
            yield common | {"case": name, "unsupported": said}
    repeats, ahead = {}, {}
    for name, runner in runners.items():
        repeats[name] = max(1, min(10, round(0.002 / device.seconds(runner, 2))))
        ahead[name] = min(0.02, 1.2 * repeats[name] * device.host_seconds(runner, 2))
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(device.rounds(15)):
        for name, runner in runners.items():
            seconds[name].append(device.seconds(runner, repeats[name], ahead[name]))
    for name, mine in seconds.items():
        row = common | {"case": name, "rounds": len(mine), "calls_a_round": repeats[name], "seconds": spread(mine)}
        row["ratio_to"] = compared_with_twins(seconds, mine)
        row["extra_peak_bytes"] = memory[name]
        way = name.rsplit("_", 1)[0]
        if way not in WAYS:
            row |= served_by(name.rsplit("_", 1)[1], calls[forms(device)[name][0]], phase == "forward")
            way = row["way"]
        flops = executed_flops(way, problem, backward=phase != "forward")
        row |= {"executed_flops": flops, "executed_flops_per_second": round(flops / spread(mine)["median"])}
        yield row


def launching(device: Device) -> Iterator[Row]:
    """Seconds in which the host issues a call that is nearly no work for the card, which then waits for the host."""
    tokens, width, heads = *((16, 16) if device.tiny else (128, 64)), device.heads
    for phase in ("forward", "forward_backward", "decoding"):
        problem = Problem(1, 1 if phase == "decoding" else tokens, tokens, heads, heads, width)
        calls = {kind: make_call(problem, kind, device.name) for kind in ("softmax", "v1", "v2")}
        for name, (kind, function) in forms(device).items():
            row: Row = {"what": "launching", "phase": phase, "case": name, "tokens": tokens}
            make = functools.partial(runner_of, phase, calls[kind], function)

            def measure(row: Row = row, make: Callable[[], Callable[[], object]] = make) -> None:
                runner = make()
                device.host_seconds(runner, 2)
                row["host_seconds"] = spread([device.host_seconds(runner, 20) for _ in range(device.rounds(9))])

            said = probe(measure)
            yield row if said is True else row | {"unsupported": said}


def subtraction(device: Device) -> Iterator[Row]:
    """What the subtraction behind an SDPA call costs by itself, as PyTorch runs it without compiling."""
    for width in (16,) if device.tiny else (64, 128):
        tokens = 64 if device.tiny else TOKENS
        o = torch.randn(1, tokens, 16, 2 * width, device=device.name).bfloat16().requires_grad_()
        lam = torch.rand(1, tokens, 8, device=device.name).requires_grad_()
        d_output = torch.randn(1, tokens, 8, 2 * width, device=device.name).bfloat16()

        def forward(o: Tensor = o, lam: Tensor = lam) -> Tensor:
            return cases.standard.subtract(o, lam).to(o.dtype)

        def both(o: Tensor = o, lam: Tensor = lam, d_output: Tensor = d_output, forward: Any = forward) -> object:
            return torch.autograd.grad(forward(), [o, lam], d_output)

        for phase, call in (("forward", forward), ("forward_backward", both)):
            device.seconds(call, 3)
            taken = spread([device.seconds(call, 10) for _ in range(9)])
            yield {"what": "subtraction", "phase": phase, "width": 2 * width, "tokens": tokens, "seconds": taken}


def step(device: Device) -> Iterator[Row]:
    """A training step (forward and backward, no optimizer) of four layers shaped as the paper's 1.4B model."""
    sizes: Row = {"batch": 4, "tokens": 4096, "layers": 4}
    if device.tiny:
        sizes = {"batch": 1, "tokens": 16, "layers": 1}
    runners: dict[str, Callable[[], object]] = {}
    memory: dict[str, int] = {}
    for name, (kind, function) in forms(device).items():
        if not name.endswith(("_default", "_triton", "_unequal_cudnn", "_auto", "_standard")):
            continue
        hidden = {"hidden": 32} if device.tiny else {}
        run = training_step(kind, function, device=device.name, dtype=torch.bfloat16, **sizes, **hidden)
        said = probe(run)
        if said is not True:
            yield {"what": "step", **sizes, "case": name, "unsupported": said}
            continue
        runners[name], memory[name] = run, device.extra_bytes(run)
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(device.rounds(9)):
        for name, run in runners.items():
            seconds[name].append(device.seconds(run, 1, 0.02))
    for name, mine in seconds.items():
        row: Row = {"what": "step", **sizes, "case": name, "rounds": len(mine), "seconds": spread(mine)}
        yield row | {"ratio_to": compared_with_twins(seconds, mine), "extra_peak_bytes": memory[name]}
