"""The child process of `benchmarks.inference`: load a model folder, make one token, say when and with what memory.

python -m benchmarks.first_token FOLDER --threads 1 --dtype float32
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

PROMPT = 128


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--onnx", action="store_true", help="the folder holds an export")
    arguments = parser.parse_args()
    loaded, held = (_onnx if arguments.onnx else _torch)(arguments)
    done, now = time.perf_counter(), time.time()
    print(json.dumps({
        "first_token_at": now, "import_seconds": loaded[0] - began, "load_seconds": loaded[1] - loaded[0],
        "prompt_seconds": done - loaded[1], "loaded_copy_bytes": held, "peak_resident_bytes": _memory()["VmHWM"],
    }))  # fmt: skip


def _torch(arguments: argparse.Namespace) -> tuple[tuple[float, float], int]:
    import torch
    from transformers import AutoModelForCausalLM

    import diffattn  # noqa: F401 - registers the models

    torch.set_num_threads(arguments.threads)
    imported = time.perf_counter()
    before = _memory()["RssAnon"]
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=getattr(torch, arguments.dtype))
    loaded, held = time.perf_counter(), _memory()["RssAnon"] - before
    with torch.inference_mode():
        model.generate(torch.arange(PROMPT)[None], max_new_tokens=1, do_sample=False)
    return (imported, loaded), held


def _onnx(arguments: argparse.Namespace) -> tuple[tuple[float, float], int]:
    import numpy as np

    from diffattn.export.run import OnnxDecoder

    imported = time.perf_counter()
    before = _memory()["RssAnon"]
    decoder = OnnxDecoder(arguments.folder, threads=arguments.threads)
    loaded, held = time.perf_counter(), _memory()["RssAnon"] - before
    decoder.generate(np.arange(PROMPT)[None], 1)
    return (imported, loaded), held


def _memory() -> dict[str, int]:
    """Resident bytes of this process: its own pages, and the highest total so far, mapped files with it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return {
        key: int(value.split()[0]) * 1024
        for key, _, value in (line.partition(":") for line in lines)
        if key in ("VmHWM", "RssAnon")
    }


if __name__ == "__main__":
    main()
