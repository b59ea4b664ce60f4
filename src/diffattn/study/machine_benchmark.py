"""Measures what a small machine does with small models: ``diffattn doctor --benchmark``, about a minute.

The model has random weights and always the same sizes: two layers, so that tracing it for ONNX takes seconds, and
wide enough that its weights lie in main memory, as those of a useful model do. So a row says how fast a machine reads
weights and caches, and how much of what its memory allows is reached; a deeper model of as many weights is somewhat
slower, since each layer costs a little besides.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache

from diffattn.errors import ConfigError, UnsupportedError
from diffattn.export.onnx import export_onnx
from diffattn.export.run import OnnxDecoder
from diffattn.machine import cores, processor_name
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.ops.cpu.build import compile_kernel, status
from diffattn.ops.dispatch import diff_attention
from diffattn.plan.cost import match_parameters
from diffattn.plan.estimate import estimate
from diffattn.plan.hardware import Machine
from diffattn.plan.setting import Setting, precision_of
from diffattn.plan.shape import ModelShape
from diffattn.progress import OnStage, Stage, unseen
from diffattn.results.machine import FORM, AttentionTime, MachineRow, Rates, Speed, Spread
from diffattn.study.measured_machine import main_memory, measure_machine

ATTENTIONS = ("softmax", "diff_v1", "diff_v2")
# Tracing takes most of the time, and V1 adds nothing that V2 does not show.
EXPORTED = ("softmax", "diff_v2")
ONNX_BITS = 8
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# Bytes of two checkpoints and their exports, which are written beside each other, and some more.
SPACE = 500_000_000
SHAPE = ModelShape(
    hidden_size=1024, num_layers=2, num_heads=16, head_dim=64, intermediate_size=2816, vocab_size=8192,
    max_position_embeddings=4096, name="benchmark",
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """The model, lengths and rounds of the measurement; only tests take others, since rows are compared."""

    shape: ModelShape = SHAPE
    prompt: int = 512
    """Tokens that prefill reads at once."""
    cached: tuple[int, int] = (128, 2048)
    """Tokens in the cache where decoding begins; the second is as many prompts as fit."""
    steps: int = 8
    """Tokens of one round of decoding."""
    rounds: tuple[int, int] = (3, 25)
    """Rounds of each measurement, at least and at most."""
    budget: float = 1.5
    """Seconds after which no further round of a model begins."""
    matrix: int = 768
    """Rows of the matrices whose product is timed."""
    megabytes: int = 128
    """Size of what is copied, and of the file that is read, in 2²⁰ bytes."""


class Engine(Protocol):
    """A model in an engine: it reads tokens behind a cache, and returns the likeliest next one and the cache."""

    def read(self, ids: Any, cache: Any) -> tuple[Any, Any]:
        """Returns the likeliest next token (1, 1), and the cache of all tokens so far; None is an empty cache."""


class TorchEngine:
    """A model in torch, in float32."""

    def __init__(self, model: DiffTransformerForCausalLM) -> None:
        self.model = model.eval()

    @torch.no_grad()
    def read(self, ids: Any, cache: Any) -> tuple[Any, Any]:
        """Reads tokens as :meth:`Engine.read` says."""
        cache = DynamicCache(config=self.model.config) if cache is None else cache
        out = self.model(torch.from_numpy(ids), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits.argmax(-1).numpy(), cache


class OnnxEngine:
    """An exported model in onnxruntime."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.decoder = OnnxDecoder(folder, threads=threads)

    def read(self, ids: Any, cache: Any) -> tuple[Any, Any]:
        """Reads tokens as :meth:`Engine.read` says."""
        logits, cache = self.decoder.logits(ids, None, cache, last=1)
        return logits.argmax(-1), cache


