import pytest
import torch
from support.small_models import SHAPE, assert_same_logits, small_model, tokens
from transformers import DynamicCache, StaticCache

from diffattn.model.configuration import DiffTransformerConfig
from diffattn.plan.cost import cache_bytes_per_token
from diffattn.variants import VARIANTS

LENGTH = 13
MAX_LENGTH = 17
PADDING = (0, 3, 7)


def new_cache(kind: str, config: DiffTransformerConfig):
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=MAX_LENGTH)


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)


def left_padded(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row without its first tokens, with 0 in their place; and the mask that says so."""
    mask = torch.ones_like(ids)
    for row, padding in enumerate(PADDING):
        mask[row, :padding] = 0
    return ids * mask, mask


@pytest.mark.parametrize("chunks", [(1,) * LENGTH, (5, 1, 4, 3)], ids=["token by token", "in chunks"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("attention", VARIANTS)
@torch.no_grad()
def test_cached_decoding_gives_the_full_forwards_logits(attention, implementation, kind, chunks):
    model, ids = small_model(attention, attn_implementation=implementation), tokens(2, LENGTH)
    full = model(ids, use_cache=False).logits
    cache = new_cache(kind, model.config)
    pieces = [model(chunk, past_key_values=cache).logits for chunk in ids.split(chunks, dim=1)]
    assert cache.get_seq_length() == LENGTH
    assert_same_logits(torch.cat(pieces, dim=1), full)
    # The comparison is one: without its context the last chunk is far off.
    assert (model(ids[:, -chunks[-1] :]).logits[:, -1] - full[:, -1]).abs().max() > 0.1


@pytest.mark.parametrize("attention", VARIANTS)
@torch.no_grad()
def test_cache_holds_as_many_bytes_as_planned(attention):
    model = small_model(attention)
    cache = model(tokens(1, LENGTH), use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert held == LENGTH * 2 * SHAPE.num_kv_heads * SHAPE.head_dim * SHAPE.num_layers * 4
    assert held == LENGTH * cache_bytes_per_token(SHAPE, attention, bytes_per_value=4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("attention", VARIANTS)
def test_left_padded_rows_equal_single_rows(attention, implementation):
    model, ids = small_model(attention, attn_implementation=implementation), tokens(3, LENGTH)
    padded, mask = left_padded(ids)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    # Rotary positions are relative, so that the mask alone is enough.
    for given in ({}, {"position_ids": positions}):
        logits = model(padded, attention_mask=mask, **given).logits
        assert torch.isfinite(logits).all()
        for row, padding in enumerate(PADDING):
            assert_same_logits(logits[row, padding:], model(ids[row : row + 1, padding:]).logits[0])
    unmasked = model(padded).logits
    assert (unmasked[-1, -1] - logits[-1, -1]).abs().max() > 0.1
    logits.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("attention", VARIANTS)
@torch.no_grad()
def test_left_padded_rows_continue_like_single_rows_from_a_cache(attention, kind):
    model, ids = small_model(attention), tokens(3, LENGTH)
    padded, mask = left_padded(ids)
    cache = new_cache(kind, model.config)
    model(padded[:, :-2], attention_mask=mask[:, :-2], past_key_values=cache)
    last = model(padded[:, -2:], attention_mask=mask, past_key_values=cache).logits
    for row, padding in enumerate(PADDING):
        assert_same_logits(last[row], model(ids[row : row + 1, padding:]).logits[0, -2:])


@pytest.mark.parametrize("attention", VARIANTS)
def test_generation_is_the_same_with_every_cache_and_without(attention):
    model, ids = small_model(attention), tokens(2, 5)
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, ids, cache_implementation="dynamic"), expected)
    assert torch.equal(generate(model, ids, cache_implementation="static", disable_compile=True), expected)
    assert torch.equal(generate(model, ids, use_cache=False), expected)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("attention", VARIANTS)
def test_left_padded_rows_generate_what_single_rows_generate(attention, kind):
    model, ids = small_model(attention), tokens(3, LENGTH)
    padded, mask = left_padded(ids)
    options = {"cache_implementation": kind, "disable_compile": True}
    together = generate(model, padded, attention_mask=mask, **options)
    for row, padding in enumerate(PADDING):
        alone = generate(model, ids[row : row + 1, padding:], **options)
        assert torch.equal(together[row, LENGTH:], alone[0, LENGTH - padding :])


@pytest.mark.parametrize("attention", VARIANTS)
def test_beam_search_finds_a_text_at_least_as_likely_as_the_greedy_one(attention):
    model, ids = small_model(attention), tokens(2, 5)

    def log_likelihood(texts: torch.Tensor) -> torch.Tensor:
        log_p = model(texts).logits[:, 4:-1].log_softmax(-1)
        return log_p.gather(-1, texts[:, 5:, None]).sum((1, 2))

    greedy, beam = generate(model, ids), generate(model, ids, num_beams=4)
    assert beam.shape == greedy.shape == (2, 11)
    assert (log_likelihood(beam) >= log_likelihood(greedy) - 1e-4).all()


def test_a_cache_is_taken_under_the_name_of_a_newer_transformers():
    model = small_model("diff_v1")
    ids = torch.tensor([[3, 1, 2, 4]])
    whole = model(ids).logits
    cache = DynamicCache(config=model.config)
    model(ids[:, :3], cache=cache)
    assert cache.get_seq_length() == 3
    torch.testing.assert_close(model(ids[:, 3:], cache=cache).logits, whole[:, 3:])
