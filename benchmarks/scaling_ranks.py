"""Tokens per second of two processes of one thread beside one, for DDP and FSDP2; seconds to save and to resume.

Both train the same global batch, so that the time of one over twice the time of two is the efficiency: 1 where nothing
is lost. A step is the forward pass, the backward pass with its communication (gloo), clipping, fused AdamW. The ways
take turns, A B C A B C, on two processes that hold a core each; `apart` is two processes that train half a batch each
and never talk, which is the most that the machine gives. Needs two idle cores. One JSON line per way, and one for each
way to save a checkpoint and to go on from it: what the training waits for, until it is sealed, and until it is read.

    python -m benchmarks.scaling_ranks --out benchmarks/results/scaling_ranks.jsonl
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Idle threads sleep instead of spinning: spinning ones starve the others wherever the machine is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.rows import Writer, pairwise, provenance, spread
from diffattn import DiffTransformerForCausalLM, ModelShape, mesh_for, shard
from diffattn.model.pairing import pair_config
from diffattn.plan.cost import flops_per_token
from diffattn.train.checkpoints.loading import load
from diffattn.train.checkpoints.saving import Saver

RANKS = 2
LEAST = 0.85
STEP_GATE, CHECKPOINT_GATE = "tests/train/test_ranks.py", "tests/train/test_checkpoint.py"
WARM_UP = 2
WAYS = ("one", "apart", "ddp", "fsdp2")


@dataclass(frozen=True)
class Problem:
    """What is trained in each step: ``batch`` blocks of ``context`` tokens, by all processes together."""

    shape: str
    attention: str
    dtype: str
    batch: int
    context: int


class Step:
    """A model with its optimizer and this rank's part of the batch; calling it trains for one step, in seconds."""

    def __init__(self, problem: Problem, way: str) -> None:
        torch.manual_seed(0)
        shape = ModelShape.preset(problem.shape)
        shape = replace(shape, max_position_embeddings=max(shape.max_position_embeddings, problem.context))
        model = DiffTransformerForCausalLM(pair_config(shape, problem.attention)).train()
        self.model = _wrapped(model, way, problem.dtype)
        # As the Trainer has it: FSDP2 computes in the dtype that it was made with.
        self.autocast = problem.dtype == "bfloat16" and way != "fsdp2"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        blocks = problem.batch if way == "one" else problem.batch // RANKS
        self.ids = torch.randint(shape.vocab_size, (blocks, problem.context))

    def __call__(self) -> float:
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, self.autocast):
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


def _wrapped(model: DiffTransformerForCausalLM, way: str, dtype: str) -> nn.Module:
    if way == "ddp":
        return DistributedDataParallel(model)
    if way == "fsdp2":
        return shard(model, mesh_for(RANKS, shard="full", device="cpu"), dtype=getattr(torch, dtype))
    return model


