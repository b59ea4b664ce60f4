"""Forms of token files in use, on the same tokens: ours (Arrow), LitData's TokensLoader and MosaicML's MDS.

One row for each form: seconds to write and to open, blocks a second in the order of an epoch, seconds until the next
block of a run that goes on in the middle of an epoch and whether it is the right one, and whether a flipped bit is
noticed. Each runs in a process of its own. The two others are in no environment of ours: they want other packages.

    python -m venv --system-site-packages formats && formats/bin/pip install litdata mosaicml-streaming
    formats/bin/python -m benchmarks.token_formats --tokens 1e9 --out benchmarks/results/token_formats.jsonl
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.rows import Writer, provenance

CONTEXT = 1024
SHARD = 1 << 24
GATE = "tests/data/test_blocks.py::test_a_mixed_order_resumes_at_any_sample"
# The blocks that are read in order, and the place in the epoch at which a run goes on.
_READ = 20_000


def ids(start: int, count: int) -> npt.NDArray[np.uint16]:
    """The tokens from a place on: any number can be told from its place, and no form can pack them."""
    return np.random.Philox(key=start).random_raw(count // 4).view(np.uint16)


def shards(tokens: int) -> Iterator[npt.NDArray[np.uint16]]:
    """Yields the tokens in the parts that become our shards."""
    for start in range(0, tokens, SHARD):
        yield ids(start, min(SHARD, tokens - start))


class Ours:
    """Arrow streams, mapped, in the order of ``TrainingOrder``; a run goes on at the number of its sample."""

    package = "pyarrow"

    def __init__(self, folder: Path, tokens: int) -> None:
        self.folder, self.tokens = folder, tokens

    def write(self) -> None:
        """Writes the shards."""
        from diffattn.data.token_files import write_shard

        for number, part in enumerate(shards(self.tokens)):
            write_shard(self.folder / f"train-{number:05}.arrow", part)

    def blocks(self, start: int = 0, state: Any = None) -> Iterator[Any]:
        """Yields the blocks of a run from a sample on."""
        from diffattn.data.blocks import TokenBlocks, TrainingOrder
        from diffattn.data.token_files import Tokens

        paths = sorted(self.folder.glob("*.arrow"))
        counts = [min(SHARD, self.tokens - SHARD * number) for number in range(len(paths))]
        blocks = TokenBlocks([Tokens(paths, counts)], context=CONTEXT, parts=["text"])
        order = TrainingOrder(blocks, seed=0, num_samples=len(blocks))
        for index in range(start, len(order)):
            yield order[index]["input_ids"]

    def state(self, count: int) -> Any:
        """What a run has to save to go on behind ``count`` samples."""
        return None

    def notices(self) -> bool:
        """Whether opening notices a bit that was flipped: the SHA-256 of a shard is compared."""
        from diffattn.files import file_facts

        path = min(self.folder.glob("*.arrow"))
        before = file_facts(path)
        _flip(path)
        return file_facts(path) != before


class LitData:
    """Chunks of LitData with its TokensLoader, shuffled by it; its loader's state says where a run goes on."""

    package = "litdata"

    def __init__(self, folder: Path, tokens: int) -> None:
        self.folder, self.tokens = folder, tokens

    def write(self) -> None:
        """Writes the chunks."""
        import torch
        from litdata.streaming.cache import Cache
        from litdata.streaming.item_loader import TokensLoader

        cache = Cache(str(self.folder), chunk_bytes=2 * SHARD, item_loader=TokensLoader(CONTEXT))
        index = 0
        for part in shards(self.tokens):
            for start in range(0, len(part), 1 << 20):
                cache[index] = torch.from_numpy(part[start : start + (1 << 20)])
                index += 1
        cache.done()
        cache.merge()

    def _loader(self) -> Any:
        import litdata
        from litdata.streaming.item_loader import TokensLoader

        data = litdata.StreamingDataset(
            str(self.folder), item_loader=TokensLoader(CONTEXT), shuffle=True, seed=0, drop_last=False
        )
        return litdata.StreamingDataLoader(data, batch_size=1, num_workers=0)

    def blocks(self, start: int = 0, state: Any = None) -> Iterator[Any]:
        """Yields the blocks of a run; from its beginning, or from a state on."""
        loader = self._loader()
        if state is not None:
            loader.load_state_dict(state)
        for block in loader:
            yield block[0]

    def state(self, count: int) -> Any:
        """What a run has to save to go on behind ``count`` samples."""
        loader = self._loader()
        for number, _ in enumerate(loader, 1):
            if number == count:
                return loader.state_dict()
        raise AssertionError

    def notices(self) -> bool:
        """Whether reading notices a bit that was flipped."""
        return _is_noticed(self.folder, "*.bin", self.blocks)


