"""Checks that vLLM writes what ``generate`` writes: the greedy tokens of 12 prompts, one row per variant and way.

Models of a few million parameters with random weights of a fixed seed, wide enough that the text depends on all that
was read. Each is asked through vLLM's ``LLM`` class and through its OpenAI server, started by ``diffattn serve``, to
which all prompts go at once. Runs in an environment with vLLM (``make test-vllm``); exit status 1 where a token
differs.

    python -m benchmarks.vllm_tokens --out benchmarks/results/vllm.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.rows import Writer, provenance

# By name, the variant and the fields of its configuration.
WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("softmax", "diff_v1", "diff_v2", "diff_gda", "diff_gda_v2", "dex")},
    "diff_v1 with windows": ("diff_v1", WINDOWS),
}
TOKENS = 32
CONTEXT = 256
KEY = "a-key"
# Heads of 32, of which vLLM's CPU kernel knows the multiples: V1's one call has 64.
SHAPE: dict[str, Any] = {
    "hidden_size": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32, "intermediate_size": 512,
    "max_position_embeddings": CONTEXT,
}  # fmt: skip
PROMPTS = (
    "The boat left the harbour before the sun was up.",
    "Nobody had seen the old man since the end of winter, and nobody asked.",
    "She counted the coins twice and closed the drawer.",
    "Rain fell on the roofs, on the road and on the river.",
    "They asked for bread, and he gave them bread and wine.",
    "In the evening the letters were read aloud in the kitchen.",
    "A",
    "What was it that the two of them had agreed upon?",
    "Once more, and this time slowly: one, two, three, four, five, six, seven, eight, nine, ten.",
    "No.",
    "Far from the town there was a house with a green door, and behind it a garden that led down to the water.",
    "It began to snow.",
)


def main() -> int:
    """Compare every variant both ways; write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--variants", nargs="+", choices=CASES, default=tuple(CASES))
    parser.add_argument("--offline", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.offline is not None:
        # vLLM writes on both of the standard streams.
        answers = answers_offline(options.offline, json.loads(sys.stdin.read()))
        options.offline.with_suffix(".json").write_text(json.dumps(answers), encoding="utf-8")
        return 0
    # Of the processes that are started here: a small cache, no look at the network.
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="WARNING"
    )
    write = Writer(options.out)
    rows = []
    with tempfile.TemporaryDirectory() as space:
        for variant in options.variants:
            folder = Path(space) / variant
            prompts = write_model(folder, variant)
            expected, margin = answers_of_generate(folder, prompts)
            began = time.perf_counter()
            same = [a == b for a, b in zip(expected, offline(folder, prompts), strict=True)]
            rows.append(row(variant, "LLM class", expected, same, margin, time.perf_counter() - began))
            write(rows[-1])
            began = time.perf_counter()
            same = [a == b for a, b in zip(texts(folder, expected), served(folder, prompts), strict=True)]
            rows.append(row(variant, "diffattn serve", expected, same, margin, time.perf_counter() - began))
            write(rows[-1])
    return 0 if all(row["identical"] == row["prompts"] for row in rows) else 1


def row(
    variant: str, way: str, expected: list[list[int]], same: list[bool], margin: float, seconds: float
) -> dict[str, Any]:
    from diffattn.serve.engines import installed_version

    facts = provenance("benchmarks.vllm_tokens")
    facts["versions"]["vllm"] = installed_version("vllm")
    return {
        "engine": "vllm",
        "variant": variant,
        "way": way,
        "prompts": len(expected),
        "tokens": TOKENS,
        "identical": sum(same),
        "different_tokens_in_all": len({token for answer in expected for token in answer}),
        "least_margin": float(f"{margin:.3g}"),
        "seconds": round(seconds, 1),
    } | facts


