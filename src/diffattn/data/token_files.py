"""Token files: shards of token ids as Arrow streams, made by all cores, with a checksum each and a record of them all.

The tokens of a side are document, separator, document, separator, … as uint16 (uint32 above 65,536 tokens), in files of
one column and one batch. A line of ``shards.jsonl`` says what a shard holds and where in the text it ends, so that work
that was killed goes on behind the last one, and one that a disk damaged is made anew by itself.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import takewhile
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from diffattn.data.documents import Piece
from diffattn.data.encoding import DocumentParts, Part, PartEncoder, Place, Unit
from diffattn.data.survey import SIDES, Sides
from diffattn.data.tokenizer import vocabulary_rows
from diffattn.errors import TrainingError
from diffattn.files import FileFacts, file_facts, parse_json, sync
from diffattn.machine import cores
from diffattn.progress import OnStage, Stage
from diffattn.sealed import SEAL, append_row, unbroken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 3
"""The version of these files; it is part of the name of a cache folder."""
JOURNAL = "shards.jsonl"
# The tokens of a shard, at least; the last one has fewer.
_SHARD = 1 << 24
_COLUMN = "tokens"
# Text of fewer characters is turned into tokens in this process, since others take a moment to start.
_ALONE = 1 << 25
_ENCODING = "turning the text into tokens"


class Shard(FileFacts):
    """The facts of a shard, beside its size and SHA-256."""

    side: str
    number: int
    tokens: int
    begin: list[int]
    """The :class:`diffattn.data.encoding.Place` in the text at which it begins."""
    end: list[int]
    """The place behind it."""


def shard_name(shard: Shard) -> str:
    """Returns the name of the file of a shard."""
    return f"{shard['side']}-{shard['number']:05}.arrow"


def token_type(tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns the type in which token files keep the ids of a tokenizer."""
    return "uint16" if vocabulary_rows(tokenizer) <= 1 << 16 else "uint32"


