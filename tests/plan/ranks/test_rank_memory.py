"""The bytes of one rank, against sums by hand; tests/study holds them to measured steps."""

from dataclasses import replace
from typing import Any

import pytest

from diffattn.errors import ConfigError
from diffattn.plan.memory import training_memory
from diffattn.plan.ranks.groups import groups_of
from diffattn.plan.ranks.memory import rank_memory, rank_moments
from diffattn.plan.ranks.mesh import Mesh
from diffattn.plan.setting import Setting
from diffattn.plan.shape import ModelShape

# No number divides the vocabulary or the feed-forward width.
SHAPE = ModelShape(
    hidden_size=24, num_layers=3, num_heads=4, head_dim=6, intermediate_size=61, vocab_size=101,
    tie_word_embeddings=False,
)  # fmt: skip
# Rows that 4 ranks keep of 24, 61 and 101, and the rows of a layer in all: q, k, v, o; gate, up; down; two norms.
PART = 4 * 6 * 24 + 2 * 16 * 24 + 6 * 61 + 2 * 6


def setting(**changes: Any) -> Setting:
    return Setting(
        **{"context": 16, "batch": 4, "precision": "autocast", "machine": None, "backend": "standard"} | changes
    )


def test_each_tensor_is_cut_by_rows_and_filled_up() -> None:
    found = groups_of(SHAPE, "softmax", Mesh(1, 4, 1))
    assert found.layer.part == PART
    assert found.layer.own == 4 * 24 * 24 + 3 * 61 * 24 + 2 * 24
    assert found.layer.gathered == 4 * PART
    # Two embeddings and a norm.
    assert found.root.part == 2 * 26 * 24 + 6
    assert found.root.filled == 2 * 104 * 24
    assert groups_of(SHAPE, "diff_v1", Mesh(1, 4, 1)).exact.part == 4 * 2


def test_tensor_parallelism_cuts_heads_columns_and_symbols_before() -> None:
    found = groups_of(SHAPE, "softmax", Mesh(1, 1, 2))
    assert found.layer.own == 4 * 12 * 24 + 3 * 31 * 24 + 2 * 24
    assert found.root.own == 2 * 51 * 24 + 24
    # λ and the gain of V1's norm are whole on each rank.
    whole, halved = (groups_of(SHAPE, "diff_v1", Mesh(1, 1, tensor)) for tensor in (1, 2))
    assert whole.exact == halved.exact
    assert halved.layer.own - found.layer.own == 12


def test_under_fsdp2_a_rank_keeps_its_part_in_float32() -> None:
    found = rank_memory(SHAPE, "softmax", setting(ranks=4, shard="full"))
    part = 3 * PART + 2 * 26 * 24 + 6
    assert found.weights == 4 * part
    # Two moments, and the step's number of each of 3·9 + 3 tensors.
    assert found.optimizer == 8 * part + 4 * 30
    moments = rank_moments(SHAPE, "softmax", setting(ranks=4, shard="full"))
    assert moments["optimizer step"].gradients == 4 * part
    assert moments["optimizer step"].gathered == 0


def test_a_layer_is_gathered_while_another_is_at_work() -> None:
    moments = rank_moments(SHAPE, "softmax", setting(ranks=4, shard="full"))
    # In bfloat16: the layer at work and the one before it; the two embeddings and the last norm.
    root = 2 * 4 * (2 * 26 * 24 + 6)
    assert moments["layer 1, feed-forward"].gathered == root + 2 * 2 * 4 * PART
    assert moments["layer 0, feed-forward"].gathered == root + 2 * 4 * PART
    # The float32 buffer from which the layer behind was reduced.
    assert moments["layer 2, feed-forward"].buffers == 0
    assert moments["layer 1, feed-forward"].buffers == 4 * 4 * PART
    # gloo copies what it reduces, NCCL does not.
    gpu = rank_moments(SHAPE, "softmax", setting(ranks=4, shard="full", machine="H100 SXM"))
    assert moments["layer 1, reduced"].buffers == 2 * gpu["layer 1, reduced"].buffers == 2 * 4 * 4 * PART


def test_the_ranks_of_a_host_share_and_hosts_have_copies() -> None:
    host, whole = (
        rank_memory(SHAPE, "softmax", setting(batch=8, ranks=ranks, shard=shard, per_host=4))
        for ranks, shard in ((8, "hybrid"), (8, "full"))
    )
    assert host == rank_memory(SHAPE, "softmax", setting(ranks=4, shard="full"))
    assert host.weights > whole.weights


def test_under_ddp_a_rank_has_the_whole_model_and_buckets() -> None:
    ranks = rank_memory(SHAPE, "diff_v1", setting(ranks=2))
    alone = training_memory(SHAPE, "diff_v1", setting(batch=2))
    parameters = alone.weights // 4
    assert ranks.buffers == 4 * parameters
    assert ranks.total == alone.total + 4 * parameters
    assert rank_memory(SHAPE, "diff_v1", setting()).total == training_memory(SHAPE, "diff_v1", setting()).total


def test_checkpointing_and_a_smaller_share_take_less() -> None:
    base = setting(context=512, ranks=2, shard="full")
    whole = rank_memory(SHAPE, "diff_v2", base)
    assert rank_memory(SHAPE, "diff_v2", replace(base, checkpointing=True)).total < whole.total
    assert rank_memory(SHAPE, "diff_v2", replace(base, ranks=4)).total < whole.total
    assert rank_memory(SHAPE, "diff_v2", replace(base, ranks=4, tp=2)).activations < whole.activations


def test_ranks_that_part_a_pair_of_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tp=4 with 2 key/value heads.*use one of 1, 2"):
        rank_memory(SHAPE, "diff_v1", setting(tp=4))
    with pytest.raises(ConfigError, match="floating-point weights"):
        rank_memory(
            SHAPE,
            "softmax",
            setting(ranks=2, shard="full", precision=replace(setting().precision, weights="int4", master=None)),
        )
