"""What `diffattn doctor --benchmark` measures."""

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffattn.errors import ConfigError
from diffattn.machine import cores
from diffattn.plan.cost import match_parameters
from diffattn.plan.estimate import estimate
from diffattn.plan.hardware import Machine
from diffattn.plan.setting import Setting, precision_of
from diffattn.plan.shape import ModelShape
from diffattn.progress import Stage
from diffattn.results.machine import MachineRow
from diffattn.study import machine_benchmark
from diffattn.study.machine_benchmark import (
    ATTENTIONS,
    EXPORTED,
    SHAPE,
    Engine,
    Sizes,
    TorchEngine,
    benchmark_machine,
)

SMALL = ModelShape(hidden_size=64, num_layers=1, num_heads=4, intermediate_size=96, vocab_size=64,
                   max_position_embeddings=64)  # fmt: skip
SIZES = Sizes(shape=SMALL, prompt=8, cached=(3, 16), steps=2, rounds=(2, 2), budget=0.0, matrix=16, megabytes=1)


def check(row: MachineRow, exported: Sequence[str]) -> None:
    """The row holds every engine, phase and variant, is read again, and says nothing of who measured."""
    text = json.dumps(row.to_json())
    assert MachineRow.from_json(json.loads(text)) == row
    assert [(speed.engine, speed.bits, speed.attention, speed.phase, speed.tokens) for speed in row.speeds] == [
        (engine, bits, attention, phase, tokens)
        for engine, bits, attentions in (("torch", 32, ATTENTIONS), ("onnxruntime", 8, exported))
        for phase, tokens in (("prefill", 8), ("decoding", 3), ("decoding", 16))
        for attention in attentions
    ]
    assert [(call.attention, call.phase, call.tokens) for call in row.attention] == [
        (attention, phase, tokens) for phase, tokens in (("prefill", 8), ("decoding", 16)) for attention in ATTENTIONS
    ]
    assert row.cores == cores()
    assert row.onnxruntime
    for secret in (socket.gethostname(), str(Path.home()), str(Path.cwd())):
        assert len(secret) < 4 or secret not in text


def test_a_row_has_every_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that would be exported run in torch twice: tracing them takes its time."""
    monkeypatch.setattr(machine_benchmark, "_exported", lambda models, *_: {
        name: TorchEngine(model) for name, model in models.items()}.items())  # fmt: skip
    stages: list[Stage] = []
    check(benchmark_machine(on_stage=stages.append, sizes=SIZES), EXPORTED)
    assert [stage.name for stage in stages if "compiling" not in stage.name] == [
        "measuring memory, disk and arithmetic", "measuring attention", "measuring models in torch",
        "measuring models in onnxruntime",
    ]  # fmt: skip


@pytest.mark.full
def test_models_are_exported_and_run_in_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_benchmark, "EXPORTED", ("diff_v2",))
    check(benchmark_machine(sizes=SIZES), ("diff_v2",))


def test_without_onnxruntime_torch_alone_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_benchmark, "PACKAGES", ("onnx", "no_such_package"))
    row = benchmark_machine(sizes=SIZES)
    assert row.onnxruntime is None
    assert {speed.engine for speed in row.speeds} == {"torch"}


def test_a_full_disk_is_said_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_benchmark.shutil, "disk_usage", lambda folder: SimpleNamespace(free=9_000_000))
    stages: list[Stage] = []
    with pytest.raises(
        ConfigError, match=r"9 MB free in the temporary folder .*; wanted 500 MB .*: free some, or name"
    ):
        benchmark_machine(on_stage=stages.append, sizes=SIZES)
    assert stages == []


class Clock:
    """A clock that each token moves on by a second, and a model that counts what it reads."""

    def __init__(self) -> None:
        self.now = 0.0
        self.read_of: list[tuple[int, int]] = []

    def read(self, ids: Any, cache: Any) -> tuple[Any, Any]:
        self.read_of.append((ids.shape[1], cache or 0))
        self.now += ids.shape[1]
        return ids[:, -1:], (cache or 0) + ids.shape[1]


def test_decoding_begins_behind_the_cache_and_speeds_are_beside_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(machine_benchmark.time, "perf_counter", lambda: clock.now)
    machine = Machine("toy", {"fp32": 1e9, "bf16": 1e9}, bandwidth=1e9)
    engines: dict[str, Engine] = {"diff_v2": clock}
    prefill, short, long = machine_benchmark._speeds("onnxruntime", 8, engines, SIZES, machine)
    # A round that is not counted, then two.
    assert clock.read_of == [
        *[(8, 0)] * 3,
        (3, 0), *((1, 3 + step) for step in range(6)),
        (8, 0), (8, 8), *((1, 16 + step) for step in range(6)),
    ]  # fmt: skip
    setting = Setting(context=16, precision=precision_of("fp32", weights="int8"), machine=machine)
    planned = estimate(match_parameters(SMALL, "diff_v2"), "diff_v2", setting).decoding.tokens_per_second
    assert planned is not None
    assert (prefill.tokens_per_second.median, short.tokens, long.tokens_per_second.median) == (1, 3, 1)
    assert long.at_most == pytest.approx(planned, rel=1e-5)
    assert long.reached == pytest.approx(1 / planned, rel=1e-5)


def test_the_weights_that_are_read_lie_in_main_memory() -> None:
    """Beyond 32 MB of int8 no cache of a board or a laptop holds them, and the cache of the longer text counts too."""
    weights = estimate(SHAPE, "softmax", Setting(context=2048, precision="fp32")).disk["int8"].bytes
    cache = estimate(SHAPE, "softmax", Setting(context=2048, precision="fp32")).decoding.memory.cache
    assert weights > 32e6
    assert 0.5 < cache / weights < 2
