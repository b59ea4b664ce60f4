"""Exported models in onnxruntime for aarch64, as on a Raspberry Pi, under qemu: a part of `make portable`.

Small models of each variant, in float32 and quantised, are exported here and run on the processors of three Raspberry
Pis, which qemu emulates. In float32 logits may be as far from torch's in float64 as `diffattn export --check` allows,
and greedy texts are the same; logits of quantised weights may be hardly further from torch's than on this machine. Of
speed qemu says nothing.

    tools/aarch64_root.sh build/aarch64 onnxruntime
    python -m tools.portability --aarch64 build/aarch64 --only onnxruntime --out benchmarks/results/portability.jsonl

Python of the other machine runs this file too, with numpy and onnxruntime alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffattn.export.run import Ids, OnnxDecoder

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Processor:
    """A processor by qemu's name, and what Linux tells of it: the part's number, its revision, and its features."""

    qemu: str
    part: str
    variant: int
    features: str = "fp asimd evtstrm crc32 cpuid"


# The older two have neither products of four 8-bit numbers (asimddp) nor of half precision (asimdhp).
BOARDS = {
    "Raspberry Pi 5": Processor("cortex-a76", "d0b", 4, "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp "
                                "asimdhp cpuid asimdrdm lrcpc dcpop asimddp"),
    "Raspberry Pi 4": Processor("cortex-a72", "d08", 0),
    "Raspberry Pi Zero 2 W": Processor("cortex-a53", "d03", 0),
}  # fmt: skip
ATTENTIONS = ("softmax", "diff_v1", "diff_v2")
BITS = (32, 8, 4)
VOCABULARY, PADDING, NEW_TOKENS = 512, 3, 24
# A prompt comes in these pieces: through an empty cache, alone, and several behind a cache.
PIECES = (6, 1, 4)
# The error of quantised logits there over that here: activations are rounded too, and half a step may fall either way.
MOST = 1.1
Answers = dict[str, npt.NDArray[Any]]


def prompt() -> tuple[Ids, Ids]:
    """Returns two rows of tokens, of which the first begins with padding, and the mask that says so."""
    ids = np.random.default_rng(0).integers(1, VOCABULARY, size=(2, sum(PIECES)))
    mask = np.ones_like(ids)
    mask[0, :PADDING] = 0
    return ids, mask


def answers(folder: Path) -> Answers:
    """Returns the logits behind each piece of the prompt, and the text that the model writes behind it."""
    decoder, (ids, mask) = OnnxDecoder(folder, threads=1), prompt()
    found, cache = [], None
    for end, length in zip(np.cumsum(PIECES), PIECES, strict=True):
        logits, cache = decoder.logits(ids[:, end - length : end], mask[:, :end], cache)
        found.append(logits[:, -1])
    text = decoder.generate(ids, NEW_TOKENS, attention_mask=mask)
    return {"logits": np.stack(found, axis=1), "text": text}


def run(processor: Processor, aarch64: Path) -> dict[str, object]:
    """Exports the models, has both machines answer, and returns what a row says of the case."""
    scratch, expected = _exported()
    folders, root, began = Path(scratch.name), aarch64 / "root", time.monotonic()
    command = ["qemu-aarch64", "-cpu", processor.qemu, "-L", str(root), str(root / "usr/bin/python3.11")]
    path = os.pathsep.join([str(ROOT / "src"), str(aarch64 / "site")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    with told(processor, root):
        done = subprocess.run([*command, "-m", "tools.portability_onnx", scratch.name], cwd=ROOT, env=environment,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        return {"passed": False, "tests": "onnxruntime did not run"}
    models = [
        compared(attention, bits, expected[attention], folders / f"{attention}-{bits}")
        for attention in ATTENTIONS
        for bits in BITS
    ]
    passed = sum(bool(model["passed"]) for model in models)
    return {
        "passed": passed == len(models),
        "tests": f"{passed} of {len(models)} models",
        "onnxruntime": done.stdout.split()[-1],
        "models": models,
        "test_seconds": round(time.monotonic() - began, 1),
    }


@contextmanager
def told(processor: Processor, root: Path) -> Iterator[None]:
    """Has the files of the emulated system tell of a processor; they tell of another one before and afterwards.

    onnxruntime believes them: it would use instructions that qemu's processor has not.
    """
    cpus = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/regs/identification/midr_el1"))
    midr = f"0x00000000{0x410F0000 | processor.variant << 20 | int(processor.part, 16) << 4 | 1:08x}\n"
    one = (
        "processor\t: {}\nFeatures\t: {}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
        "CPU variant\t: {:#x}\nCPU part\t: 0x{}\nCPU revision\t: 1\n\n"
    )
    facts = (processor.features, processor.variant, processor.part)
    texts = dict.fromkeys(cpus, midr)
    texts[root / "proc/cpuinfo"] = "".join(one.format(number, *facts) for number in range(len(cpus)))
    before = {file: file.read_text() for file in texts}
    try:
        for file, text in texts.items():
            file.write_text(text)
        yield
    finally:
        for file, text in before.items():
            file.write_text(text)


@cache
def _exported() -> tuple[tempfile.TemporaryDirectory[str], dict[str, Answers]]:
    """Writes the models once for all processors; returns their folder, which goes with this process, and the logits."""
    scratch = tempfile.TemporaryDirectory(prefix="diffattn-portability-")
    return scratch, {attention: _export(attention, Path(scratch.name)) for attention in ATTENTIONS}


def _export(attention: str, folders: Path) -> Answers:
    """Writes a model with random weights in each number of bits, and returns torch's logits in float32 and float64."""
    import torch

    from diffattn import DiffTransformerConfig, DiffTransformerForCausalLM, ModelShape
    from diffattn.export.graph import GROUPED, save, to_graph
    from diffattn.export.quantize import quantize

    shape = ModelShape(hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=256,
                       vocab_size=VOCABULARY, max_position_embeddings=64)  # fmt: skip
    torch.manual_seed(0)
    model = DiffTransformerForCausalLM(DiffTransformerConfig.from_shape(shape, attention)).eval()
    # Logits of fresh weights lie so near to each other that a text would hang on rounding.
    for tensor in model.parameters():
        if tensor.ndim == 2:
            tensor.data.normal_(std=0.12)
    model.set_attn_implementation(GROUPED)
    graph = to_graph(model)
    for bits in BITS:
        folder = folders / f"{attention}-{bits}"
        folder.mkdir()
        save(graph if bits == 32 else quantize(graph, bits), folder)
    model.set_attn_implementation("sdpa")
    ids, mask = map(torch.from_numpy, prompt())
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ends = [end - 1 for end in np.cumsum(PIECES)]
    found = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        with torch.no_grad():
            logits = model.to(dtype)(ids, attention_mask=mask, position_ids=positions).logits
        found[name] = logits[:, ends].numpy()
    return found