def benchmark_machine(*, on_stage: OnStage = unseen, sizes: Sizes | None = None) -> MachineRow:
    """Measures this machine: its rates, the attention operation, and small models in each engine that is installed.

    Args:
        on_stage: called with what is being measured.
        sizes: what is measured. Default: the sizes of ``FORM``.

    Raises:
        ConfigError: the folder of temporary files has too little space.
    """
    sizes = sizes or Sizes()
    _check_space()
    _compile(on_stage)
    began, load, warm = time.perf_counter(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, _celsius()
    on_stage(Stage("measuring memory, disk and arithmetic"))
    machine = measure_machine(size=sizes.matrix, megabytes=sizes.megabytes)
    assert machine.flops is not None
    assert machine.bandwidth is not None
    assert machine.disk is not None
    read = read_rate(sizes.megabytes)
    rates = Rates(read=_rounded(read), copy=_rounded(machine.bandwidth), disk=_rounded(machine.disk),
                  fp32=_rounded(machine.flops["fp32"]), bf16=_rounded(machine.flops["bf16"]))  # fmt: skip
    # Decoding reads and does not write, which some machines do faster.
    machine = replace(machine, bandwidth=max(read, machine.bandwidth))
    on_stage(Stage("measuring attention"))
    attention = tuple(_attention(sizes))
    with tempfile.TemporaryDirectory(prefix="diffattn-benchmark-") as scratch:
        models = {name: _model(sizes.shape, name) for name in ATTENTIONS}
        parameters = {name: model.num_parameters() for name, model in models.items()}
        on_stage(Stage("measuring models in torch"))
        engines: Mapping[str, Engine] = {name: TorchEngine(model) for name, model in models.items()}
        speeds = [*_speeds("torch", 32, engines, sizes, machine)]
        if has_onnxruntime():
            exported = dict(_exported({name: models[name] for name in EXPORTED}, Path(scratch), on_stage))
            on_stage(Stage("measuring models in onnxruntime"))
            speeds += _speeds("onnxruntime", ONNX_BITS, exported, sizes, machine)
    return MachineRow(
        benchmark="machine", form=FORM, name=processor_name(), architecture=platform.machine(),
        system=f"{platform.system()} {platform.release()}", cores=cores(), threads=torch.get_num_threads(),
        memory=main_memory(), kernel="fused_cpu" if "float32" in status().active else "standard",
        python=platform.python_version(), diffattn=version("diffattn"), torch=torch.__version__,
        onnxruntime=version("onnxruntime") if has_onnxruntime() else None, date=datetime.date.today().isoformat(),
        load=round(load, 2), celsius=(*warm, *_celsius()), parameters=parameters, rates=rates, attention=attention,
        speeds=tuple(speeds), seconds=round(time.perf_counter() - began, 1), command="diffattn doctor --benchmark",
    )  # fmt: skip


def has_onnxruntime() -> bool:
    """Returns whether models can be exported and run in onnxruntime here."""
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES)


def _check_space() -> None:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < SPACE:
        raise ConfigError(f"{free / 1e6:.0f} MB free in the temporary folder {folder}",
                          f"{SPACE / 1e6:.0f} MB for the models that are measured",
                          "free some, or name another folder: TMPDIR=/path/to/folder")  # fmt: skip


def _compile(on_stage: OnStage) -> None:
    """Compiles the kernel if it is not there yet, which the first use would do in the midst of a measurement."""
    if status().pending:
        on_stage(Stage("compiling the kernel"))
        # Without it the standard call serves, and the row says so.
        with suppress(UnsupportedError):
            compile_kernel()


def _celsius() -> tuple[float, ...]:
    """Returns the temperature that Linux tells of the first zone, which is the processor's on small boards."""
    try:
        degrees = int(Path("/sys/class/thermal/thermal_zone0/temp").read_text(encoding="ascii")) / 1000
    except (OSError, ValueError):
        return ()
    return (degrees,) if degrees >= 0 else ()


def read_rate(megabytes: int) -> float:
    """Returns the bytes of main memory that are read per second where nothing is written: the best of several sums."""
    values = torch.ones(megabytes << 18)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - began)
    return values.nbytes / min(seconds)


def _model(shape: ModelShape, attention: str) -> DiffTransformerForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        config = DiffTransformerConfig.from_shape(match_parameters(shape, attention), attention)
        return DiffTransformerForCausalLM(config)


def _exported(
    models: Mapping[str, DiffTransformerForCausalLM], scratch: Path, on_stage: OnStage
) -> Iterator[tuple[str, Engine]]:
    for number, (name, model) in enumerate(models.items()):
        on_stage(Stage("exporting models to ONNX", number, len(models)))
        model.save_pretrained(scratch / name)
        export_onnx(scratch / name, scratch / f"{name}-onnx", bits=ONNX_BITS)
        yield name, OnnxEngine(scratch / f"{name}-onnx", torch.get_num_threads())


