"""Inference of a 135M-parameter shape: prefill, decoding, start-up and memory, beside `transformers`' own models.

Also of the exported models in onnxruntime, in float32. Those give logits for every token of a prompt, where torch is
asked for the last one's alone: a fifth more work in prefill.

Prefill reads 512 tokens; decoding makes tokens one by one behind 128 or 4096 cached ones, greedily, with the cache
that `generate` uses. The models take turns within one process, A B C A B C, so that a ratio compares neighbours in
time. Start-up is a fresh process per model and round: from its start to the first token behind 128, its time to load,
and its peak of resident memory. Weights begin at a cache line in every file. One JSON line per problem and model.
Weights are random: they do not matter for time.

In half precision softmax, V1 and V2 also take turns with the same weights in float32.

    python -m benchmarks.inference --threads 1 2 --out benchmarks/results/inference.jsonl
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Idle threads sleep instead of spinning: spinning ones starve the others wherever the machine is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from onnxruntime import OrtValue
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging

from benchmarks.rows import Writer, in_turns, pairwise, provenance, spread
from benchmarks.training_step import diffllama, llama, ours
from diffattn import ModelShape
from diffattn.export.onnx import export_onnx
from diffattn.export.run import Cache, OnnxDecoder

# SmolLM2-135M with heads that pair: 12 of width 48 over 4 key/value heads, in place of 9 of 64 over 3.
SHAPE = ModelShape(
    hidden_size=576, num_layers=30, num_heads=12, num_kv_heads=4, head_dim=48, intermediate_size=1536,
    vocab_size=49152, max_position_embeddings=8192, name="135M",
)  # fmt: skip
PROMPT, STEPS = 512, 8
CONTEXTS = (128, 4096)
DTYPES = ("float32", "bfloat16")
HALVES = ("bfloat16", "float16")
# Its limit lies nearer to 1 than rounds lie to each other.
ROUNDS = {"decoding 128": 25}
PHASES = ("prefill", *(f"decoding {context}" for context in CONTEXTS), "start")


@dataclass(frozen=True)
class Entry:
    """One model, in torch or exported; ``at_least`` limits its ratios of tokens per second to other entries, by phase
    and their names.
    """

    name: str
    build: Callable[[ModelShape], PreTrainedModel]
    gate: str
    at_least: dict[str, dict[str, float]] = field(default_factory=dict)
    onnx: bool = False


OURS = ("softmax", "diff_v1", "diff_v2")
ITSELF = "itself in float32"
DIFF = {"prefill": {"softmax": 0.9}, "decoding 128": {"softmax": 0.95}}
MODELS = "tests/model/test_modeling.py::"
ENTRIES = (
    Entry(
        "softmax",
        ours("softmax"),
        MODELS + "test_softmax_model_is_llama",
        {phase: {"llama": 0.95} for phase in PHASES[:-1]},
    ),
    Entry(
        "diff_v1",
        ours("diff_v1"),
        "tests/model/test_fused.py::test_decoding_step_by_step_is_the_full_forward",
        DIFF | {"decoding 4096": {"softmax": 0.95, "diffllama": 1.3}},
    ),
    Entry(
        "diff_v2",
        ours("diff_v2"),
        "tests/model/test_fused.py::test_decoding_step_by_step_is_the_full_forward",
        DIFF | {"decoding 4096": {"softmax": 0.95}},
    ),
    Entry("llama", llama, MODELS + "test_softmax_model_is_llama"),
    Entry("diffllama", diffllama, MODELS + "test_v1_model_without_gain_is_diffllama_with_its_heads_in_another_order"),
    *(Entry(f"onnx_{attention}", ours(attention), "tests/export/test_onnx.py", onnx=True) for attention in OURS),
)
REFERENCES = ("softmax", "llama", "diffllama")


class OnnxPrefill:
    """As :class:`Prefill`, in onnxruntime."""

    tokens = PROMPT

    def __init__(self, decoder: OnnxDecoder) -> None:
        self.decoder = decoder
        self.ids = np.random.default_rng(0).integers(SHAPE.vocab_size, size=(1, PROMPT))

    def __call__(self) -> float:
        began = time.perf_counter()
        self.decoder.logits(self.ids)
        return time.perf_counter() - began


class OnnxDecoding:
    """As :class:`Decoding`, in onnxruntime."""

    tokens = STEPS

    def __init__(self, decoder: OnnxDecoder, context: int) -> None:
        self.decoder = decoder
        random = np.random.default_rng(0)
        shapes = [(1, value.shape()[1], context, value.shape()[3]) for value in decoder.empty_cache(1).values]
        values = [OrtValue.ortvalue_from_numpy(random.normal(size=shape).astype(np.float32)) for shape in shapes]
        self.cache = Cache(values, context)

    def __call__(self) -> float:
        token, cache = np.array([[7]]), self.cache
        began = time.perf_counter()
        for _ in range(STEPS):
            logits, cache = self.decoder.logits(token, cache=cache)
            token = logits[:, -1:].argmax(-1)
        return time.perf_counter() - began


class Prefill:
    """Reads a prompt into a new cache; calling it gives the seconds."""

    tokens = PROMPT

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.ids = torch.randint(SHAPE.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def __call__(self) -> float:
        began = time.perf_counter()
        self.model(self.ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - began


class Decoding:
    """Makes ``STEPS`` tokens behind a cache of ``context`` random ones; calling it gives the seconds."""

    tokens = STEPS

    def __init__(self, model: PreTrainedModel, context: int) -> None:
        self.model = model
        config = model.config
        shape = (1, config.num_key_value_heads, context, config.head_dim)
        generator = torch.Generator().manual_seed(0)
        self.cached = [
            tuple(torch.randn(shape, generator=generator).to(model.dtype) for _ in ("keys", "values"))
            for _ in range(config.num_hidden_layers)
        ]

    @torch.inference_mode()
    def __call__(self) -> float:
        cache = DynamicCache(config=self.model.config)
        for layer, (keys, values) in enumerate(self.cached):
            cache.update(keys, values, layer)
        token = torch.tensor([[7]])
        began = time.perf_counter()
        for _ in range(STEPS):
            token = self.model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        return time.perf_counter() - began


def case(phase: str, model: Any) -> Any:
    """What is called and timed."""
    onnx = isinstance(model, OnnxDecoder)
    if phase == "prefill":
        return OnnxPrefill(model) if onnx else Prefill(model)
    context = int(phase.split()[1])
    return OnnxDecoding(model, context) if onnx else Decoding(model, context)


def measured(phase: str, models: dict[str, Any], rounds: int | None) -> dict[str, list[float]]:
    """Tokens per second of each model in every round."""
    calls = {name: case(phase, model) for name, model in models.items()}
    in_turns(calls, 1)
    seconds = in_turns(calls, rounds)
    return {name: [calls[name].tokens / value for value in values] for name, values in seconds.items()}


def started(
    entries: tuple[Entry, ...], folders: dict[str, Path], threads: int, dtype: str, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """What a fresh process reports in every round; the first round fills the system's file cache and is dropped."""
    reports: dict[str, list[dict[str, float]]] = {entry.name: [] for entry in entries}
    for index in range(1 + rounds):
        for entry in entries:
            command = [sys.executable, "-m", "benchmarks.first_token", str(folders[entry.name])]
            options = ["--threads", str(threads), "--dtype", dtype, *["--onnx"] * entry.onnx]
            began = time.time()
            done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
            report = json.loads(done.stdout)
            report["first_token_seconds"] = report.pop("first_token_at") - began
            if index:
                reports[entry.name].append(report)
    return reports


