"""Seconds of the attention call alone, forward and backward: what bounds V1's and V2's training step on CPU.

`torch.nn.functional.scaled_dot_product_attention` on the tensors of one layer, laid out as the models lay them out,
without projections, rotary positions, subtraction or norm. The cases take turns within one process, A B C D A B C D.
One JSON line per problem and case.

    python -m benchmarks.attention_call --threads 2 --repeats 15 --out benchmarks/results/attention_call.jsonl
"""

from __future__ import annotations

import argparse
import operator
import os
import time
from dataclasses import dataclass
from pathlib import Path

# Idle threads sleep instead of spinning: spinning ones starve the others wherever the machine is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rows import Writer, pairwise, provenance, spread
from diffattn import ModelShape

SHAPE = "30M"
REFERENCES = ("softmax", "diffllama")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENS = ((4, 512), (1, 2048))


@dataclass(frozen=True)
class Entry:
    """``calls`` calls with, for n heads of width d, ``queries``·n query and ``keys``·n key heads of ``width``·d.

    Products per query-key pair and pair of baseline heads, forward: 4·d·width·queries·calls each for the scores and
    the values. ``gate`` is the test that this form computes the variant.
    """

    name: str
    queries: float
    keys: float
    width: int
    calls: int
    gate: str


STANDARD = "tests/ops/test_standard.py::test_makes_exactly_one_standard_call"
MODELS = "tests/model/test_modeling.py::"
ENTRIES = (
    Entry("softmax", 1, 1, 1, 1, MODELS + "test_softmax_model_is_llama"),
    Entry("diff_v1", 1, 0.5, 2, 1, STANDARD),
    Entry("diff_v2", 2, 1, 1, 1, STANDARD),
    Entry("diffllama", 1, 1, 1, 2, MODELS + "test_v1_model_without_gain_is_diffllama_with_its_heads_in_another_order"),
)


class Call:
    """The tensors of one case; calling it runs forward and backward and gives the seconds."""

    def __init__(self, entry: Entry, dtype: torch.dtype, batch: int, context: int) -> None:
        shape = ModelShape.preset(SHAPE)
        self.entry, self.scale = entry, shape.head_dim**-0.5
        torch.manual_seed(0)

        def tensor(heads: float) -> Tensor:
            width = shape.head_dim * entry.width
            return torch.randn(batch, context, int(heads * shape.num_heads), width).to(dtype).requires_grad_()

        self.q_BTNW, *self.kv_BTGW = tensor(entry.queries), tensor(entry.keys), tensor(entry.keys)
        self.d_o_BTNW = torch.randn_like(self.q_BTNW)

    def __call__(self) -> float:
        for tensor in (self.q_BTNW, *self.kv_BTGW):
            tensor.grad = None
        began = time.perf_counter()
        q, k, v = (tensor.transpose(1, 2) for tensor in (self.q_BTNW, *self.kv_BTGW))
        grouped = q.shape[1] != k.shape[1]
        outputs = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped).transpose(
                1, 2
            )
            for _ in range(self.entry.calls)
        ]
        torch.autograd.backward(outputs, [self.d_o_BTNW] * len(outputs))
        return time.perf_counter() - began


def measure(dtype: str, batch: int, context: int, rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each case in every round; all cases of a round before the next round."""
    calls = {entry.name: Call(entry, DTYPES[dtype], batch, context) for entry in ENTRIES}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(warm_up + rounds):
        for name, call in calls.items():
            taken = call()
            if index >= warm_up:
                seconds[name].append(taken)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that are timed (default: 15)")
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    write = Writer(arguments.out)
    for dtype in DTYPES:
        for batch, context in TOKENS:
            origin = provenance("benchmarks.attention_call", threads=arguments.threads)
            seconds = measure(dtype, batch, context, arguments.repeats)
            for entry in ENTRIES:
                mine = seconds[entry.name]
                # Forward one product as wide as the keys and one as wide as the values, backward three and two, of
                # 2·width·d each per query head and pair; a query sees (context + 1) / 2 keys on average.
                shape = ModelShape.preset(SHAPE)
                heads = int(entry.queries * shape.num_heads) * entry.calls
                pairs = batch * heads * context * (context + 1) // 2
                flops = 7 * 2 * entry.width * shape.head_dim * pairs
                write(
                    {
                        "benchmark": "attention_call",
                        "problem": {"shape": SHAPE, "dtype": dtype, "batch": batch, "context": context},
                        "case": entry.name,
                        "rounds": len(mine),
                        "seconds": spread(mine),
                        "ratio_to": {
                            name: spread(pairwise(operator.truediv, mine, seconds[name]))
                            for name in REFERENCES
                            if name != entry.name
                        },
                        "executed_flops": flops,
                        "executed_flops_per_second": round(flops / spread(mine)["median"]),
                        "gate": entry.gate,
                    }
                    | origin
                )


if __name__ == "__main__":
    main()