class Tokens:
    """The tokens of one side of a text, in several mapped files.

    Args:
        paths: the files of the shards in order.
        counts: the tokens of each.

    ``tokens[a:b]`` is an array of the ids, as they are in the file; NumPy takes the whole for an array.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]) -> None:
        self.paths, self._counts = tuple(paths), tuple(counts)
        self._ends = np.cumsum(self._counts, dtype=np.int64)
        self._open: list[npt.NDArray[np.unsignedinteger[Any]] | None] = [None] * len(self.paths)

    @classmethod
    def joined(cls, parts: Sequence[Tokens]) -> Tokens:
        """Returns tokens one after the other."""
        return cls([path for part in parts for path in part.paths], [n for part in parts for n in part._counts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.paths else 0

    def __getitem__(self, wanted: slice) -> npt.NDArray[np.unsignedinteger[Any]]:
        start, stop, step = wanted.indices(len(self))
        assert step == 1
        parts = []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            first = int(self._ends[number]) - self._counts[number]
            part = self._shard(number)[start - first : stop - first]
            parts.append(part)
            start, number = start + len(part), number + 1
        if not parts:
            return np.empty(0, np.uint16)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self[:], dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process of a data loader opens the files itself; by default it would get a copy of all tokens.
        return Tokens, (self.paths, self._counts)

    def _shard(self, number: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        found = self._open[number]
        if found is None:
            import pyarrow

            batch = pyarrow.ipc.open_stream(pyarrow.memory_map(str(self.paths[number]))).read_next_batch()
            found = self._open[number] = batch.column(0).to_numpy()
        return found


def write_shard(path: Path, ids: npt.NDArray[np.unsignedinteger[Any]]) -> None:
    """Writes ids as a file that is whole or not there: a stream of Arrow with one column in one batch."""
    import pyarrow

    batch = pyarrow.record_batch([pyarrow.array(ids)], names=[_COLUMN])
    # A process may read the file that this one replaces.
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with new.open("wb") as file, pyarrow.ipc.new_stream(file, batch.schema) as stream:
            stream.write_batch(batch)
        sync(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    sync(path.parent)


def damaged(folder: Path, shards: Sequence[Shard], on_stage: OnStage) -> list[Shard]:
    """Returns the shards whose files are not as they were written; reads them all, by several threads."""

    def whole(shard: Shard) -> bool:
        try:
            found = file_facts(folder / shard_name(shard))
        except OSError:
            return False
        return found == {"bytes": shard["bytes"], "sha256": shard["sha256"]}

    total, done, bad = sum(shard["bytes"] for shard in shards), 0, []
    with ThreadPoolExecutor(cores()) as threads:
        for shard, good in zip(shards, threads.map(whole, shards), strict=True):
            done += shard["bytes"]
            if total > _SHARD:
                on_stage(Stage("checking the tokens", done, total))
            bad += [] if good else [shard]
    return bad


def read_journal(folder: Path) -> dict[str, list[Shard]]:
    """Returns the shards of each side that are finished in a folder, as far as they follow each other."""
    found: dict[str, list[Shard]] = {side: [] for side in SIDES}
    try:
        lines = (folder / JOURNAL).read_bytes().splitlines()
    except FileNotFoundError:
        return found
    for line in lines:
        # The last line of a killed process may be cut off.
        try:
            row = parse_json(line)
            whole = unbroken(row) and row.pop(SEAL) != ""
        except (ValueError, KeyError, AttributeError):
            continue
        if whole and row["number"] == len(found[row["side"]]):
            found[row["side"]].append(row)
    return {side: list(takewhile(partial(_is_there, folder), found[side])) for side in SIDES}


def _is_there(folder: Path, shard: Shard) -> bool:
    path = folder / shard_name(shard)
    return path.exists() and path.stat().st_size == shard["bytes"]


def write_shards(
    folder: Path,
    pieces: Callable[[], Iterator[Piece]],
    sides: Sides,
    tokenizer: PreTrainedTokenizerFast,
    on_stage: OnStage,
) -> dict[str, list[Shard]]:
    """Turns a text, split into its sides, into shards in a folder; those that are finished there are kept.

    Raises:
        DataError: a text that cannot be read, or is another than before.
        TrainingError: a process was ended by the system.
    """
    shards = read_journal(folder)
    ends = {side: Place(*shards[side][-1]["end"]) if shards[side] else Place(0, 0, 0) for side in SIDES}
    open_shards = {side: _OpenShard(folder, side, shards[side], ends[side], token_type(tokenizer)) for side in SIDES}
    total = sum(sides.characters.values())
    units = _Units(tokenizer, sides, ends)
    if any(shards.values()):
        on_stage(Stage("reading up to where the tokens end"))
    with _encoders(units.encoder, total) as encoded:
        for side, unit, ids in encoded(units.read(pieces())):
            open_shards[side].add(ids, unit.end)
            units.encoded += unit.characters
            on_stage(Stage(_ENCODING, units.skipped + units.encoded, total))
    for each in open_shards.values():
        each.close()
    return {side: open_shards[side].shards for side in SIDES}


def write_again(
    folder: Path,
    shard: Shard,
    pieces: Callable[[], Iterator[Piece]],
    sides: Sides,
    tokenizer: PreTrainedTokenizerFast,
    on_stage: OnStage,
) -> bool:
    """Makes one shard anew from the text; returns whether it is now as it was first written."""
    begin, end = Place(*shard["begin"]), Place(*shard["end"])
    # The other side has nothing to do.
    ends = {side: begin if side == shard["side"] else Place(len(sides.held_out), 0, 0) for side in SIDES}
    units, found, count = _Units(tokenizer, sides, ends), [], 0
    with _encoders(units.encoder, _SHARD) as encoded:
        for side, unit, ids in encoded(units.read(pieces())):
            if side != shard["side"]:
                continue
            found.append(ids)
            count += len(ids)
            on_stage(Stage("making a damaged shard anew", min(count, shard["tokens"]), shard["tokens"]))
            if unit.end >= end:
                break
    ids = np.concatenate(found)[: shard["tokens"]].astype(token_type(tokenizer))
    write_shard(folder / shard_name(shard), ids)
    return not damaged(folder, [shard], on_stage)


class _Units:
    """Reads a text as units, each with its side, from the place on where each side goes on."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, sides: Sides, ends: dict[str, Place]) -> None:
        self._sides, self._ends = sides, ends
        self._parts = {side: DocumentParts(tokenizer) for side in SIDES}
        self.encoder = self._parts["train"].encoder()
        self.skipped = self.encoded = 0

    def read(self, pieces: Iterator[Piece]) -> Iterator[tuple[str, Unit]]:
        for number, document in documents_in(pieces):
            side = self._sides.side(number)
            place = max(self._ends[side], Place(number, 0, 0))
            if place.document == number:
                self.skipped += place.taken
                for unit in self._parts[side].document(document, place):
                    yield side, unit
            self.skipped += sum(len(piece.text) for piece in document)
        for side in SIDES:
            yield side, self._parts[side].rest(Place(len(self._sides.held_out), 0, 0))


