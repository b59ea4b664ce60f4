"""Prepares much generated text: MB/s of each stage beside one core of `tokenizers`, memory, and what a kill costs.

The text is made once: lines of JSON with documents of the speeches' paragraphs and of words that nobody uses. A child
prepares it, and the memory of its processes is read from the system twice a second (PSS: what processes share is
counted once). One row for each measurement, as it is done.

    python -m benchmarks.prepare_text --gigabytes 5 --folder /var/tmp/text --out benchmarks/results/prepare_text.jsonl

With `--kill`, a second child is killed (signal 9) when half of the tokens are there, and a third goes on: it has to end
with the same shards. It needs disk space for the text and two times its tokens, a half of the text each.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.rows import Writer, provenance

VOCABULARY, CONTEXT = 32_000, 1024
GATE = "tests/data/test_token_files.py"
_FILE_BYTES = 500_000_000
_ENCODING = "turning the text into tokens"


def write_text(folder: Path, size: int) -> int:
    """Writes files of JSON lines with about ``size`` bytes of text together, or keeps those of an earlier run."""
    from diffattn.data.text import read_corpus

    mark = folder / f"made-{size}.json"
    if mark.exists():
        return int(json.loads(mark.read_text())["bytes"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    draw = random.Random(0)
    paragraphs = [part for document in read_corpus("sotu").documents for part in document.text.split("\n\n") if part]
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
    written = number = 0
    for index in itertools.count():
        if written >= size:
            break
        with (folder / f"{index:03}.jsonl").open("w", encoding="utf-8") as file:
            end = min(size, written + _FILE_BYTES)
            while written < end:
                # About 4 kB: paragraphs, and one in fifty words that is in hardly any other document.
                chosen = draw.choices(paragraphs, k=draw.randint(2, 14))
                odd = ["".join(draw.choices(syllables, k=draw.randint(2, 5))) for _ in range(len(chosen) * 2)]
                text = f"Document {number}.\n\n" + "\n\n".join(chosen) + "\n\n" + " ".join(odd)
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written, number = written + len(text.encode()), number + 1
    mark.write_text(json.dumps({"bytes": written, "documents": number}))
    return written


def child(text: str, cache: Path) -> None:
    """Prepares the text and prints a line of JSON when a stage begins, and at the end."""
    from diffattn.data.packing import prepare_data
    from diffattn.progress import Stage

    seen: dict[str, float] = {}

    def on_stage(stage: Stage) -> None:
        now = time.monotonic()
        if now - seen.get(stage.name, -9.0) > 1 or stage.done == stage.total:
            line = {"stage": stage.name, "done": stage.done, "total": stage.total, "at": now, "cpu": cpu()}
            print(json.dumps(line), flush=True)
            seen[stage.name] = now

    data = prepare_data(
        text, vocab_size=VOCABULARY, context=CONTEXT, cache_dir=cache, on_stage=on_stage,
        on_note=lambda line: print(json.dumps({"note": line}), flush=True),
    )  # fmt: skip
    ends = {"facts": data.facts, "folder": str(data.train.folder), "at": time.monotonic(), "cpu": cpu()}
    print(json.dumps(ends), flush=True)


def cpu() -> float:
    """The seconds of processor time of this process, and of those that it started and that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def prepare(text: str, cache: Path, until: Callable[[dict[str, Any]], bool] = lambda line: False) -> dict[str, Any]:
    """Runs a child; kills it when ``until`` says so of a line that it prints.

    Returns its seconds and peak bytes, and for each stage when it began and ended and how much was done at both ends.
    """
    command = [sys.executable, "-m", "benchmarks.prepare_text", "--child", text, str(cache)]
    began, stages, last = time.monotonic(), {}, {}
    peak = Peak()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak.watch(process.pid)
        assert process.stdout is not None
        for printed in process.stdout:
            last = json.loads(printed)
            if "stage" in last:
                mine = stages.setdefault(last["stage"], {"began": last["at"], "from": last["done"], "cpu": last["cpu"]})
                mine |= {"ended": last["at"], "done": last["done"], "total": last["total"]}
            if until(last):
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
    peak.stop()
    seconds = time.monotonic() - began
    return {"seconds": seconds, "started": began, "peak": peak.bytes, "stages": stages, "last": last}


class Peak:
    """The largest memory of a process and those that it started."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()

    def watch(self, process: int) -> None:
        """Begins to look, twice a second."""
        self._thread = threading.Thread(target=self._look, args=(process,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends looking."""
        self._ended.set()
        self._thread.join()

    def _look(self, process: int) -> None:
        while not self._ended.wait(0.5):
            self.bytes = max(self.bytes, sum(map(_memory, _family(process))))


def _family(process: int) -> list[int]:
    found = [process]
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += [each for child in path.read_text().split() for each in _family(int(child))]
        except OSError:
            continue
    return found