def speed_rows(
    phase: str, entries: tuple[Entry, ...], models: dict[str, Any], wide: dict[str, Any], rounds: int | None
) -> Iterator[dict[str, object]]:
    in_float32 = {name: f"{name} in float32" for name in wide}
    turns = {entry.name: models[entry.name] for entry in entries} | {in_float32[name]: wide[name] for name in wide}
    speeds = measured(phase, turns, rounds)
    for entry in entries:
        # Half precision halves what decoding reads, whatever the processor multiplies.
        limits = entry.at_least.get(phase, {}) | ({ITSELF: 1.0} if phase.startswith("decoding") else {})
        others = {name: name for name in REFERENCES if name in speeds and name != entry.name}
        if entry.name in wide:
            others[ITSELF] = in_float32[entry.name]
        ratios = {
            name: spread(pairwise(operator.truediv, speeds[entry.name], speeds[other]), at_least=limits.get(name))
            for name, other in others.items()
        }
        yield {
            "model": entry.name,
            "rounds": len(speeds[entry.name]),
            "tokens_per_second": spread(speeds[entry.name]),
            "ratio_to": ratios,
            "gate": entry.gate,
        }


def start_rows(
    entries: tuple[Entry, ...], folders: dict[str, Path], threads: int, dtype: str, rounds: int
) -> Iterator[dict[str, object]]:
    reports = started(entries, folders, threads, dtype, rounds)
    for entry in entries:
        mine = reports[entry.name]
        yield {
            "model": entry.name,
            "rounds": len(mine),
            **{key: spread([report[key] for report in mine]) for key in mine[0]},
            "file_bytes": sum(file.stat().st_size for file in folders[entry.name].glob("model.*")),
            "gate": entry.gate,
        }