def compared(attention: str, bits: int, torch_logits: Answers, folder: Path) -> dict[str, object]:
    """Returns how far from torch the answers of both machines lie, and whether that passes."""
    from diffattn.export.check import FACTOR

    here, there = answers(folder), dict(np.load(folder / "answers.npz"))
    exact = torch_logits["float64"]

    def error(logits: npt.NDArray[Any]) -> float:
        off = logits - exact
        # The largest of rounding; of quantised weights the RMS, as the check of an export has both.
        return float(np.abs(off).max() if bits == 32 else np.sqrt((off**2).mean())) / float(exact.std())

    bound = FACTOR * error(torch_logits["float32"]) if bits == 32 else MOST * error(here["logits"])
    same = bool((here["text"] == there["text"]).all())
    found = error(there["logits"])
    return {
        "attention": attention, "bits": bits, "error": float(f"{found:.3g}"),
        "error_here": float(f"{error(here['logits']):.3g}"), "at_most": float(f"{bound:.3g}"), "same_text": same,
        # With rounded activations the likeliest of two equally likely tokens may be the other one.
        "passed": found <= bound and (same or bits < 32),
    }  # fmt: skip


def main() -> None:
    """Answers for every exported model in a folder, on the machine that runs this."""
    import onnxruntime

    for folder in sorted(Path(sys.argv[1]).glob("*-*")):
        np.savez(folder / "answers.npz", **answers(folder))
    print(onnxruntime.__version__)


if __name__ == "__main__":
    main()
