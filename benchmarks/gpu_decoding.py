"""The section of `benchmarks.gpu` that measures decoding: few queries over a cache, in CUDA graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu_cases import WAYS, Call, Problem, make_call
from benchmarks.gpu_device import Device, Row, probe
from benchmarks.gpu_served import users_forms
from benchmarks.gpu_timings import FUSED, compared_with_twins, runner_of
from benchmarks.rows import spread


def decoding(device: Device) -> Iterator[Row]:
    """One and four queries over a cache, in graphs that walk over several caches, more than the card's own cache holds.

    A graph's output is compared with that of the same calls outside of it.
    """
    sizes = [(1, 64)] if device.tiny else [(1, 4096), (1, 32768), (16, 4096), (16, 32768)]
    for batch, keys in sizes:
        for width, groups in [(16, 2)] if device.tiny else [(64, 16), (128, 16), (64, 4)]:
            for queries in (1, 4):
                yield from _decoded(device, Problem(batch, queries, keys, device.heads, groups, width))


def _decoded(device: Device, problem: Problem) -> Iterator[Row]:
    common: Row = {"what": "decoding", "problem": problem._asdict()}
    read = 2 * problem.batch * problem.keys * problem.groups * problem.width * 2
    caches = 1 if device.tiny else max(1, min(24, -(-(2**28) // read)))
    calls = {
        kind: [make_call(problem, kind, device.name, seed) for seed in range(caches)]
        for kind in ("softmax", "v1", "v2")
    }
    graphs: dict[str, Callable[[], object]] = {}
    same: dict[str, bool] = {}
    for name, (kind, function) in _forms(device).items():

        def prepare(name: str = name, kind: str = kind, function: Callable[[Call], Tensor] = function) -> None:
            runners = [runner_of("forward", call, function) for call in calls[kind]]
            graphs[name], captured = _graph(device, runners)
            graphs[name]()
            same[name] = all(torch.equal(run(), output) for run, output in zip(runners, captured, strict=True))

        said = probe(prepare)
        if said is not True:
            yield common | {"case": name, "unsupported": said}
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(device.rounds(15)):
        for name, run in graphs.items():
            seconds[name].append(device.seconds(run, 1) / caches)
    for name, mine in seconds.items():
        taken = spread(mine)
        row = common | {"case": name, "caches": caches, "rounds": len(mine), "seconds": taken}
        row |= {"ratio_to": compared_with_twins(seconds, mine), "bytes_read": read}
        yield row | {"bytes_per_second": round(read / taken["median"]), "same_bits_in_graph": same[name]}


def _forms(device: Device) -> dict[str, tuple[str, Callable[[Call], Tensor]]]:
    named: dict[str, tuple[str, Callable[[Call], Tensor]]] = {}
    for way in ("softmax", "v1_padded", "v1_unequal", "v2_standard"):
        for backend in ("flash", "cudnn", "default"):
            named[f"{way}_{backend}"] = (WAYS[way].kind, functools.partial(WAYS[way].run, backend=backend))
    return named | FUSED | users_forms(device)


def _graph(device: Device, runners: list[Callable[[], Tensor]]) -> tuple[Callable[[], object], list[Tensor]]:
    """The calls one after the other as one CUDA graph, so that launches cost nothing, and where its outputs lie."""
    if device.tiny:
        outputs = [runner() for runner in runners]
        return runners[0], outputs
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for runner in runners:
            runner()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [runner() for runner in runners]
    # The graph knows addresses: the tensors that lie there live as long as it does.
    return lambda kept=(runners, outputs): graph.replay(), outputs