def save_models(entries: tuple[Entry, ...], folder: Path, dtype: str) -> dict[str, Path]:
    """Random models of the shape, as ``save_pretrained`` writes them in that number format, or exported."""
    folders = {}
    for entry in entries:
        torch.manual_seed(0)
        folders[entry.name] = saved = folder / dtype / entry.name
        if entry.onnx:
            saved = folder / f"{entry.name}-to-export"
        entry.build(SHAPE).to(getattr(torch, dtype)).save_pretrained(saved)
        align(saved / "model.safetensors")
        if entry.onnx:
            export_onnx(saved, folders[entry.name])
    return folders


def align(file: Path, boundary: int = 64) -> None:
    """Let the tensors of a safetensors file begin at a cache line, by spaces behind its header.

    Where they begin is the luck of the header's length, and moves any model's decoding in bfloat16 by up to 8%.
    """
    content = file.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = content[8 : 8 + length].rstrip()
    header += b" " * (-(8 + len(header)) % boundary)
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def load_models(entries: tuple[Entry, ...], folders: dict[str, Path], dtype: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return {
        entry.name: OnnxDecoder(folders[entry.name], threads=threads)
        if entry.onnx
        else AutoModelForCausalLM.from_pretrained(folders[entry.name], dtype=getattr(torch, dtype)).eval()
        for entry in entries
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of torch (default: 1 and 2)")
    parser.add_argument("--repeats", type=int, help="rounds that are timed (default: by the time that one takes)")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=dict.fromkeys(DTYPES + HALVES),
        default=list(DTYPES),
        help="default: float32 and bfloat16",
    )
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES), help="default: all")
    parser.add_argument("--models", nargs="+", choices=[entry.name for entry in ENTRIES], help="default: all")
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    entries = tuple(entry for entry in ENTRIES if not arguments.models or entry.name in arguments.models)
    write = Writer(arguments.out)
    # What PyTorch uses of the processor, which the environment can limit.
    capability = torch.backends.cpu.get_cpu_capability()
    with tempfile.TemporaryDirectory() as temporary:
        for dtype in arguments.dtype:
            here = tuple(entry for entry in entries if dtype == "float32" or not entry.onnx)
            folders = save_models(here, Path(temporary), dtype)
            for threads in arguments.threads:
                models = load_models(here, folders, dtype, threads)
                twins = tuple(entry for entry in here if dtype in HALVES and entry.name in OURS)
                wide = load_models(twins, folders, "float32", threads)
                for phase in arguments.phases:
                    origin = provenance("benchmarks.inference", threads=threads, capability=capability)
                    problem = {"shape": SHAPE.name, "dtype": dtype, "threads": threads, "phase": phase}
                    rows = (
                        start_rows(here, folders, threads, dtype, arguments.repeats or 5)
                        if phase == "start"
                        else speed_rows(phase, here, models, wide, arguments.repeats or ROUNDS.get(phase))
                    )
                    for row in rows:
                        write({"benchmark": "inference", "problem": problem} | row | origin)


if __name__ == "__main__":
    main()