def documents_in(pieces: Iterator[Piece]) -> Iterator[tuple[int, Iterator[Piece]]]:
    """Yields the number of each document and its pieces, which have to be read before the next one if at all."""
    for number, first in enumerate(pieces):
        document = _document(first, pieces)
        yield number, document
        for _ in document:
            pass


def _document(piece: Piece, pieces: Iterator[Piece]) -> Iterator[Piece]:
    yield piece
    while not piece.last:
        piece = next(pieces)
        yield piece


class _OpenShard:
    """The shards of one side, the last of which is not full yet."""

    def __init__(self, folder: Path, side: str, shards: list[Shard], end: Place, dtype: str) -> None:
        self.folder, self.side, self.shards, self.end, self.dtype = folder, side, shards, end, dtype
        self._begin, self._ids, self._count = end, list[npt.NDArray[np.unsignedinteger[Any]]](), 0

    def add(self, ids: npt.NDArray[np.uint32], end: Place) -> None:
        self._ids.append(ids.astype(self.dtype))
        self._count, self.end = self._count + len(ids), end
        if self._count >= _SHARD:
            self.close()

    def close(self) -> None:
        if not self._count:
            return
        shard: Shard = {
            "side": self.side, "number": len(self.shards), "tokens": self._count, "begin": list(self._begin),
            "end": list(self.end), "bytes": 0, "sha256": "",
        }  # fmt: skip
        path = self.folder / shard_name(shard)
        write_shard(path, np.concatenate(self._ids))
        shard.update(file_facts(path))
        append_row(self.folder / JOURNAL, shard)
        self.shards.append(shard)
        self._begin, self._ids, self._count = self.end, [], 0


_Encoded = Callable[[Iterable[tuple[str, Unit]]], Iterator[tuple[str, Unit, npt.NDArray[np.uint32]]]]


@contextmanager
def _encoders(encoder: PartEncoder, characters: int) -> Iterator[_Encoded]:
    """Yields a function that encodes units in order: in one process a core, or here where there is little text."""
    if characters < _ALONE or cores() < 2:
        yield lambda units: ((side, unit, encoder(unit.parts)) for side, unit in units)
        return
    with ExitStack() as opened:
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        workers = [opened.enter_context(_Worker(encoder)) for _ in range(cores())]
        for worker in workers:
            idle.put(worker)
        threads = opened.enter_context(ThreadPoolExecutor(len(workers)))

        def encode(parts: list[Part]) -> npt.NDArray[np.uint32]:
            worker = idle.get()
            try:
                return worker.encode(parts)
            finally:
                idle.put(worker)

        def encoded(units: Iterable[tuple[str, Unit]]) -> Iterator[tuple[str, Unit, npt.NDArray[np.uint32]]]:
            waiting: deque[tuple[str, Unit, Future[npt.NDArray[np.uint32]]]] = deque()
            for side, unit in units:
                waiting.append((side, unit, threads.submit(encode, unit.parts)))
                # So many that no process waits for work, and no more, since they are held in memory.
                if len(waiting) > 2 * len(workers):
                    first, parts, ids = waiting.popleft()
                    yield first, parts, ids.result()
            for first, parts, ids in waiting:
                yield first, parts, ids.result()

        yield encoded


class _Worker:
    """Another process that encodes parts: it imports no torch and runs none of the program that called us."""

    def __init__(self, encoder: PartEncoder) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            # One thread, since there is a process for each core; the modules are found where ours were.
            environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(sys.path)}
            code = f"from diffattn.data.token_files import work; work({theirs.fileno()})"
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
            )
        self._connection.send((encoder.content, encoder.before))

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        # The process ends when nobody can send it more.
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def encode(self, parts: list[Part]) -> npt.NDArray[np.uint32]:
        try:
            self._connection.send(parts)
            return np.frombuffer(self._connection.recv_bytes(), np.uint32)
        except (EOFError, OSError):
            raise TrainingError(
                "a process that turns text into tokens was ended by the system, perhaps for want of memory",
                "more free memory",
                "start again: what is finished is kept",
            ) from None


def work(connection: int) -> None:
    """Encodes what another process sends; this is the main function of a worker."""
    with Connection(connection) as parent:
        try:
            encode = PartEncoder(*parent.recv())
            while True:
                parent.send_bytes(encode(parent.recv()).tobytes())
        except (EOFError, OSError, KeyboardInterrupt):
            # The parent ended; or Ctrl-C, which it hears of too.
            pass
