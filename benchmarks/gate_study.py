"""Measures whether gated attention learns to look something up, by its learning rate and how its gates start.

Small models on the mixture of ``make study``, in a setting in which a softmax model learns to find needles within
minutes of one core (docs/studies.md). Each case is a variant, a multiple of the ladder's learning rate, a start and a
seed. A row has the loss by stage, what a digit of an answer costs, exact answers, and, at several steps of the run,
how far the gates are open and how large the gradients are. A case that has its row is not run again, and a run that was
cut goes on from its last checkpoint.

    python -m benchmarks.gate_study --text eltec_eng.txt.xz --out benchmarks/results/gated.jsonl
    python -m benchmarks.gate_study --text eltec_eng.txt.xz --out rows.jsonl --cases diff_v1:0.5 diff_v1:1 diff_v2:2
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Idle threads sleep instead of spinning: spinning ones starve the others wherever the machine is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor

from benchmarks.rows import Writer, provenance
from diffattn.data.mixture import with_needles
from diffattn.data.needles import Haystack
from diffattn.data.packing import PreparedData, prepare_data
from diffattn.data.text import read_corpus, split_by_document
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.probes.options import DEPTHS
from diffattn.probes.retrieval import RetrievalOptions, measure_retrieval
from diffattn.scaling.arms import ARMS
from diffattn.scaling.options import LadderOptions
from diffattn.study.findings import rounded, training_loss
from diffattn.train.callbacks import Progress, read_metrics
from diffattn.train.run import train

OPEN, DOUBLE = "gates at 0.88", "W_O x 2"
# σ(2) = 0.88, where a gate without a bias starts at σ(0) = 0.5.
_BIAS = 2.0
STARTS = ("as built", OPEN, DOUBLE)
# What tells most comes first.
CASES = (
    "softmax:1", "gated:1", "gated:2", "gated:0.5", f"gated:1:{DOUBLE}", f"gated:1:{OPEN}", "gated:4", "softmax:2",
    "softmax:0.5", "softmax:4",
)  # fmt: skip
# Probed so often in a run, at equal distances.
_PROBES = 20
TASKS = ((1, 1), (2, 1))
# At each of five depths.
_SAMPLES = 20
_SETTING = ("vocab_size", "context", "needles", "batch_size", "match", "dtype")


@dataclass(frozen=True)
class Case:
    """One run, ``VARIANT:TIMES[:START[:SEED]]``: a variant, its learning rate as a multiple of the ladder's rule for
    the size, how its gates start, and the seed."""

    attention: str
    times: float
    start: str = STARTS[0]
    seed: int = 0

    @staticmethod
    def of(text: str) -> Case:
        """Read from the command line.

        >>> Case.of("gated:2"), Case.of("gated:2::1").seed
        (Case(attention='gated', times=2.0, start='as built', seed=0), 1)
        """
        attention, times, start, seed, *_ = [*text.split(":"), "", "", ""]
        known = attention in ARMS and (start or STARTS[0]) in STARTS and (start != OPEN or attention == "gated")
        try:
            case = Case(attention, float(times), start or STARTS[0], int(seed or 0))
        except ValueError:
            known = False
        if not known:
            raise SystemExit(
                f"gate_study: case {text!r} given; wanted a variant of {', '.join(ARMS)}, a number and one of "
                f"{', '.join(STARTS)}, where gates are those of gated attention"
            )
        return case

    @property
    def name(self) -> str:
        return f"{self.attention}-{self.times:g}-{self.start.replace(' ', '_')}-seed{self.seed}"


@dataclass(frozen=True)
class Probe:
    """Held-out texts with one needle, its question and its answer, and random tokens that repeat."""

    ids: Tensor
    """(texts, tokens), padded behind the answer."""
    digits: Tensor
    """The same, −100 but at the digits of the answers: labels."""
    repeats: Tensor
    repeated: Tensor
    """Labels of what stands there for the second or third time."""

    @staticmethod
    def of(haystack: Haystack, context: int, *, texts: int = 40) -> Probe:
        tokenizer = haystack.tokenizer
        rows, labels = [], []
        for index in range(texts):
            prompt = haystack.prompt(
                np.random.default_rng((7, index)), length=context, depth=DEPTHS[index % len(DEPTHS)], answered=True
            )
            told = tokenizer(f" {prompt.answers[0]}", add_special_tokens=False)["input_ids"]
            digits = [token if tokenizer.decode([token]).strip() else -100 for token in told]
            padding = context - len(prompt.ids) - len(told)
            rows.append([*prompt.ids, *told, *[told[-1]] * padding])
            labels.append([*[-100] * len(prompt.ids), *digits, *[-100] * padding])
        period = 24
        once = torch.from_numpy(np.random.default_rng(7).integers(0, len(tokenizer), (texts, period)))
        repeats = once.repeat(1, 3)[:, :context]
        repeated = repeats.clone()
        repeated[:, :period] = -100
        return Probe(torch.tensor(rows), torch.tensor(labels), repeats, repeated)

    def measure(self, model: DiffTransformerForCausalLM, step: int, dtype: str) -> dict[str, Any]:
        """What a digit and a repeated token cost, the gates, and the gradients that training on these texts has.

        ``gradients`` are norms over all weights of a kind; ``bfloat16_cosine`` is the cosine between W_g's gradient
        under autocast and in float32, 1 where rounding does no harm.
        """
        ids, labels, repeats, repeated = (
            each.to(model.device) for each in (self.ids, self.digits, self.repeats, self.repeated)
        )
        model.zero_grad()
        with _gates(model) as gates, torch.no_grad():
            digits = model(ids, labels=labels)
            repeat = model(repeats, labels=repeated).loss.item()
        of_answers = labels[:, 1:] != -100
        right = (digits.logits[:, :-1].argmax(-1) == labels[:, 1:])[of_answers].float().mean().item()
        # The texts alone: the first pass.
        opened = [_gate_facts(values[0]) for values in gates]
        found = {"step": step, "nats_per_digit": digits.loss.item(), "digits_right": right, "nats_per_repeat": repeat}
        some = ids[:8]
        gradients = {}
        for name in dict.fromkeys(["float32", dtype]):
            # Not the model's own `forward`, around which the Trainer has put its autocast.
            with torch.autocast(model.device.type, torch.bfloat16, enabled=name == "bfloat16"):
                loss = type(model).forward(model, some, labels=some).loss
            loss.backward()
            gradients[name] = {kind: _gradient(model, kind) for kind in ("g_proj", "q_proj", "o_proj", "down_proj")}
            model.zero_grad()
        found["gradients"] = {kind: vector.norm().item() for kind, vector in gradients[dtype].items() if len(vector)}
        if opened:
            pair = gradients["float32"]["g_proj"], gradients[dtype]["g_proj"]
            found |= {"gates": opened, "bfloat16_cosine": torch.cosine_similarity(*pair, dim=0).item()}
        return found


def _gradient(model: DiffTransformerForCausalLM, kind: str) -> Tensor:
    found = [weight.grad.flatten() for name, weight in model.named_parameters()
             if f"{kind}.weight" in name and weight.grad is not None]  # fmt: skip
    return torch.cat(found) if found else torch.zeros(0)


def _gate_facts(gates: Tensor) -> dict[str, float]:
    """Of a layer: the mean, the shares nearly closed and nearly open, the spread of a channel over tokens, averaged,
    and that of the channels' means."""
    channels = gates.flatten(0, -2)
    return {
        "mean": gates.mean().item(),
        "below_0.1": (gates < 0.1).float().mean().item(),
        "above_0.9": (gates > 0.9).float().mean().item(),
        "std_over_tokens": channels.std(0).mean().item(),
        "std_of_channels": channels.mean(0).std().item(),
    }


