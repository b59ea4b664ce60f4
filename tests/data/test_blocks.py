"""Blocks of several sources, and orders of very many blocks."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from diffattn.data import blocks as blocks_module
from diffattn.data.blocks import TokenBlocks, TrainingOrder
from diffattn.data.packing import prepare_data
from diffattn.data.token_files import Tokens, write_shard

COUNTS = (40, 7, 13)


@pytest.fixture
def mixed(tmp_path: Path) -> TokenBlocks:
    """Three sources of 40, 7 and 13 blocks of 5 tokens and a ragged end, whose tokens say where they are from."""
    sources = []
    for source, count in enumerate(COUNTS):
        write_shard(tmp_path / f"{source}.arrow", (1000 * source + np.arange(5 * count + 3)).astype(np.uint16))
        sources.append(Tokens([tmp_path / f"{source}.arrow"], [5 * count + 3]))
    return TokenBlocks(sources, context=5, parts=["a", "b", "c"], weights=(1, 3, 6))


def test_blocks_of_several_sources_hold_no_ragged_end(mixed: TokenBlocks) -> None:
    assert len(mixed) == 60
    starts = [int(block[0]) for block in mixed]
    expected = [1000 * source + 5 * index for source, count in enumerate(COUNTS) for index in range(count)]
    assert starts == expected
    assert len(mixed.tokens) == sum(5 * count + 3 for count in COUNTS)
    assert mixed.tokens[198:208].tolist() == [198, 199, 200, 201, 202, 1000, 1001, 1002, 1003, 1004]


def test_sources_come_by_weight_and_each_gives_all_its_blocks_once_an_epoch(mixed: TokenBlocks) -> None:
    order = TrainingOrder(mixed, seed=3, num_samples=40_000)
    found = np.array([order.block_index(index) for index in range(40_000)])
    source = np.searchsorted(np.cumsum(COUNTS), found, side="right")
    # Four standard deviations of a drawn share are 0.01.
    assert np.bincount(source) / 40_000 == pytest.approx([0.1, 0.3, 0.6], abs=0.01)
    for number, count in enumerate(COUNTS):
        mine = found[source == number] - sum(COUNTS[:number])
        epochs = mine[: len(mine) // count * count].reshape(-1, count)
        assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(count), (len(epochs), 1)))
        assert len({tuple(epoch) for epoch in epochs[:5]}) == 5
    assert found[:99].tolist() != [TrainingOrder(mixed, seed=4, num_samples=99).block_index(i) for i in range(99)]


def test_a_mixed_order_resumes_at_any_sample(mixed: TokenBlocks, monkeypatch) -> None:
    monkeypatch.setattr(blocks_module, "_DRAWN", 64)
    undisturbed = TrainingOrder(mixed, seed=3, num_samples=400)
    whole = [undisturbed.block_index(index) for index in range(400)]
    for start in (1, 63, 64, 65, 399):
        order = pickle.loads(pickle.dumps(TrainingOrder(mixed, seed=3, num_samples=400)))
        assert [order.block_index(index) for index in range(start, 400)] == whole[start:]


@pytest.mark.parametrize("count", [1, 2, 3, 64, 65, 1009])
def test_an_order_of_very_many_blocks_is_a_permutation_too(count: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(blocks_module, "_SORTED", 0)
    write_shard(tmp_path / "a.arrow", np.zeros(2 * count, np.uint16))
    blocks = TokenBlocks([Tokens([tmp_path / "a.arrow"], [2 * count])], context=2, parts=["a"])
    order = TrainingOrder(blocks, seed=3, num_samples=3 * count)
    epochs = [[order.block_index(epoch * count + index) for index in range(count)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 9:
        assert len({tuple(epoch) for epoch in epochs}) == 3
        # Neighbours in the order are no neighbours in the text: as far from each other as two random ones.
        distance = np.abs(np.diff(epochs[0])).mean() / count
        assert distance == pytest.approx(1 / 3, abs=0.1)


def test_a_hundred_million_blocks_need_no_memory_and_no_time() -> None:
    epochs = blocks_module._Epochs(10**8, 3, 0)
    found = [epochs.block(index) for index in range(2000)]
    assert len(set(found)) == 2000
    assert np.mean(found) / 10**8 == pytest.approx(0.5, abs=0.03)


def test_weights_are_those_of_the_sources(tmp_path: Path) -> None:
    for name, word in (("a.txt", "people"), ("b.txt", "states")):
        (tmp_path / name).write_text("\n\f\n".join(f"{word} {number}: {word * 9}." for number in range(60)))
    both = [f"{tmp_path / 'a.txt'}:3", f"{tmp_path / 'b.txt'}:1"]
    data = prepare_data(both, vocab_size=300, context=8, cache_dir=tmp_path / "cache")
    assert data.facts["weights"] == [3, 1]
    assert data.facts["documents"]["train"] + data.facts["documents"]["validation"] == 120
    order = data.order(seed=0, num_samples=2000, batch_size=1)
    people = sum(order.block_index(index) < data.train.counts[0] for index in range(2000))
    assert people / 2000 == pytest.approx(0.75, abs=0.04)
    assert "states" not in data.tokenizer.decode(data.train.sources[0][:].tolist())
    # The held-out part is that of both, one after the other.
    held_out = data.tokenizer.decode(data.validation.tokens[:].tolist())
    assert "people" in held_out
    assert "states" in held_out
    one = prepare_data(tmp_path / "a.txt", vocab_size=300, context=8, cache_dir=tmp_path / "cache")
    assert "weights" not in one.facts
    assert data.facts["digest"] != one.facts["digest"]
