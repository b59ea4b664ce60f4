"""An estimate's numbers, by hand: a shape whose dimensions are different numbers, and a machine of round rates."""

import json
from typing import Any

import pytest

from diffattn.errors import ConfigError
from diffattn.plan.cost import decoding_flops_per_token, flops_per_token
from diffattn.plan.estimate import Estimate, TokenFlops, estimate
from diffattn.plan.hardware import Machine
from diffattn.plan.memory import decoding_memory, prefill_memory, training_memory
from diffattn.plan.setting import Precision, Setting
from diffattn.plan.shape import ModelShape
from diffattn.variants import VARIANTS

D, L, n, G, d, F, V = 22, 3, 8, 4, 10, 35, 47
SHAPE = ModelShape(
    hidden_size=D, num_layers=L, num_heads=n, num_kv_heads=G, head_dim=d, intermediate_size=F, vocab_size=V
)
UNTIED = ModelShape(
    hidden_size=D, num_layers=L, num_heads=n, num_kv_heads=G, head_dim=d, intermediate_size=F, vocab_size=V,
    tie_word_embeddings=False,
)  # fmt: skip
B, T = 5, 13
MACHINE = Machine("toy", {"fp32": 1e6, "bf16": 2e6}, bandwidth=1e6, disk=1e5)
MATRICES = {
    "softmax": L * (2 * n * d * D + 2 * G * d * D + 3 * D * F),
    "diff_v1": L * (2 * n * d * D + 2 * G * d * D + 3 * D * F),
    "diff_v2": L * (3 * n * d * D + 2 * G * d * D + D * n + 3 * D * F),
    # r = n / G = 2: V1's n / 2 signal heads and n / 4 noise heads, V2's n and n / 2.
    "diff_gda": L * (7 * n * d * D // 4 + 2 * G * d * D + 3 * D * F),
    "diff_gda_v2": L * (5 * n * d * D // 2 + 2 * G * d * D + D * n + 3 * D * F),
    "gated": L * (3 * n * d * D + 2 * G * d * D + 3 * D * F),
}
# FLOPs per query and key, of one layer, with every map computed once: n maps and n products of width d, V2 with 2n.
PER_PAIR = {
    "softmax": 4 * n * d,
    "diff_v1": 4 * n * d,
    "diff_v2": 6 * n * d,
    "diff_gda": 7 * n * d // 2,
    "diff_gda_v2": 5 * n * d,
    "gated": 4 * n * d,
}


def found(attention: str, shape: ModelShape = SHAPE, **changes: Any) -> Estimate:
    setting = {"context": T, "batch": B, "precision": "fp32", "backend": "fused_cpu", "machine": MACHINE}
    return estimate(shape, attention, Setting(**(setting | changes)))


@pytest.mark.parametrize("attention", VARIANTS)
def test_decoding_reads_weights_and_cache_for_one_query(attention: str) -> None:
    result = found(attention)
    decoding, total = result.decoding, result.parameters.total
    flops = 2 * (MATRICES[attention] + V * D) + PER_PAIR[attention] * L * (T + 1)
    assert decoding.flops_per_token == TokenFlops(flops, flops)
    cache = 2 * G * d * L * B * T * 4
    assert decoding.memory.cache == cache
    assert result.cache_bytes_per_token == 2 * G * d * L * 4
    moved = 4 * total + cache
    assert decoding.bytes_moved == moved
    assert decoding.intensity == B * flops / moved
    assert decoding.seconds == max(B * flops / 1e6, moved / 1e6)
    assert decoding.tokens_per_second == B / decoding.seconds


@pytest.mark.parametrize("attention", VARIANTS)
def test_prefill_makes_one_row_of_logits_per_sequence(attention: str) -> None:
    prefill = found(attention).prefill
    # A causal map has T(T + 1)/2 pairs.
    flops = B * T * 2 * MATRICES[attention] + B * 2 * V * D + B * L * PER_PAIR[attention] * T * (T + 1) // 2
    assert prefill.flops == flops
    assert prefill.flops_per_token.executed == flops / (B * T)


@pytest.mark.parametrize("attention", VARIANTS)
def test_training_flops_and_what_checkpointing_adds(attention: str) -> None:
    plain, again = found(attention).training, found(attention, checkpointing=True).training
    by_cost = flops_per_token(SHAPE, attention, context=T, backend="fused_cpu")
    assert plain.flops_per_token == TokenFlops(by_cost.model, by_cost.executed)
    assert plain.flops == by_cost.executed * B * T
    layers = 2 * MATRICES[attention] + L * PER_PAIR[attention] * (T + 1) // 2
    assert again.flops_per_token.executed - by_cost.executed == layers
    assert again.flops_per_token.model == by_cost.model
    assert again.memory.total == plain.peak_with_checkpointing == again.peak_with_checkpointing
    assert plain.memory.total == plain.peak_without_checkpointing == again.peak_without_checkpointing


def test_materialised_maps_are_kept_and_not_computed_again() -> None:
    for attention in VARIANTS:
        per_token = flops_per_token(SHAPE, attention, context=T, backend="materialised")
        assert per_token.executed == per_token.model
        assert decoding_flops_per_token(SHAPE, attention, context=T, backend="materialised").executed == (
            2 * (MATRICES[attention] + V * D) + L * PER_PAIR[attention] * T
        )
    # One float32 map of T × T per query head of the one call: V1 has n of them, V2 2n.
    sizes = {name: found(name, backend="materialised").score_bytes for name in VARIANTS}
    one = 4 * L * B * T * T
    assert sizes == {
        "softmax": n * one,
        "diff_v1": n * one,
        "diff_v2": 2 * n * one,
        "diff_gda": 3 * n * one // 4,
        "diff_gda_v2": 3 * n * one // 2,
        "gated": n * one,
    }
    assert found("diff_v2", backend="materialised", checkpointing=True).score_bytes == 2 * n * one // L
    assert [found(name).score_bytes for name in VARIANTS] == [0] * 6


def test_calls_that_read_the_cache_more_often_say_so() -> None:
    moved = {
        backend: found("diff_v1", backend=backend).decoding.bytes_moved
        for backend in ("standard", "two_calls", "four_calls")
    }
    half = G * d * L * B * T * 4
    assert (moved["two_calls"] - moved["standard"], moved["four_calls"] - moved["standard"]) == (half, 2 * half)
    assert len({found("softmax", backend=name).decoding.bytes_moved for name in moved}) == 1


def test_memory_is_that_of_the_memory_module() -> None:
    setting = Setting(batch=B, context=T)
    for attention in VARIANTS:
        result = estimate(SHAPE, attention, setting)
        assert result.training.memory == training_memory(SHAPE, attention, setting)
        assert result.prefill.memory == prefill_memory(SHAPE, attention, setting)
        assert result.decoding.memory == decoding_memory(SHAPE, attention, setting)


def test_disk_and_first_token() -> None:
    result = found("softmax", precision="bf16")
    total = result.parameters.total
    assert {name: of.bytes for name, of in result.disk.items()} == {
        "fp32": 4 * total, "bf16": 2 * total, "int8": total, "int4": -(-total // 2)
    }  # fmt: skip
    assert result.disk["int8"].read_seconds == total / 1e5
    assert result.read_seconds == 2 * total / 1e5
    assert result.first_token_seconds == 2 * total / 1e5 + result.prefill.seconds


def test_an_untied_embedding_is_looked_up_and_not_read() -> None:
    tied, untied = found("softmax"), found("softmax", UNTIED)
    assert untied.parameters.total - tied.parameters.total == V * D
    assert untied.decoding.bytes_moved == tied.decoding.bytes_moved


def test_without_a_machine_there_are_bytes_and_no_times() -> None:
    result = found("diff_v2", machine=None)
    assert result.training.seconds is result.decoding.tokens_per_second is None
    assert result.read_seconds is result.first_token_seconds is None
    assert result.decoding.bytes_moved > 0
    assert found("diff_v2", machine=Machine("half", None, disk=1e5)).first_token_seconds is None
    json.dumps(result.to_json(), allow_nan=False)


def test_integers_are_not_trained() -> None:
    result = found("diff_v1", precision=Precision("int4", "bf16", "bf16", "bf16", "int8"))
    assert result.training is result.rank.training is None
    assert result.cache_bytes_per_token == 2 * G * d * L


def test_inference_is_shared_by_the_ranks_of_a_layer() -> None:
    result = found("softmax", batch=2, ranks=8, shard="full", tp=4)
    assert result.rank.decoding.cache == -(-result.decoding.memory.cache // 4)
    assert (result.rank.ranks, result.rank.shard, result.rank.tp, result.rank.batch) == (8, 2, 4, 1)
    alone = found("softmax").rank
    assert alone.training.total == found("softmax").training.memory.total
    assert alone.prefill.total == found("softmax").prefill.memory.total
    json.dumps(result.to_json(), allow_nan=False)


def test_a_pair_stays_on_one_rank() -> None:
    found("softmax", tp=4)
    found("diff_v2", tp=4)
    with pytest.raises(ConfigError, match=r"tp=4 with 2 key/value heads.*use one of 1, 2"):
        found("diff_v1", tp=4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": 0}, "context=0"),
        ({"batch": True}, "batch=True"),
        ({"ranks": 0}, "ranks=0"),
        ({"tp": 3}, "tp=3"),
        ({"precision": "fp8"}, "wanted one of float32, autocast, bfloat16, mixed"),
        ({"backend": "flash"}, "backend='flash'"),
    ],
)
def test_bad_input_is_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        found("diff_v1", **changes)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="diff_v3"):
        found("diff_v3")
