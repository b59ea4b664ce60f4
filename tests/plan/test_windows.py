"""Layers that see a window of tokens: FLOPs and cache beside a plain count, and beside the caches of transformers."""

import dataclasses

import pytest
import torch
from transformers import DynamicCache, MistralConfig

from diffattn.plan.cost import decoding_flops_per_token, flops_per_token
from diffattn.plan.estimate import estimate
from diffattn.plan.setting import Setting
from diffattn.plan.shape import BuiltShape, ModelShape

SHAPE = ModelShape(
    hidden_size=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=10, intermediate_size=40, vocab_size=50
)
ATTENTIONS = ("softmax", "diff_v1", "diff_v2")


def windowed(layers: int, width: int) -> BuiltShape:
    return BuiltShape(**vars(SHAPE), window=(layers, width))


@pytest.mark.parametrize("context", [1, 4, 5, 6, 17])
@pytest.mark.parametrize(("layers", "width"), [(1, 5), (3, 1), (2, 100)])
def test_pairs_and_keys_are_those_that_are_seen(layers: int, width: int, context: int) -> None:
    shape = windowed(layers, width)
    seen = [(3 - layers) * token + layers * min(token, width) for token in range(1, context + 1)]
    assert shape.pairs_seen(context) == 2 * sum(seen)
    assert shape.keys_seen(context) == seen[-1]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_flops_follow_the_pairs(attention: str) -> None:
    """What is left of a forward pass without its products with parameters is as much smaller as the pairs are fewer."""
    whole, near = (
        [flops_per_token(shape, attention, context=context, phase="forward").executed for context in (1, 99)]
        for shape in (SHAPE, windowed(3, 1))
    )
    # With a window of one token each token is a sequence of its own.
    assert near[0] == near[1] == whole[0] < whole[1]
    assert decoding_flops_per_token(windowed(3, 7), attention, context=99) == decoding_flops_per_token(
        SHAPE, attention, context=7
    )


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_window_as_wide_as_the_context_changes_no_flops(attention: str) -> None:
    for context in (1, 7, 64):
        for found, expected in (
            (flops_per_token(shape, attention, context=context), flops_per_token(SHAPE, attention, context=context))
            for shape in (windowed(3, context), windowed(2, context + 1))
        ):
            assert found == expected


@pytest.mark.parametrize("length", [3, 9, 30])
def test_the_cache_of_decoding_is_as_large_as_that_of_transformers(length: int) -> None:
    config = MistralConfig(num_hidden_layers=3, sliding_window=8)
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    cache = DynamicCache(config=config)
    for layer in range(3):
        for tokens in (length - 1, 1):
            # The new token comes as its own step, so that what the window lets go is no view of the prompt any more.
            cache.update(torch.zeros(2, 2, tokens, 10), torch.zeros(2, 2, tokens, 10), layer)
    held = sum(each.keys.numel() + each.values.numel() for each in cache.layers)
    setting = Setting(context=length, batch=2, precision="bf16", machine=None)
    found = estimate(windowed(2, 8), "softmax", setting)
    assert found.decoding.memory.cache == 2 * held
    assert found.cache_bytes_per_token == 2 * held // (2 * length)
    # While the prompt is read, all of it is there.
    whole = estimate(SHAPE, "softmax", setting)
    assert found.prefill.memory == whole.prefill.memory
    assert found.training == dataclasses.replace(
        whole.training, **{key: getattr(found.training, key) for key in ("flops", "flops_per_token")}
    )  # what training keeps does not depend on what a token sees
