"""Token files of a text of any size: made by processes, kept through a kill, and mended where they are damaged."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from diffattn.data import encoding, packing, token_files
from diffattn.data.blocks import TrainingOrder
from diffattn.data.packing import prepare_data
from diffattn.data.text import Corpus, Document
from diffattn.errors import DataError, TrainingError

OPTIONS = {"vocab_size": 307, "context": 16}
WORDS = ["people", "naïve", "漢字", "the", "of", "law.", "\n\n", "\n", "🦁"]


def texts(count: int = 41, seed: int = 3) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(11, 470))) for _ in range(count)]


def sha(ids) -> str:
    return hashlib.sha256(np.asarray(np.asarray(ids), "<u4").tobytes()).hexdigest()[:16]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards and units are a thousandth of what they are."""
    for module, name, size in (
        (token_files, "_SHARD", 3000),
        (encoding, "UNIT", 1000),
        (encoding, "CUT", 100),
    ):
        monkeypatch.setattr(module, name, size)


@pytest.fixture
def in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little text is work for two processes, too."""
    monkeypatch.setattr(token_files, "_ALONE", 0)
    monkeypatch.setattr(token_files, "cores", lambda: 2)


ONE = [" ".join(texts())]
EQUAL = [texts(1)[0] + "\nline " * 50] * 3


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        (texts(), ("dcec2b90c3989f9a", "ea4e53205c77b426", "1ddb6ec106b3b487", "3777cf1df3107457")),
        (ONE, ("68420d630a9e1b6f", "1b85b183f5a6df3c", "b57525105b14cfa8", "ec7a3618af3cc9ad")),
    ],
    ids=["many documents", "one document"],
)
def test_the_tokens_and_their_order_are_those_of_earlier_versions(documents, expected, small, tmp_path: Path) -> None:
    """Recorded when a text was still prepared in memory, in one file."""
    names = ["one"] if documents is ONE else map(str, range(len(documents)))
    corpus = Corpus.of("c", map(Document, names, documents))
    data = prepare_data(corpus, cache_dir=tmp_path, **OPTIONS)
    order = TrainingOrder(data.train, seed=3, num_samples=2 * len(data.train))
    indices = [order.block_index(i) for i in range(len(order))]
    found = sha(data.train.tokens), sha(data.validation.tokens), data.facts["digest"][:16], sha(indices)
    assert found == expected
    assert len(data.train.tokens.paths) > 3


def test_processes_make_the_same_tokens_in_the_same_order(small, in_processes, tmp_path: Path) -> None:
    corpus = Corpus.of("c", [Document(str(i), text) for i, text in enumerate(texts())])
    data = prepare_data(corpus, cache_dir=tmp_path, **OPTIONS)
    assert (sha(data.train.tokens), sha(data.validation.tokens)) == ("dcec2b90c3989f9a", "ea4e53205c77b426")


def test_a_process_that_the_system_ends_is_one_line(small, in_processes, tmp_path: Path, monkeypatch) -> None:
    started = token_files._Worker.__init__

    def short_lived(worker, encoder) -> None:
        started(worker, encoder)
        worker._process.kill()

    monkeypatch.setattr(token_files._Worker, "__init__", short_lived)
    corpus = Corpus.of("c", [Document(str(i), text) for i, text in enumerate(texts())])
    with pytest.raises(TrainingError, match="ended by the system") as raised:
        prepare_data(corpus, cache_dir=tmp_path, **OPTIONS)
    assert "\n" not in str(raised.value)


_CHILD = """
import os, signal, sys
from pathlib import Path
from diffattn.data import encoding, token_files
from diffattn.data.packing import prepare_data
token_files._SHARD, encoding.UNIT, encoding.CUT = 3000, 1000, 100
append, left = token_files.append_row, [int(sys.argv[3])]
def dying(*args):
    append(*args)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