@contextlib.contextmanager
def _gates(model: DiffTransformerForCausalLM) -> Iterator[list[list[Tensor]]]:
    """By layer, the gates of each pass inside the block; of a model that has none, nothing."""
    projections = [layer.self_attn.g_proj for layer in model.model.layers if hasattr(layer.self_attn, "g_proj")]
    seen: list[list[Tensor]] = [[] for _ in projections]
    handles = [
        projection.register_forward_hook(lambda _, __, raw, own=own: own.append(torch.sigmoid(raw.float())))
        for projection, own in zip(projections, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def with_open_gates(model: DiffTransformerForCausalLM) -> DiffTransformerForCausalLM:
    """The model with 2 added to what its gates are the sigmoid of, in place; it is not in what is saved."""
    for layer in model.model.layers:
        layer.self_attn.g_proj.register_forward_hook(lambda _, __, raw: raw + _BIAS)
    return model


def built(case: Case, ladder: LadderOptions) -> DiffTransformerForCausalLM:
    """The model of a case before its first step."""
    (shape,) = ladder.shapes()
    model = ARMS[case.attention].build(shape, seed=case.seed, match=ladder.match).model
    if case.start == DOUBLE:
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight *= 2
    return with_open_gates(model) if case.start == OPEN else model


def run(case: Case, ladder: LadderOptions, data: PreparedData, held_out: Haystack, folder: Path) -> dict[str, Any]:
    """Train a case, or go on training, and measure; the row without its provenance."""
    (shape,) = ladder.shapes()
    recipe = ladder.recipe(shape, case.seed)
    recipe = dataclasses.replace(recipe, learning_rate=recipe.learning_rate * case.times, evaluations=1, checkpoints=2)
    probe = Probe.of(held_out, ladder.context)
    model = built(case, ladder)
    probes = folder / "probes.jsonl"
    folder.mkdir(parents=True, exist_ok=True)

    def probed(step: Progress) -> None:
        if step.step % max(1, recipe.steps // _PROBES) == 0 or step.step in (1, recipe.steps):
            found = probe.measure(model, step.step, recipe.dtype)
            with probes.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rounded(found)) + "\n")
            print(f"{case.name} {step.step}/{step.steps} loss {step.loss:.3f} "
                  f"digit {found['nats_per_digit']:.3f} repeat {found['nats_per_repeat']:.3f}", flush=True)  # fmt: skip

    result = train(model, data, recipe, folder / "run", resume=True, on_progress=probed)
    model = DiffTransformerForCausalLM.from_pretrained(result.model_folder).to(recipe.device).eval()
    if case.start == OPEN:
        with_open_gates(model)
    options = RetrievalOptions(lengths=(ladder.context,), tasks=TASKS, samples=_SAMPLES)
    answers = measure_retrieval(model, held_out, options)
    exact = {
        task: [right for cell, correct in answers.items() if (cell.needles, cell.queries) == task for right in correct]
        for task in TASKS
    }
    metrics = read_metrics(folder / "run" / "metrics.jsonl")
    by_stage, _ = training_loss(metrics, ladder.context)
    norms = [each["grad_norm"] for each in metrics if "loss" in each]
    # A cut run may have probed a step twice.
    seen = {row["step"]: row for row in map(json.loads, probes.read_text(encoding="utf-8").splitlines())}
    return rounded(
        {
            "learning_rate": recipe.learning_rate,
            "parameters": model.num_parameters(),
            "tokens": recipe.steps * recipe.tokens_per_step(ladder.context),
            "training_loss": [[point.x, point.mean] for point in by_stage],
            "clipped": sum(norm > recipe.max_grad_norm for norm in norms) / len(norms),
            "val_loss": result.val_loss,
            "retrieval": [[*task, sum(right) / len(right), len(right)] for task, right in exact.items()],
            "probes": [seen[step] for step in sorted(seen)],
            "train_tokens_per_second": result.train_tokens_per_second,
        }
    )


def setting(ladder: LadderOptions) -> dict[str, Any]:
    """What all cases of a call share, as it stands in their rows."""
    return {"size": ladder.sizes[0], "for_tokens": ladder.tokens} | {name: getattr(ladder, name) for name in _SETTING}


def identity(row: dict[str, Any]) -> str:
    """What tells a case in its setting from others, of a row or of what a row begins with."""
    names = [field.name for field in dataclasses.fields(Case)]
    return json.dumps({name: row[name] for name in (*names, "size", "for_tokens", *_SETTING)})


def tables(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The rows in Markdown, a line each: a table for each setting, by what it is called in words."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        words = (f"{row['size']} parameters", f"{row['for_tokens']} tokens", f"context {row['context']}",
                 f"vocabulary {row['vocab_size']}", f"needles {row['needles']:g}", row["dtype"])  # fmt: skip
        found.setdefault(", ".join(words), []).append(row)
    return {words: _table(mine) for words, mine in found.items()}


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(ARMS)
    head = ["model", "learning rate", "start", "seed", "1 needle of 1", "1 of 2", "nats a digit",
            "nats a repeated token", "held-out loss"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for row in sorted(rows, key=lambda row: (names.index(row["attention"]), row["start"], row["times"], row["seed"])):
        last = row["probes"][-1]
        measured = [*(share for _, _, share, _ in row["retrieval"]), last["nats_per_digit"], last["nats_per_repeat"]]
        rate = f"× {row['times']:g} = {row['learning_rate']:.2g}"
        lines.append([row["attention"], rate, row["start"], str(row["seed"]), *(f"{value:.2f}" for value in measured),
                      f"{row['val_loss']:.3f}"])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", default="sotu", help="a file, a folder, or the id of a data set")
    parser.add_argument("--runs", type=Path, default=Path("runs/gates"), help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="file of the rows, to which is added")
    parser.add_argument("--cases", nargs="+", default=CASES, help="VARIANT:TIMES[:START[:SEED]], in this order")
    parser.add_argument("--size", default="200k", help="parameters without the embedding")
    parser.add_argument("--tokens", default="4M")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--needles", type=float, default=0.9, help="share of the tokens in which something repeats")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--table", action="store_true", help="print the rows of --out as tables; run nothing")
    options = parser.parse_args()
    known = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if options.table:
        for words, table in tables(known).items():
            print(f"## {words}\n\n{table}\n")
        return
    ladder = LadderOptions(
        sizes=(options.size,), tokens=options.tokens, text=options.text, vocab_size=options.vocab_size,
        context=options.context, needles=options.needles, batch_size=options.batch_size, dtype=options.dtype,
    )  # fmt: skip
    cases = [Case.of(text) for text in options.cases]
    shared = setting(ladder)
    done = {identity(row): row for row in known}
    left = [case for case in cases if identity(shared | asdict(case)) not in done]
    if left:
        corpus = read_corpus(ladder.text)
        plain = prepare_data(corpus, vocab_size=ladder.vocab_size, context=ladder.context)
        data = with_needles(plain, corpus, share=ladder.needles)
        held_out = Haystack(split_by_document(corpus).validation, data.tokenizer)
    write = Writer(options.out, keep=True)
    for case in left:
        row = run(case, ladder, data, held_out, options.runs / "-".join(map(str, shared.values())) / case.name)
        gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
        origin = provenance("benchmarks.gate_study", threads=torch.get_num_threads(), **gpu)
        write(shared | asdict(case) | row | {"data_digest": data.facts["digest"]} | origin)


if __name__ == "__main__":
    main()