class Mds:
    """Shards of MosaicML's MDS, shuffled by it, with the hashes that it can keep; its state says where to go on."""

    package = "mosaicml-streaming"

    def __init__(self, folder: Path, tokens: int) -> None:
        self.folder, self.tokens = folder, tokens

    def write(self) -> None:
        """Writes the shards, a block a sample."""
        from streaming import MDSWriter

        columns = {"tokens": f"ndarray:uint16:{CONTEXT}"}
        with MDSWriter(out=str(self.folder), columns=columns, hashes=["sha1"], size_limit=2 * SHARD) as out:
            for part in shards(self.tokens):
                for start in range(0, len(part) // CONTEXT * CONTEXT, CONTEXT):
                    out.write({"tokens": part[start : start + CONTEXT]})

    def _data(self) -> Any:
        import streaming

        streaming.base.util.clean_stale_shared_memory()
        return streaming.StreamingDataset(
            local=str(self.folder), shuffle=True, shuffle_seed=0, batch_size=1, num_canonical_nodes=1,
            validate_hash="sha1",
        )  # fmt: skip

    def blocks(self, start: int = 0, state: Any = None) -> Iterator[Any]:
        """Yields the blocks of a run; from its beginning, or from a state on."""
        data = self._data()
        if state is not None:
            data.load_state_dict(state)
        for sample in data:
            yield sample["tokens"].astype(np.int64)

    def state(self, count: int) -> Any:
        """What a run has to save to go on behind ``count`` samples."""
        data = self._data()
        next(iter(data))
        return data.state_dict(count, from_beginning=True)

    def notices(self) -> bool:
        """Whether reading notices a bit that was flipped."""
        return _is_noticed(self.folder, "*.mds", self.blocks)


FORMS: dict[str, Callable[[Path, int], Ours | LitData | Mds]] = {"arrow": Ours, "litdata": LitData, "mds": Mds}


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def _is_noticed(folder: Path, pattern: str, blocks: Callable[[], Iterator[Any]]) -> bool:
    _flip(min(folder.glob(pattern)))
    try:
        for _ in blocks():
            pass
    except Exception:
        # Any error is a notice.
        return True
    return False


def child(name: str, folder: Path, tokens: int) -> dict[str, Any]:
    """Measures one form."""
    form = FORMS[name](folder, tokens)
    began = time.perf_counter()
    form.write()
    row: dict[str, Any] = {"write_seconds": round(time.perf_counter() - began, 1)}
    row["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    row["files"] = sum(path.is_file() for path in folder.rglob("*"))
    count = min(_READ, tokens // CONTEXT // 2)
    began = time.perf_counter()
    blocks = form.blocks()
    next(blocks)
    row["seconds_to_the_first_block"] = round(time.perf_counter() - began, 3)
    began = time.perf_counter()
    for _ in range(count - 1):
        next(blocks)
    row["blocks_per_second"] = round((count - 1) / (time.perf_counter() - began))
    expected = [np.asarray(next(blocks)) for _ in range(50)]
    state = form.state(count)
    row["state_to_save"] = state is not None
    began = time.perf_counter()
    resumed = form.blocks(count, state)
    found = [np.asarray(next(resumed))]
    row["seconds_to_go_on"] = round(time.perf_counter() - began, 3)
    found += [np.asarray(next(resumed)) for _ in range(49)]
    row["goes_on_exactly"] = all(map(np.array_equal, found, expected))
    row["notices_a_flipped_bit"] = form.notices()
    return row


def main() -> None:
    """Measures the forms that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=1e9, help="number of tokens")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=[*FORMS], help="the forms to measure")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/diffattn-formats"), help="a folder for all files")
    parser.add_argument("--out", type=Path, help="file for the rows")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tokens = int(arguments.tokens)
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.folder, tokens)))
        return
    write = Writer(arguments.out)
    for name in arguments.forms:
        folder = arguments.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = [sys.executable, "-m", "benchmarks.token_formats", "--child", name, "--folder", str(folder)]
        done = subprocess.run([*command, "--tokens", str(tokens)], stdout=subprocess.PIPE, text=True, check=True)
        row = {"benchmark": "token_formats", "form": name, "tokens": tokens, "context": CONTEXT, "gate": GATE}
        made_by = {"package": f"{FORMS[name].package} {version(FORMS[name].package)}"}  # type: ignore[attr-defined]
        write(row | provenance("benchmarks.token_formats") | made_by | json.loads(done.stdout.splitlines()[-1]))
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