def _memory(process: int) -> int:
    """The bytes of a process; of what it shares with others, its part."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return 1024 * sizes.get("Pss", 0)


def one_core(texts: Path, tokenizer: Path, size: int) -> tuple[float, float]:
    """Characters of `tokenizers` alone, with one thread, on the first text: a second, and a second of the processor."""
    code = (
        "import itertools, json, sys, time\n"
        "from tokenizers import Tokenizer\n"
        "tokenizer = Tokenizer.from_file(sys.argv[1])\n"
        "with open(sys.argv[2], encoding='utf-8') as file:\n"
        "    texts = [json.loads(line)['text'] for line in itertools.islice(file, int(sys.argv[3]))]\n"
        "best = [0.0, 0.0]\n"
        "for _ in range(3):\n"
        "    began = time.perf_counter(), time.process_time()\n"
        "    for start in range(0, len(texts), 100):\n"
        "        tokenizer.encode_batch_fast(texts[start:start + 100], add_special_tokens=False)\n"
        "    took = time.perf_counter() - began[0], time.process_time() - began[1]\n"
        "    best = [max(old, sum(map(len, texts)) / new) for old, new in zip(best, took)]\n"
        "print(json.dumps(best))\n"
    )
    command = [sys.executable, "-c", code, str(tokenizer), str(texts), str(size // 4000)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    best: tuple[float, float] = json.loads(done)
    return best


def shards(folder: Path) -> list[str]:
    """The SHA-256 of every shard of a folder, in order."""
    found = []
    for path in sorted(folder.glob("*.arrow")):
        with path.open("rb") as file:
            found.append(hashlib.file_digest(file, "sha256").hexdigest())
    return found


def main() -> None:
    """Measures what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of the text")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/diffattn-text"), help="a folder for all files")
    parser.add_argument("--kill", action="store_true", help="also kill a child at half of the tokens, and go on")
    parser.add_argument("--out", type=Path, help="file for the rows")
    parser.add_argument("--child", nargs=2, metavar=("TEXT", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], Path(arguments.child[1]))
        return
    write = Writer(arguments.out)
    texts, cache = arguments.folder / "text", arguments.folder / "cache"
    size = write_text(texts, int(arguments.gigabytes * 1e9))
    shutil.rmtree(cache, ignore_errors=True)
    cores = len(os.sched_getaffinity(0))
    shared = {"benchmark": "prepare_text", "gate": GATE, "text_bytes": size, "cores": cores, "vocabulary": VOCABULARY}
    facts = provenance("benchmarks.prepare_text")
    whole = prepare(str(texts), cache)
    encoding = whole["stages"][_ENCODING]
    folder = Path(whole["last"]["folder"])
    tokenizer = next(path for path in cache.rglob("tokenizer.json"))
    alone, alone_by_cpu = one_core(texts / "000.jsonl", tokenizer, 10_000_000)
    characters = encoding["done"] - encoding["from"]
    rate = characters / (encoding["ended"] - encoding["began"])
    by_cpu = characters / (whole["last"]["cpu"] - encoding["cpu"])
    write(shared | facts | {
        "case": "prepared",
        "seconds": round(whole["seconds"], 1),
        "stages": {name: round(stage["ended"] - stage["began"], 1) for name, stage in whole["stages"].items()},
        "encoding_mb_per_second": round(rate / 1e6, 2),
        "one_core_mb_per_second": round(alone / 1e6, 2),
        "share_of_cores": round(rate / (cores * alone), 3),
        # On a machine that others use too, this share says more: of the processor's seconds, not of the clock's.
        "share_of_processor_time": round(by_cpu / alone_by_cpu, 3),
        "peak_bytes": whole["peak"],
        "tokens": whole["last"]["facts"]["tokens"],
    })  # fmt: skip
    again = prepare(str(texts), cache)
    write(shared | facts | {"case": "found", "seconds": round(again["seconds"], 1), "peak_bytes": again["peak"]})
    if arguments.kill:
        kept = shards(folder)
        shutil.rmtree(folder)
        prepare(str(texts), cache, lambda line: 2 * line.get("done", 0) > size and line.get("stage") == _ENCODING)
        left = shards(folder.with_name(f"{folder.name}.partial"))
        resumed = prepare(str(texts), cache)
        encoding = resumed["stages"][_ENCODING]
        write(shared | facts | {
            "case": "killed at half of the tokens, and resumed",
            "shards": len(kept),
            "kept": len(left),
            "seconds": round(resumed["seconds"], 1),
            "seconds_to_the_first_new_token": round(encoding["began"] - resumed["started"], 1),
            "same": shards(folder) == kept,
            "peak_bytes": resumed["peak"],
        })  # fmt: skip


if __name__ == "__main__":
    main()
