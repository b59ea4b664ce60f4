"""Seconds of a training step: softmax, V1 and V2 beside `transformers`' own models of the same shape.

A step is the forward pass with labels, the backward pass, fused AdamW and zeroed gradients, on random tokens, without
a cache (as the Trainer runs it). The models take turns within one process, A B C D E A B C D E, so that a ratio
compares neighbours in time. One JSON line per problem and model.

    python -m benchmarks.training_step --threads 2 --repeats 9 --out benchmarks/results/training_step.jsonl
"""

from __future__ import annotations

import argparse
import operator
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

# Idle threads sleep instead of spinning: spinning ones starve the others wherever the machine is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.rows import Writer, in_turns, pairwise, provenance, spread
from diffattn import DiffTransformerForCausalLM, ModelShape
from diffattn.model.pairing import pair_config
from diffattn.plan.cost import flops_per_token, match_parameters

SHAPE = "30M"


@dataclass(frozen=True)
class Problem:
    """``batch`` rows of ``context`` tokens in one number format."""

    dtype: str
    batch: int
    context: int


@dataclass(frozen=True)
class Entry:
    """One model of the comparison.

    ``attention`` and ``backend`` name its FLOPs in ``diffattn.plan.cost``; ``gate`` is the test that shows that the
    model computes what it is said to; ``at_most`` limits its ratios to other entries, by their names.
    """

    name: str
    build: Callable[[ModelShape], PreTrainedModel]
    attention: str
    backend: str
    gate: str
    at_most: dict[str, float] = field(default_factory=dict)


def ours(attention: str) -> Callable[[ModelShape], PreTrainedModel]:
    return lambda shape: DiffTransformerForCausalLM(pair_config(shape, attention))


def llama(shape: ModelShape) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_llama_fields(shape)))


def diffllama(shape: ModelShape) -> PreTrainedModel:
    return DiffLlamaForCausalLM(DiffLlamaConfig(**_llama_fields(shape)))


def _llama_fields(shape: ModelShape) -> dict[str, object]:
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": shape.tie_word_embeddings,
    }


MODELS = "tests/model/test_modeling.py::"
ENTRIES = (
    Entry("softmax", ours("softmax"), "softmax", "standard", MODELS + "test_softmax_model_is_llama", {"llama": 1.05}),
    Entry(
        "diff_v1",
        ours("diff_v1"),
        "diff_v1",
        "fused_cpu",
        MODELS + "test_v1_model_without_gain_is_diffllama_with_its_heads_in_another_order",
        {"softmax": 1.05, "diffllama": 0.72},
    ),
    Entry(
        "diff_v2",
        ours("diff_v2"),
        "diff_v2",
        "fused_cpu",
        "tests/model/test_attention.py::test_layer_is_the_papers_forward_and_in_every_gradient",
    ),
    Entry("llama", llama, "softmax", "standard", MODELS + "test_softmax_model_is_llama"),
    Entry(
        "diffllama",
        diffllama,
        "diff_v1",
        "four_calls",
        MODELS + "test_v1_model_without_gain_is_diffllama_with_its_heads_in_another_order",
    ),
)
# bfloat16: weights, gradients and optimizer state in bfloat16. autocast: those in float32, the matrix products in
# bfloat16, which is what training with `dtype="bfloat16"` does; no limit is stated for it.
DTYPES = ("float32", "bfloat16", "autocast")
TOKENS = ((4, 512), (1, 2048))
REFERENCES = ("softmax", "llama", "diffllama")


class Step:
    """A model with its optimizer and one batch; calling it trains for one step and gives the seconds."""

    def __init__(self, entry: Entry, shape: ModelShape, problem: Problem) -> None:
        torch.manual_seed(0)
        self.model = entry.build(shape).train()
        if problem.dtype == "bfloat16":
            self.model.bfloat16()
        self.autocast = problem.dtype == "autocast"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ids: Tensor = torch.randint(shape.vocab_size, (problem.batch, problem.context))

    def __call__(self) -> float:
        began = time.perf_counter()
        context: AbstractContextManager = torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()
        with context:
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


def measure(problem: Problem, entries: tuple[Entry, ...], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each entry's step in every round; all entries of a round before the next round."""
    shape = replace(ModelShape.preset(SHAPE), max_position_embeddings=2048)
    steps = {entry.name: Step(entry, shape, problem) for entry in entries}
    in_turns(steps, warm_up)
    return in_turns(steps, rounds)


def row(problem: Problem, entry: Entry, seconds: dict[str, list[float]]) -> dict[str, object]:
    """One line of the result: the time, its ratios to the references, and FLOPs per step and second."""
    shape = match_parameters(ModelShape.preset(SHAPE), entry.attention)
    flops = flops_per_token(shape, entry.attention, context=problem.context, backend=entry.backend)
    mine = seconds[entry.name]
    tokens = problem.batch * problem.context
    return {
        "benchmark": "training_step",
        "problem": {"shape": SHAPE, "dtype": problem.dtype, "batch": problem.batch, "context": problem.context},
        "model": entry.name,
        "rounds": len(mine),
        "seconds": spread(mine),
        "ratio_to": {
            name: spread(pairwise(operator.truediv, mine, seconds[name]), entry.at_most.get(name))
            for name in REFERENCES
            if name in seconds and name != entry.name
        },
        "model_flops": flops.model * tokens,
        "executed_flops": flops.executed * tokens,
        "executed_flops_per_second": round(flops.executed * tokens / spread(mine)["median"]),
        "gate": entry.gate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds that are timed (default: 9)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument("--tokens", nargs="+", default=[f"{b}x{t}" for b, t in TOKENS], metavar="BATCHxCONTEXT")
    parser.add_argument("--models", nargs="+", choices=[entry.name for entry in ENTRIES], help="default: all")
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    entries = tuple(entry for entry in ENTRIES if not arguments.models or entry.name in arguments.models)
    write = Writer(arguments.out)
    for dtype in arguments.dtype:
        for tokens in arguments.tokens:
            batch, context = (int(number) for number in tokens.split("x"))
            problem = Problem(dtype, batch, context)
            origin = provenance("benchmarks.training_step", threads=arguments.threads)
            seconds = measure(problem, entries, arguments.repeats)
            for entry in entries:
                write(row(problem, entry, seconds) | origin)


if __name__ == "__main__":
    main()
