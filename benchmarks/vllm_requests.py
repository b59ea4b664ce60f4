"""Checks that both engines of ``diffattn serve`` answer, or refuse in the same words, what OpenAI's client asks for.

Each request of ``benchmarks.openai_cases`` goes to the transformers engine and to vLLM, over the same model. One row
for each: whether it was served, and whether the answers are alike: refusals to the word, greedy texts to the letter
(but for a last character that is not whole yet, which vLLM holds back), draws in their number and length. Runs in an
environment with vLLM (``make test-vllm``); the other engine in one with ``diffattn[serve]``, whose Python is named,
since vLLM wants an older transformers. Exit status 1 where they differ.

    python -m benchmarks.vllm_requests --python .venv/bin/python --out benchmarks/results/vllm_requests.jsonl
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.openai_cases import CASES, Case, ask
from benchmarks.rows import Writer, provenance
from benchmarks.vllm_tokens import KEY, server, write_model

VARIANT = "diff_v1"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
ENGINES = ("transformers", "vllm")


def main() -> int:
    """Ask both engines everything; write the rows."""
    import openai

    from diffattn.serve.engines import installed_version

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="Python of the transformers engine")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    # Nothing is compiled, which takes vLLM minutes: words are asked for here, and no speed.
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="WARNING",
        TORCH_COMPILE_DISABLE="1",
    )  # fmt: skip
    answers: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as space:
        folder = Path(space) / VARIANT
        write_model(folder, VARIANT)
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        for engine in ENGINES:
            with server(folder, engine, options.python if engine == "transformers" else sys.executable) as address:
                client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=300)
                answers[engine] = {name: ask(client, folder.name, case) for name, case in CASES.items()}
    facts = provenance("benchmarks.vllm_requests")
    facts["versions"]["vllm"] = installed_version("vllm")
    write = Writer(options.out)
    rows = [row(name, *(answers[engine][name] for engine in ENGINES)) | facts for name in CASES]
    for each in rows:
        write(each)
    return 0 if all(each["alike"] for each in rows) else 1


def row(name: str, ours: dict[str, Any], vllm: dict[str, Any]) -> dict[str, Any]:
    """The row of one case."""
    return {
        "case": name,
        "variant": VARIANT,
        "served": "answers" in vllm,
        "refused": vllm.get("refused", {}).get("message"),
        "alike": alike(CASES[name], ours, vllm),
    }


def alike(case: Case, ours: dict[str, Any], vllm: dict[str, Any]) -> bool:
    """Whether two engines' answers to a case are alike."""
    if "refused" in ours or "refused" in vllm:
        return ours == vllm and not case.served
    if len(ours["answers"]) != len(vllm["answers"]):
        return False
    # Only one of them counts the tokens of a stream that does not ask for it.
    counted = ours["counts"] is None or vllm["counts"] is None or ours["counts"] == vllm["counts"]
    drawn = bool(case.fields.get("temperature"))
    return counted and all(
        a["reason"] == b["reason"]
        and len(a["tokens"]) == len(b["tokens"])
        and (drawn or a["text"].rstrip("\ufffd") == b["text"].rstrip("\ufffd"))
        for a, b in zip(ours["answers"], vllm["answers"], strict=True)
    )


if __name__ == "__main__":
    sys.exit(main())
