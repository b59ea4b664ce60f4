"""Bytes that the planner predicts for one rank, and that real ranks hold: DDP, FSDP2, tensor parallelism.

Each case starts torchrun on this machine's processor with ``diffattn plan --measure``. Peaks are sums of the
allocator's events (see docs/plan.md), so they do not depend on what else runs.

    python -m benchmarks.plan_ranks --out benchmarks/results/plan_ranks.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.rows import Writer, provenance
from diffattn.plan.named_model import parse_model
from diffattn.plan.ranks.memory import rank_memory
from diffattn.plan.setting import Setting

GATE = "tests/study/test_rank_check.py::test_the_measured_rows_are_predicted"


@dataclass(frozen=True)
class Case:
    """One model on some ranks."""

    model: str
    ranks: int
    shard: str
    tp: int
    precision: str
    checkpointing: bool = False
    context: int = 256
    batch: int = 4

    @property
    def per_host(self) -> int | None:
        """Ranks of a host, where that matters."""
        return 2 if self.shard == "hybrid" else None

    def predicted(self) -> int:
        """Bytes at the peak of the first rank, by the planner."""
        model = parse_model(self.model)
        setting = Setting(
            context=self.context, batch=self.batch, precision=self.precision, backend="standard",
            checkpointing=self.checkpointing, machine=None, ranks=self.ranks, shard=self.shard, tp=self.tp,
            per_host=self.per_host,
        )  # fmt: skip
        return rank_memory(model.built, model.attention, setting).total

    def measured(self) -> dict[str, float]:
        """Bytes that the ranks hold, by what they are."""
        words = ["plan", "--measure", "--json", "--backend", "standard", "--model", self.model]
        words += ["--shard", self.shard, "--tp", str(self.tp), "--dtype", self.precision]
        words += ["--context", str(self.context), "--batch", str(self.batch)]
        words += ["--checkpointing"] if self.checkpointing else []
        words += ["--per-host", str(self.per_host)] if self.per_host else []
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks), "-m", "diffattn"]
        done = subprocess.run(
            [sys.executable, *start, *words], check=True, capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        found = json.loads(done.stdout)["measured"]
        for row in found:
            assert not row["exact"] or row["predicted"] == row["measured"], row
        return {row["what"]: row["measured"] for row in found}


def design() -> list[Case]:
    """Cases in which each way, variant and precision occurs with and without checkpointing."""
    return [
        Case("softmax:3M", 2, "none", 1, "fp32"),
        Case("diff_v1:3M", 2, "none", 1, "autocast"),
        Case("diff_v2:3M", 2, "none", 1, "autocast", True),
        Case("diff_v2:3M", 2, "full", 1, "fp32"),
        Case("diff_v1:3M", 2, "full", 1, "autocast"),
        Case("softmax:3M", 2, "full", 1, "autocast", True),
        Case("gated:3M", 2, "full", 1, "fp32", True),
        Case("softmax:3M", 2, "none", 2, "autocast"),
        Case("diff_v2:3M", 2, "none", 2, "fp32", True),
        Case("diff_v1:3M", 4, "full", 1, "autocast", True),
        Case("softmax:3M", 4, "full", 1, "fp32"),
        Case("diff_v2:3M", 4, "full", 2, "autocast"),
        Case("diff_v1:3M", 4, "hybrid", 1, "fp32"),
        Case("diff_v1:30M", 4, "full", 2, "autocast", context=128, batch=2),
    ]


def read(path: Path) -> dict[Case, int]:
    """Measured bytes at the peak by case, from the rows of a file; none where there is no file."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {_case(row): row["measured"] for row in rows}


def _case(row: dict[str, Any]) -> Case:
    return Case(**{field.name: row[field.name] for field in fields(Case)})


def table(measured: dict[Case, int]) -> str:
    """The rows as docs/plan.md shows them."""
    lines = [
        "| model | ranks | shard | tp | dtype | checkpointing | measured | predicted / measured |",
        "|" + "---|" * 8,
    ]
    for case, value in measured.items():
        dtype = {"fp32": "float32"}.get(case.precision, case.precision)
        lines.append(
            f"| {case.model} | {case.ranks} | {case.shard} | {case.tp} | {dtype} | "
            f"{'yes' if case.checkpointing else 'no'} | {value / 2**20:.1f} MiB | {case.predicted() / value:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also append the lines to this file; cases in it are not run again")
    arguments = parser.parse_args()
    write = Writer(arguments.out, keep=True)
    done = read(arguments.out) if arguments.out else {}
    origin = provenance("benchmarks.plan_ranks", threads=1)
    for case in design():
        if case not in done:
            found = case.measured()
            predicted, measured = case.predicted(), int(found["training peak of a rank"])
            row = {"benchmark": "plan_ranks", **asdict(case), "weights": int(found["weights of a rank"])}
            row |= {"optimizer": int(found["optimizer of a rank"]), "gradients": int(found["gradients of a rank"])}
            row |= {"predicted": predicted, "measured": measured, "ratio": round(predicted / measured, 4), "gate": GATE}
            write(row | origin)
            done[case] = measured
    print(table(done))


if __name__ == "__main__":
    main()
