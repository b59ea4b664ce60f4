"""The child process of `benchmarks.consumer`: one model in one engine, which answers requests of one line each.

    python -m benchmarks.consumer_engines onnxruntime FOLDER --threads 2

All engines read token ids and keep a cache; all read long prompts in the same pieces. The child says when its first
token was there, and then answers `prefill`, `decode`, `losses` and `peak` until its input ends.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from diffattn.export.run import Cache

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

FIRST = 128
# What llama.cpp computes at once by default.
PIECE = 512
# The most tokens that a child holds: its longest context and what is written behind it.
PLACES = 2048 + 128


class Engine(Protocol):
    """One loaded model with one cache."""

    def read(self, ids: Ids, every: bool) -> Floats:
        """Logits (T, V) of the ids behind what the cache holds, which it then holds too; without ``every`` (1, V)."""

    def begin(self) -> None:
        """The cache becomes empty."""

    def keep(self) -> None:
        """What the cache holds now is what :meth:`back` comes back to."""

    def back(self) -> None:
        """The cache holds what was kept, and nothing behind it."""


class Torch:
    """A checkpoint folder under torch, by the model's own attention, in the number format of its file."""

    def __init__(self, path: Path, threads: int) -> None:
        import torch
        from transformers import DynamicCache

        from diffattn.model.loading import load_model

        torch.set_num_threads(threads)
        self.torch, self.new_cache = torch, DynamicCache
        self.model = load_model(path, "auto", "cpu")
        self.begin()

    def read(self, ids: Ids, every: bool) -> Floats:
        with self.torch.inference_mode():
            given = self.torch.from_numpy(ids[None])
            kept = 0 if every else 1
            logits = self.model(given, past_key_values=self.cache, use_cache=True, logits_to_keep=kept).logits
        return logits[0].float().numpy()

    def begin(self) -> None:
        self.cache = self.new_cache(config=self.model.config)

    def keep(self) -> None:
        self.kept = self.cache.get_seq_length()

    def back(self) -> None:
        self.cache.crop(self.kept - self.cache.get_seq_length())


class Onnx:
    """An exported folder under onnxruntime."""

    def __init__(self, path: Path, threads: int) -> None:
        from diffattn.export.run import OnnxDecoder

        self.decoder = OnnxDecoder(path, threads=threads)
        # As llama.cpp's: made once, with all its places.
        self.empty = self.decoder.empty_cache(1, PLACES)
        self.begin()

    def read(self, ids: Ids, every: bool) -> Floats:
        logits, self.cache = self.decoder.logits(ids[None], None, self.cache, last=0 if every else 1)
        return logits[0]

    def begin(self) -> None:
        self._take(self.empty)

    def keep(self) -> None:
        self.kept = self.cache

    def back(self) -> None:
        self._take(self.kept)

    def _take(self, cache: Cache) -> None:
        """Go on from an earlier cache in its own buffers: what was written behind it is given up, not kept apart."""
        cache.written[0] = cache.length
        self.cache = cache


class LlamaCpp:
    """A GGUF file under llama.cpp, by its C interface.

    Its own choice is a cache in float16 and flash attention. ``cache``: another type of GGML for keys and values.
    """

    def __init__(self, path: Path, threads: int, *, flash: bool = True, cache: int | None = None) -> None:
        import llama_cpp

        self.library = llama_cpp
        # What it would print while it loads. The callback lives as long as this object.
        self.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silent, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
        if not self.model:
            sys.exit(f"{str(path)!r} given; a GGUF file that llama.cpp loads is wanted: write it again")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = PLACES
        options.n_threads = options.n_threads_batch = threads
        options.no_perf = True
        if not flash:
            options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if cache is not None:
            options.type_k = options.type_v = cache
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(PIECE, 0, 1)
        self.length = 0

    def read(self, ids: Ids, every: bool) -> Floats:
        batch = self.batch
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index] = int(token)
            batch.pos[index] = self.length + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = every or index == len(ids) - 1
        status = self.library.llama_decode(self.context, batch)
        assert status == 0, status
        self.length += len(ids)
        rows = len(ids) if every else 1
        values = ctypes.cast(self.library.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(values, (rows, self.vocabulary)).copy()

    def begin(self) -> None:
        self._cut(0)

    def keep(self) -> None:
        self.kept = self.length

    def back(self) -> None:
        self._cut(self.kept)

    def _cut(self, length: int) -> None:
        self.library.llama_memory_seq_rm(self.memory, 0, length, -1)
        self.length = length


ENGINES: dict[str, Callable[..., Engine]] = {"torch": Torch, "onnxruntime": Onnx, "llama.cpp": LlamaCpp}


class Session:
    """The requests of a parent, by name; each answer is plain JSON."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.next = 0

    def prefill(self, ids: list[int]) -> float:
        """Seconds in which ids are read into an empty cache."""
        self.engine.begin()
        given = np.array(ids, np.int64)
        began = time.perf_counter()
        for start in range(0, len(given), PIECE):
            logits = self.engine.read(given[start : start + PIECE], every=False)
        self.next = int(logits[-1].argmax())
        seconds = time.perf_counter() - began
        self.engine.keep()
        return seconds

    def decode(self, steps: int) -> tuple[float, list[int]]:
        """Seconds and ids of ``steps`` greedy tokens behind those of the last prefill, which alone stay held."""
        token, written = self.next, []
        began = time.perf_counter()
        for _ in range(steps):
            written.append(token)
            token = int(self.engine.read(np.array([token], np.int64), every=False)[0].argmax())
        seconds = time.perf_counter() - began
        self.engine.back()
        return seconds, written

    def losses(self, ids: list[int], scored: int) -> list[float]:
        """Nats of each token from place ``scored`` on, in a text that begins with an empty cache."""
        self.engine.begin()
        given = np.array(ids, np.int64)
        pieces = [self.engine.read(given[start : start + PIECE], every=True) for start in range(0, len(ids) - 1, PIECE)]
        logits = np.concatenate(pieces)[scored - 1 : len(ids) - 1].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        total = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
        return (total - logits[np.arange(len(logits)), given[scored:]]).tolist()

    def peak(self) -> int:
        """The highest resident bytes of this process so far, mapped files among them."""
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=[*ENGINES, "memory"], help="memory: its rate alone")
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-flash", action="store_true", help="llama.cpp without flash attention")
    arguments = parser.parse_args()
    # The answers alone: what a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    if arguments.engine == "memory":
        import torch

        from diffattn.study.machine_benchmark import read_rate

        torch.set_num_threads(arguments.threads)
        answer({"read_bytes_per_second": round(read_rate(512))})
        return
    began = time.perf_counter()
    options = {"flash": False} if arguments.no_flash else {}
    session = Session(ENGINES[arguments.engine](arguments.path, arguments.threads, **options))
    loaded = time.perf_counter()
    session.prefill(list(range(FIRST)))
    answer({
        "at": time.time(), "load_seconds": loaded - began, "first_token_seconds": time.perf_counter() - began,
    })  # fmt: skip
    for line in sys.stdin:
        name, *given = json.loads(line)
        answer(getattr(session, name)(*given))


if __name__ == "__main__":
    main()