def _attention(sizes: Sizes) -> Iterator[AttentionTime]:
    for phase, queries, keys in (("prefill", sizes.prompt, sizes.prompt), ("decoding", 1, sizes.cached[1])):
        for name, seconds in _in_turns(_calls(sizes.shape, queries, keys), sizes).items():
            yield AttentionTime(attention=name, phase=phase, tokens=keys, seconds=_spread(seconds))


def _calls(shape: ModelShape, queries: int, keys: int) -> dict[str, Callable[[], object]]:
    """The operation alone, in float32, without the projections around it."""
    n, d = shape.num_heads, shape.head_dim

    def random(tokens: int, heads: int, width: int) -> torch.Tensor:
        return torch.randn(1, tokens, heads, width)

    # The layout of PyTorch's call has the heads before the tokens.
    q, k, v = (random(tokens, n, d).transpose(1, 2) for tokens in (queries, keys, keys))
    # V1 pairs the heads that are there; V2 has a noise query beside each.
    halves = [random(tokens, n // 2, d) for tokens in (queries, keys, queries, keys)]
    wide = random(keys, n // 2, 2 * d)
    signal, noise, key, value = (random(tokens, n, d) for tokens in (queries, queries, keys, keys))
    return {
        "softmax": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1),
        "diff_v1": lambda: diff_attention(halves[0], halves[1], halves[2], halves[3], wide, 0.5),
        "diff_v2": lambda: diff_attention(signal, key, noise, key, value, 0.5),
    }


def _speeds(engine: str, bits: int, engines: Mapping[str, Engine], sizes: Sizes, machine: Machine) -> Iterator[Speed]:
    """The models of one engine take turns, so that a slow moment of the machine weighs on all."""
    random = np.random.default_rng(0)
    ids = random.integers(sizes.shape.vocab_size, size=(1, sizes.prompt))

    def reading(model: Engine) -> Callable[[], object]:
        return lambda: model.read(ids, None)

    def writing(model: Engine, cached: int) -> Callable[[], object]:
        state: list[Any] = [None, None]
        for begin in range(0, cached, sizes.prompt):
            state[:] = model.read(ids[:, : min(sizes.prompt, cached - begin)], state[1])

        def steps() -> None:
            for _ in range(sizes.steps):
                state[:] = model.read(state[0], state[1])

        return steps

    measured = {("prefill", sizes.prompt): _in_turns({name: reading(one) for name, one in engines.items()}, sizes)}
    for cached in sizes.cached:
        calls = {name: writing(one, cached) for name, one in engines.items()}
        measured["decoding", cached] = _in_turns(calls, sizes)
    precision = precision_of("fp32", weights=None if bits == 32 else f"int{bits}")
    for (phase, tokens), found in measured.items():
        for name, seconds in found.items():
            made = tokens if phase == "prefill" else sizes.steps
            setting = Setting(context=tokens, precision=precision, machine=machine)
            plan = estimate(match_parameters(sizes.shape, name), name, setting)
            at_most = (plan.prefill if phase == "prefill" else plan.decoding).tokens_per_second
            assert at_most is not None
            speed = _spread([made / one for one in seconds])
            yield Speed(
                engine=engine, attention=name, bits=bits, phase=phase, tokens=tokens, tokens_per_second=speed,
                at_most=_rounded(at_most), reached=_rounded(speed.median / at_most),
            )  # fmt: skip


def _in_turns(calls: Mapping[str, Callable[[], object]], sizes: Sizes) -> dict[str, list[float]]:
    """Seconds of each call, in rounds in which each is made once, behind one round that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    least, most = sizes.rounds
    for number in range(1 + most):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number:
                found[name].append(time.perf_counter() - began)
        if number >= least and sum(map(sum, found.values())) >= sizes.budget * len(calls):
            break
    return found


def _spread(values: list[float]) -> Spread:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(median=_rounded(statistics.median(values)), p20=_rounded(fifths[0]), p80=_rounded(fifths[-1]))


def _rounded(value: float) -> float:
    """Six digits, as no clock of these gives more."""
    return float(f"{value:.6g}")