token_files.append_row = dying
prepare_data(sys.argv[1], cache_dir=sys.argv[2], vocab_size=307, context=16)
"""


@pytest.mark.parametrize("one", [False, True], ids=["many documents", "one document"])
def test_what_was_finished_before_a_kill_is_kept(one: bool, small, tmp_path: Path, monkeypatch) -> None:
    source, cache = tmp_path / "text.txt", tmp_path / "cache"
    source.write_text(ONE[0] if one else "\n\f\n".join(texts()))
    whole = prepare_data(source, cache_dir=tmp_path / "undisturbed", **OPTIONS)
    child = subprocess.run([sys.executable, "-c", _CHILD, str(source), str(cache), "3"], check=False)
    assert child.returncode == -signal.SIGKILL
    kept = {path.name: path.stat().st_ino for path in cache.rglob("*.arrow")}
    assert len(kept) == 3
    data = prepare_data(source, cache_dir=cache, **OPTIONS)
    now = {path.name: path.stat().st_ino for path in data.train.folder.glob("*.arrow")}
    assert kept.items() < now.items()
    assert np.array_equal(data.train.tokens, whole.train.tokens)
    assert np.array_equal(data.validation.tokens, whole.validation.tokens)


def test_what_reading_a_large_text_found_is_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(packing, "KEPT_BYTES", 1)
    source, cache, notes = tmp_path / "text.txt", tmp_path / "cache", []
    source.write_text("\n\f\n".join(texts()))
    first = prepare_data(source, cache_dir=cache, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(packing.Survey, "make", lambda *args: pytest.fail("read again"))
        assert prepare_data(source, cache_dir=cache, **OPTIONS).facts == first.facts
    source.write_text("\n\f\n".join(texts(seed=4)))
    assert prepare_data(source, cache_dir=cache, on_note=notes.append, **OPTIONS).facts != first.facts


def test_a_flipped_bit_is_named_and_only_its_shard_is_made_again(small, tmp_path: Path, monkeypatch) -> None:
    corpus = Corpus.of("c", [Document("one", ONE[0])])
    data = prepare_data(corpus, cache_dir=tmp_path, **OPTIONS)
    tokens = data.train.tokens[:].tolist()
    files = {path: path.stat().st_ino for path in data.train.folder.iterdir()}
    # A shard in the middle of the document, of which the beginning and the end are elsewhere.
    damaged = data.train.tokens.paths[2]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.with_suffix(".bad").write_bytes(content)
    damaged.with_suffix(".bad").rename(damaged)
    notes: list[str] = []
    again = prepare_data(corpus, cache_dir=tmp_path, on_note=notes.append, **OPTIONS)
    assert notes == [f"{damaged} is damaged: its content is not what was written; it is made anew"]
    assert again.train.tokens[:].tolist() == tokens
    assert [path for path, inode in files.items() if path.stat().st_ino != inode] == [damaged]


def test_shards_that_come_out_otherwise_are_all_made_again(small, tmp_path: Path, monkeypatch) -> None:
    corpus = Corpus.of("c", [Document("one", ONE[0])])
    data = prepare_data(corpus, cache_dir=tmp_path, **OPTIONS)
    tokens = data.train.tokens[:].tolist()
    manifest = data.train.folder / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["seal"]
    content["shards"]["train"][1]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    notes: list[str] = []
    again = prepare_data(corpus, cache_dir=tmp_path, on_note=notes.append, **OPTIONS)
    assert ["damaged" in notes[0], "all of them are made anew" in notes[1]] == [True, True]
    assert again.train.tokens[:].tolist() == tokens


def test_a_text_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch) -> None:
    source = tmp_path / "text.txt"
    source.write_text("\n\f\n".join(texts()))
    write = packing.write_shards

    def changed(*args):
        source.write_text("\n\f\n".join(texts(seed=4)))
        return write(*args)

    monkeypatch.setattr(packing, "write_shards", changed)
    with pytest.raises(DataError, match="the text changed while it was prepared"):
        prepare_data(source, cache_dir=tmp_path / "cache", **OPTIONS)


def test_the_files_are_read_by_others(small, tmp_path: Path) -> None:
    import datasets

    data = prepare_data(Corpus.of("c", [Document("one", ONE[0])]), cache_dir=tmp_path, **OPTIONS)
    opened = datasets.Dataset.from_file(str(data.train.tokens.paths[1]))
    first = len(datasets.Dataset.from_file(str(data.train.tokens.paths[0])))
    assert opened[:20]["tokens"] == data.train.tokens[first : first + 20].tolist()


def test_a_very_long_text_trains_its_tokenizer_on_a_sample(tmp_path: Path, monkeypatch) -> None:
    documents = [Document(str(i), text) for i, text in enumerate(texts(count=200))]
    notes: list[str] = []
    monkeypatch.setattr(packing, "SAMPLE", 40_000)
    seen: list[str] = []
    train = packing.train_tokenizer

    def counted(parts, size):
        seen.extend(parts)
        return train(seen, size)

    monkeypatch.setattr(packing, "train_tokenizer", counted)
    data = prepare_data(Corpus.of("c", documents), cache_dir=tmp_path / "a", on_note=notes.append, **OPTIONS)
    assert "trained on about" in notes[0]
    assert 20_000 < sum(map(len, seen)) < 60_000
    # The choice does not depend on the order of the documents.
    first = sorted(seen)
    seen.clear()
    other = prepare_data(Corpus.of("c", documents[::-1]), cache_dir=tmp_path / "b", **OPTIONS)
    assert sorted(seen) == first
    assert other.tokenizer.get_vocab() == data.tokenizer.get_vocab()


def test_a_killed_process_leaves_no_other_behind(tmp_path: Path) -> None:
    """Those that encode end with the one that they encode for, however it ends."""
    code = (
        "import os, sys; from diffattn.data import token_files; from diffattn.data.tokenizer import train_tokenizer\n"
        "from diffattn.data.encoding import DocumentParts\n"
        "worker = token_files._Worker(DocumentParts(train_tokenizer([], 257)).encoder())\n"
        "worker.encode(['some text']); print(worker._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    worker, began = int(process.stdout), time.monotonic()
    while _lives(worker):
        assert time.monotonic() - began < 30
        time.sleep(0.05)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
        return "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2]
    except (ProcessLookupError, FileNotFoundError):
        return False