def write_model(folder: Path, variant: str) -> list[list[int]]:
    """Save a model and its tokenizer; the prompts as its tokens."""
    import torch

    from diffattn.data.tokenizer import train_tokenizer
    from diffattn.model.configuration import DiffTransformerConfig
    from diffattn.model.modeling import DiffTransformerForCausalLM
    from diffattn.plan.shape import ModelShape

    tokenizer = train_tokenizer(PROMPTS, 512)
    shape = ModelShape(vocab_size=len(tokenizer), **SHAPE)
    torch.manual_seed(0)
    # Tied, an embedding this wide would make every model repeat its last token.
    attention, fields = CASES[variant]
    fields = {"initializer_range": 0.12, "tie_word_embeddings": False} | fields
    config = DiffTransformerConfig.from_shape(shape, attention, **fields)
    model = DiffTransformerForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "subln" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        if ".dex." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    for name, buffer in model.named_buffers():
        # Between the two λ that training moves from and to.
        if name.endswith("dex.annealed"):
            buffer.fill_(0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


def answers_of_generate(folder: Path, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
    """The tokens of each prompt, and the least difference between the two best logits of any step."""
    import torch

    from diffattn.model.modeling import DiffTransformerForCausalLM

    model = DiffTransformerForCausalLM.from_pretrained(folder).eval()
    answers, margin = [], float("inf")
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output: Any = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        answers.append(output.sequences[0, len(prompt) :].tolist())
        best = torch.stack(output.logits)[:, 0].topk(2).values
        margin = min(margin, float((best[:, 0] - best[:, 1]).min()))
    return answers, margin


def offline(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """In a process of its own, which leaves no engine behind."""
    command = [sys.executable, "-m", "benchmarks.vllm_tokens", "--offline", str(folder)]
    subprocess.run(command, input=json.dumps(prompts), stdout=sys.stderr, text=True, check=True)
    answers: list[list[int]] = json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))
    return answers


def answers_offline(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    engine = LLM(model=str(folder), dtype="float32", enforce_eager=True, max_model_len=CONTEXT)
    options = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], options)
    return [list(output.outputs[0].token_ids) for output in outputs]


def texts(folder: Path, answers: list[list[int]]) -> list[str]:
    """The texts of answers as a server gives them: up to the token that ends a text, without special tokens.

    Bytes at the end that are no whole character yet are left out, since vLLM's server keeps them back.
    """
    from diffattn.model.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    end = tokenizer.eos_token_id
    cut = [answer[: answer.index(end)] if end in answer else answer for answer in answers]
    return [tokenizer.decode(answer, skip_special_tokens=True).rstrip("\ufffd") for answer in cut]


def served(folder: Path, prompts: list[list[int]]) -> list[str]:
    """Asked all at once, with OpenAI's client and OpenAI's fields, in texts."""
    import openai

    with server(folder) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        try:
            client.with_options(api_key="wrong").models.list()
        except openai.AuthenticationError:
            pass
        else:
            raise AssertionError("vLLM's server takes any key")

        def ask(prompt: list[int]) -> str:
            answer = client.completions.create(model=folder.name, prompt=prompt, max_tokens=TOKENS, temperature=0)
            return answer.choices[0].text.rstrip("\ufffd")

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(ask, prompts))


@contextmanager
def server(folder: Path, engine: str = "vllm", python: str = sys.executable) -> Iterator[str]:
    """The address of ``diffattn serve`` with an engine over a folder, once it answers."""
    import urllib.error
    import urllib.request

    log = folder.with_suffix(".log")
    command = [python, "-m", "diffattn", "serve", str(folder), "--engine", engine, "--port", "0"]
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, stdout=errors, stderr=errors, env=os.environ | {"DIFFATTN_API_KEY": KEY}, start_new_session=True
        )
    try:
        # It compiles the model first, which takes minutes where the machine is busy.
        for _ in range(1800):
            said = log.read_text(encoding="utf-8")
            if process.poll() is not None:
                raise RuntimeError(said)
            if found := re.search(r"(?:starting|serving) .* on (http://\S+)/v1", said):
                try:
                    with urllib.request.urlopen(f"{found[1]}/health", timeout=5):
                        break
                except (urllib.error.URLError, OSError):
                    pass
            time.sleep(1)
        else:
            raise RuntimeError(said)
        yield found[1]
    finally:
        process.terminate()
        process.wait(timeout=60)


if __name__ == "__main__":
    sys.exit(main())