def measure(problem: Problem, ways: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way's step in every round, on the first rank; all ways of a round before the next round."""
    steps = {way: Step(problem, way) for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for number in range(WARM_UP + rounds):
        for way, step in steps.items():
            dist.barrier()
            took = step() if dist.get_rank() == 0 or way != "one" else 0.0
            if number >= WARM_UP:
                seconds[way].append(took)
    return seconds


def step_rows(problem: Problem, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    shape = pair_config(ModelShape.preset(problem.shape), problem.attention).shape()
    tokens = problem.batch * problem.context
    flops = flops_per_token(shape, problem.attention, context=problem.context).model
    found = []
    for way, mine in seconds.items():
        row = {
            "benchmark": "scaling_ranks", "section": "step", "way": way, "problem": vars(problem), "rounds": len(mine),
            "seconds": spread(mine), "tokens_per_second": spread([tokens / each for each in mine]),
            "model_flops_per_second": round(flops * tokens / spread(mine)["median"]),
        }  # fmt: skip
        if way != "one" and "one" in seconds:
            efficiency = pairwise(lambda one, two: one / (RANKS * two), seconds["one"], mine)
            row["efficiency"] = spread(efficiency, at_least=None if way == "apart" else LEAST)
        if way in ("ddp", "fsdp2") and "apart" in seconds:
            row["of_apart"] = spread(pairwise(operator.truediv, seconds["apart"], mine))
        found.append(row | {"gate": STEP_GATE})
    return found


def saved(problem: Problem, way: str, run: str, rounds: int) -> dict[str, list[float]]:
    """Seconds that the training waits for a checkpoint, and until it is sealed, in every round."""
    step = Step(problem, way)
    step()
    inner = step.model.module if isinstance(step.model, DistributedDataParallel) else step.model
    saver = Saver(Path(run), inner, step.optimizer)
    seconds: dict[str, list[float]] = {"waits": [], "sealed": []}
    for number in range(1 + rounds):
        began = time.perf_counter()
        saver.save(number + 1)
        waited = time.perf_counter() - began
        saver.wait()
        if number:
            seconds["waits"].append(waited)
            seconds["sealed"].append(time.perf_counter() - began)
    saver.close()
    return seconds


def resumed(problem: Problem, way: str, run: str, rounds: int) -> dict[str, list[float]]:
    """Seconds to read the checkpoint of a run, whatever number of ranks wrote it, into a model and its optimizer."""
    (checkpoint,) = Path(run).glob("checkpoint-*")
    step = Step(problem, way)
    # The optimizer has no state before.
    step()
    inner = step.model.module if isinstance(step.model, DistributedDataParallel) else step.model
    seconds = []
    for _ in range(1 + rounds):
        began = time.perf_counter()
        load(checkpoint, inner, step.optimizer)
        seconds.append(time.perf_counter() - began)
    return {"read": seconds[1:]}


def checkpoint_rows(problem: Problem, rounds: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        for way, ranks in (("one", 1), ("ddp", RANKS), ("fsdp2", RANKS)):
            run = Path(folder) / way
            run.mkdir()
            seconds = on_ranks(ranks, saved, problem, way, str(run), rounds)
            size = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
            yield _checkpoint_row(problem, "save", way, rounds, seconds) | {"bytes": size}
            for reader, count in dict.fromkeys([(way, ranks), ("one", 1), ("fsdp2", RANKS)]):
                seconds = on_ranks(count, resumed, problem, reader, str(run), rounds)
                yield _checkpoint_row(problem, "resume", reader, rounds, seconds) | {"written_by": way}


def _checkpoint_row(
    problem: Problem, section: str, way: str, rounds: int, seconds: dict[str, list[float]]
) -> dict[str, Any]:
    return {
        "benchmark": "scaling_ranks", "section": section, "way": way, "problem": vars(problem), "rounds": rounds,
        "seconds": {name: spread(values) for name, values in seconds.items()}, "gate": CHECKPOINT_GATE,
    }  # fmt: skip


def on_ranks(count: int, task: Callable[..., Any], *arguments: Any) -> Any:
    """What a task returns on the first of the ranks, each a process of one thread that holds a core."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        spawn(_work, (count, port, str(result), task, arguments), nprocs=count)
        return json.loads(result.read_text(encoding="utf-8"))


def _work(rank: int, count: int, port: int, result: str, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The main function of a rank's process."""
    names = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = task(*arguments)
    dist.barrier()
    if rank == 0:
        Path(result).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", default="30M")
    parser.add_argument("--attention", default="diff_v1")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--sections", nargs="+", choices=("steps", "checkpoints"), default=("steps", "checkpoints"))
    parser.add_argument("--keep", action="store_true", help="add to the rows of --out in place of replacing them")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    write = Writer(given.out, keep=given.keep)
    where = provenance("benchmarks.scaling_ranks", threads=1)
    for dtype in given.dtypes if "steps" in given.sections else ():
        problem = Problem(given.shape, given.attention, dtype, given.batch, given.context)
        for row in step_rows(problem, on_ranks(RANKS, measure, problem, given.ways, given.rounds)):
            write(row | where)
    if "checkpoints" in given.sections:
        # One block of a few tokens each: the steps are none of what is measured.
        problem = Problem(given.shape, given.attention, "float32", RANKS, 16)
        for row in checkpoint_rows(problem, given.rounds):
            write(row | where)


if __name__ == "__main__":
    main()
