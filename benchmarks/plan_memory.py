"""Peak memory that the planner predicts, and that the real model has: training steps, prefill and decoding.

Every case is a fresh model of random weights. Peaks are sums of the allocator's events (see docs/plan.md), so they do
not depend on what else the machine does. A case whose row is in the file already is not run again; its prediction is
computed anew.

    python -m benchmarks.plan_memory --threads 1 --out benchmarks/results/plan_memory.jsonl
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import Writer, provenance
from diffattn.plan.activations import find_backend
from diffattn.plan.cost import match_parameters
from diffattn.plan.memory import decoding_memory, prefill_memory, training_memory
from diffattn.plan.setting import Setting
from diffattn.plan.shape import ModelShape

GATE = "tests/study/test_plan_check.py::test_the_measured_rows_are_predicted"
PHASES = ("training", "prefill", "decoding")

SHAPES = {
    "30M": ModelShape.preset("30M"),
    "46M deep": ModelShape(
        name="46M deep", hidden_size=512, num_layers=14, num_heads=8, intermediate_size=1280, vocab_size=8192
    ),
    "57M, 32k vocabulary": ModelShape(
        name="57M, 32k vocabulary",
        hidden_size=640,
        num_layers=8,
        num_heads=10,
        intermediate_size=1536,
        vocab_size=32_000,
    ),
    "79M grouped": ModelShape(
        name="79M grouped",
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=4,
        intermediate_size=2048,
        vocab_size=4096,
    ),
    "106M untied": ModelShape(
        name="106M untied",
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        intermediate_size=2048,
        vocab_size=14_000,
        tie_word_embeddings=False,
    ),
    "143M wide, few long heads": ModelShape(
        name="143M wide, few long heads",
        hidden_size=1024,
        num_layers=10,
        num_heads=8,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=3072,
        vocab_size=16_384,
    ),
}


@dataclass(frozen=True)
class Case:
    """One model and one phase of it."""

    phase: str
    shape: str
    attention: str
    context: int
    precision: str
    backend: str
    checkpointing: bool = False

    def planned(self) -> ModelShape:
        """The shape that is built: a V2 is matched to the softmax model by its feed-forward width."""
        return match_parameters(SHAPES[self.shape], self.attention)

    def setting(self) -> Setting:
        """How the model is run."""
        return Setting(
            context=self.context,
            precision=self.precision,
            backend=self.backend,
            checkpointing=self.checkpointing,
            machine=None,
        )

    def predicted(self) -> int:
        """Bytes at the peak, by the planner."""
        shape, setting = self.planned(), self.setting()
        if self.phase == "training":
            return training_memory(shape, self.attention, setting).total
        memory = prefill_memory if self.phase == "prefill" else decoding_memory
        return memory(shape, self.attention, setting).total

    def measured(self) -> int:
        """Bytes at the peak, of the model itself."""
        # Kept out of the import, so that a test of the rows needs no model.
        from diffattn.study.plan_check import Subject

        return getattr(Subject(self.planned(), self.attention, self.setting()), self.phase)()[0]


_SMALL, _LONG = 512, 2048
_FORMS = (
    ("softmax", "standard"),
    ("diff_v1", "fused_cpu"),
    ("diff_v1", "standard"),
    ("diff_v2", "fused_cpu"),
    ("diff_v2", "standard"),
)
_PRECISIONS = ("fp32", "autocast", "bf16")


def design() -> list[Case]:
    """Cases in which every shape, form, precision, context and checkpointing meet each other at least in pairs."""
    names = list(SHAPES)
    settings = list(itertools.product(_PRECISIONS, (_SMALL, _LONG), (False, True)))
    cases = []
    # Shapes × forms in full; the twelve settings turn with both, so that neighbours differ in all three.
    for i, name in enumerate(names):
        for j, (attention, backend) in enumerate(_FORMS):
            precision, context, checkpointing = settings[(5 * i + 7 * j) % len(settings)]
            cases.append(Case("training", name, attention, context, precision, backend, checkpointing))
    # The smallest shape in full over precision and checkpointing, at the short context.
    for attention, backend in (("diff_v1", "fused_cpu"), ("softmax", "standard")):
        for precision in _PRECISIONS:
            cases += [
                Case("training", names[0], attention, _SMALL, precision, backend, again) for again in (False, True)
            ]
    # Two settings that the turn leaves out.
    cases.append(Case("training", names[0], "diff_v2", _LONG, "autocast", "fused_cpu"))
    cases.append(Case("training", names[0], "softmax", _LONG, "bf16", "standard", True))
    # Maps written out.
    cases += [Case("training", names[0], attention, _SMALL, "fp32", "materialised") for attention, _ in _FORMS[::2]]
    for i, name in enumerate(names):
        attention, backend = _FORMS[i % len(_FORMS)]
        for j, phase in enumerate(("prefill", "decoding")):
            cases.append(Case(phase, name, attention, _LONG if (i + j) % 2 else _SMALL, _PRECISIONS[i % 3], backend))
    return list(dict.fromkeys(cases))


def read(path: Path) -> dict[Case, int]:
    """Measured bytes by case, from the rows of a file; none where there is no file."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {_case(row): row["measured"] for row in rows}


def _case(row: dict[str, Any]) -> Case:
    """The case of a row; rows from before a GPU had a kernel call the CPU's ``fused``."""
    found = {field.name: row[field.name] for field in fields(Case)}
    return Case(**found | {"backend": find_backend(row["backend"])})


def table(measured: dict[Case, int]) -> str:
    """Median and worst of predicted / measured by phase and precision, as docs/plan.md shows them."""
    lines = ["| phase | precision | rows | median | worst |", "|---|---|---|---|---|"]
    for phase, precision in itertools.product(PHASES, _PRECISIONS):
        ratios = [
            case.predicted() / value
            for case, value in measured.items()
            if (case.phase, case.precision) == (phase, precision)
        ]
        if ratios:
            worst = max(ratios, key=lambda ratio: abs(ratio - 1))
            middle = statistics.median(ratios)
            lines.append(f"| {phase} | {precision} | {len(ratios)} | {middle:.3f} | {worst:.3f} |")
    return "\n".join(lines)


def renew(path: Path) -> None:
    """Write the rows of a file again with the predictions of the planner as it is now; what was measured stays."""
    rows = {}
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        case = _case(row)
        predicted = case.predicted()
        rows[case] = row | {"predicted": predicted, "ratio": round(predicted / row["measured"], 4)}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES, help="only these (default: all)")
    parser.add_argument("--out", type=Path, help="also append the lines to this file; cases in it are not run again")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    write = Writer(arguments.out, keep=True)
    done = read(arguments.out) if arguments.out else {}
    origin = provenance("benchmarks.plan_memory", threads=arguments.threads)
    for case in (case for case in design() if case.phase in arguments.phases):
        predicted = case.predicted()
        if case not in done:
            measured = case.measured()
            gc.collect()
            row = {"benchmark": "plan_memory", **asdict(case), "batch": 1}
            row |= {"predicted": predicted, "measured": measured, "ratio": round(predicted / measured, 4), "gate": GATE}
            write(row | origin)
            done[case] = measured
    if arguments.out:
        renew(arguments.out)
    worst = max(done, key=lambda case: abs(case.predicted() / done[case] - 1))
    print(table(done))
    print(f"worst of {len(done)}: predicted / measured = {worst.predicted() / done[worst]:.4f}, {worst}")


if __name__ == "__main__":
    main()
