"""Layers that see a window, and layers that turn no positions: under every cache and implementation as stated."""

import dataclasses

import pytest
import torch
from support.fused_cases import needs_the_kernel
from support.kernel_calls import recorded_calls
from support.packed_cases import IMPLEMENTATIONS, PADDED, WHOLE, positions_of, real_of, spans
from support.small_models import SHAPE, assert_same_logits, small_model, tokens
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    QuantizedCache,
    Qwen2Config,
    Qwen2ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StaticCache,
)

from diffattn.errors import ConfigError
from diffattn.layer_kinds import FULL, SLIDING
from diffattn.model.configuration import DiffTransformerConfig
from diffattn.model.fused import DIFF_FUSED, diff_fused_mask
from diffattn.model.masks.pattern import Pattern
from diffattn.probes.lens import attention_maps

LENGTH = 21
WINDOW = 5
# The middle layer sees the whole text, and the last one turns no positions.
MIXED = {"sliding_window": WINDOW, "layer_types": [SLIDING, FULL, SLIDING], "unrotated_layers": [2]}
ALL = {"sliding_window": WINDOW}
GENERATING = ["softmax", "diff_v1", "diff_v2", "diff_gda"]


def windowed(attention: str, implementation: str | None = None, fields: dict = MIXED, **config):
    # Logits small enough to be compared where the layers add up their rounding.
    model = small_model(attention, **{"initializer_range": 0.12} | fields | config)
    if implementation:
        model.set_attn_implementation(implementation)
    return model


def stated(model, ids: Tensor, real: Tensor | None = None) -> Tensor:
    """The logits of one row by masks of four dimensions that are written down here, one for each layer."""
    T = ids.shape[1]
    t, s = torch.arange(T)[:, None], torch.arange(T)[None]
    seen = s <= t if real is None else (s <= t) & real
    masks = {FULL: seen[None, None], SLIDING: (seen & (t - s < WINDOW))[None, None]}
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    logits = model(ids, attention_mask=masks, use_cache=False).logits
    model.set_attn_implementation(before)
    return logits


def caches(model):
    return {
        "none": None,
        "dynamic": DynamicCache(config=model.config),
        "without a configuration": DynamicCache(),
        "static": StaticCache(config=model.config, max_cache_len=LENGTH + 4),
    }


@pytest.mark.parametrize("fields", [MIXED, ALL], ids=["mixed", "all"])
@pytest.mark.parametrize(("attention", "implementation"), IMPLEMENTATIONS)
@torch.no_grad()
def test_logits_are_those_of_masks_that_are_written_down(attention, implementation, fields):
    model, ids = windowed(attention, implementation, fields), tokens(2, LENGTH)
    wanted = stated(model, ids)
    assert_same_logits(model(ids).logits, wanted)
    # The window shows: a wider and a narrower one, and the pattern of another layer, are told apart.
    for other in ({"sliding_window": WINDOW + 1}, {"sliding_window": WINDOW - 1}, {"unrotated_layers": [1]}):
        stranger = windowed(attention, implementation, {**fields, **other})
        assert (stranger(ids).logits - wanted).abs().max() > 1e-3
    for chunks in ((1,) * LENGTH, (3, 7, 1, 10), (13, 8)):
        for name, cache in caches(model).items():
            if cache is not None:
                pieces = [model(chunk, past_key_values=cache).logits for chunk in ids.split(chunks, dim=1)]
                assert cache.get_seq_length() == LENGTH, name
                assert_same_logits(torch.cat(pieces, dim=1), wanted)


@torch.no_grad()
def test_a_cache_holds_no_more_than_the_window():
    model = windowed("diff_v1")
    cache = model(tokens(1, LENGTH), use_cache=True).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [WINDOW - 1, LENGTH, WINDOW - 1]
    static = StaticCache(config=model.config, max_cache_len=LENGTH)
    model(tokens(1, LENGTH), past_key_values=static)
    assert [layer.keys.shape[2] for layer in static.layers] == [WINDOW, LENGTH, WINDOW]


@pytest.mark.parametrize(("attention", "implementation"), IMPLEMENTATIONS)
@torch.no_grad()
def test_padded_and_packed_rows_are_as_each_sequence_alone(attention, implementation):
    model, ids = windowed(attention, implementation), tokens(3, LENGTH)
    for rows in (WHOLE, PADDED):
        real, positions = real_of(rows), positions_of(rows)
        logits = model(ids, attention_mask=real, position_ids=positions).logits
        for row, parts in enumerate(rows):
            for span in spans(parts):
                assert_same_logits(logits[row, span], stated(model, ids[row : row + 1, span])[0])
    # Left padding, in chunks, with every cache.
    real = torch.arange(LENGTH) >= torch.tensor([[0], [3], [8]])
    for cache in caches(model).values():
        ends = (LENGTH,) if cache is None else (10, 11, LENGTH)
        pieces, start = [], 0
        for end in ends:
            options = {} if cache is None else {"past_key_values": cache}
            pieces.append(model(ids[:, start:end], attention_mask=real[:, :end], **options).logits)
            start = end
        logits = torch.cat(pieces, dim=1)
        for row, padding in enumerate((0, 3, 8)):
            assert_same_logits(logits[row, padding:], stated(model, ids[row : row + 1, padding:])[0])


@pytest.mark.parametrize(("attention", "implementation"), IMPLEMENTATIONS)
@torch.no_grad()
def test_a_mask_of_four_dimensions_shows_what_lies_in_the_window(attention, implementation):
    model, ids = windowed(attention, implementation), tokens(2, LENGTH)
    wanted = stated(model, ids)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    for mask in (causal, torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~causal, -torch.inf)):
        assert_same_logits(model(ids, attention_mask=mask).logits, wanted)
        for cache in list(caches(model).values())[1:]:
            held = LENGTH + 4 if isinstance(cache, StaticCache) else LENGTH
            model(ids[:, :13], past_key_values=cache)
            rest = torch.nn.functional.pad(mask[:, :, 13:], (0, held - LENGTH), value=float(mask[0, 0, 0, -1]))
            rest = rest.to(mask.dtype)
            assert_same_logits(model(ids[:, 13:], attention_mask=rest, past_key_values=cache).logits, wanted[:, 13:])


@needs_the_kernel
@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
@torch.no_grad()
def test_the_kernel_serves_windows_with_every_cache(attention, monkeypatch):
    model, ids = windowed(attention), tokens(2, LENGTH)
    served = recorded_calls(monkeypatch)
    for cache in caches(model).values():
        options = {} if cache is None else {"past_key_values": cache}
        model(ids[:, :-1], **options)
        model(ids[:, -1:], **options)
    assert set(served) == {"kernel"}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2, 5, 40])
def test_ranges_of_queries_are_the_pattern_as_booleans(window, causal):
    first = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 7, 7], [0, 0, 0, 0, 0, 0, 0, 0, 0]])
    for offset, packed in ((0, False), (0, True), (4, False), (4, True)):
        if offset and not causal:
            continue
        pattern = Pattern(causal, window)
        if packed:
            pattern = pattern.within(torch.where(first > 0, first + offset, 0), offset)
        place, query = torch.arange(9 + offset), torch.arange(9) + offset
        batch = torch.arange(2)[:, None, None, None]
        wanted = pattern(batch, torch.zeros(1, 1, 1, 1), query[:, None], place).expand(2, 1, 9, 9 + offset)
        begin, end = pattern.queries(place, 9, offset).expand(-1, 2, -1)[:, :, None, None]
        t = torch.arange(9)[:, None]
        assert torch.equal((begin <= t) & (t < end), wanted)
    # A window that hides nothing needs no mask, one that hides something needs one.
    if causal:
        mask = diff_fused_mask(1, 3, 7, q_offset=4, mask_function=Pattern(True, window))
        assert (mask is None) == (window in (None, 40))


FOREIGN = {
    "vocab_size": SHAPE.vocab_size, "hidden_size": 60, "intermediate_size": 67, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "initializer_range": 0.15, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip


@torch.no_grad()
def test_the_librarys_own_models_with_windows_and_unrotated_layers_give_the_same_logits():
    torch.manual_seed(0)
    ids = tokens(2, LENGTH)
    qwen = Qwen2ForCausalLM(Qwen2Config(
        **FOREIGN, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, rms_norm_eps=1e-5,
    )).eval()  # fmt: skip
    smol = SmolLM3ForCausalLM(SmolLM3Config(
        **FOREIGN, use_sliding_window=True, sliding_window=WINDOW, no_rope_layers=[1, 0, 1], rms_norm_eps=1e-5,
    )).eval()  # fmt: skip
    cases = [
        (qwen, {"layer_types": [FULL, SLIDING, SLIDING], "attention_bias": True}),
        (smol, {"layer_types": [FULL, SLIDING, FULL], "unrotated_layers": [1]}),
    ]
    for theirs, fields in cases:
        shape = dataclasses.replace(
            SHAPE, hidden_size=60, num_heads=6, num_kv_heads=2, rope_theta=theirs.config.rope_parameters["rope_theta"]
        )
        ours = small_model("softmax", shape=shape, sliding_window=WINDOW, **fields)
        assert ours.config.layer_types == theirs.config.layer_types
        assert ours.load_state_dict(theirs.state_dict(), strict=False).unexpected_keys == []
        assert_same_logits(ours(ids).logits, theirs(ids).logits)


WRONG = {
    "a window of one token": ({"sliding_window": 1}, "sliding_window=1; wanted an integer from 2"),
    "a window in quotes": ({"sliding_window": "5"}, "sliding_window='5'; wanted an integer from 2"),
    "too few types": ({"layer_types": [FULL]}, "layer_types with 1 names; wanted one for each of the 3 layers"),
    "another type": ({"layer_types": ["chunked_attention"] * 3}, "wanted a list of full_attention and "),
    "types without a window": ({"layer_types": [SLIDING, FULL, FULL]}, "no sliding_window; wanted the number of"),
    "a window without types": ({"layer_types": [FULL] * 3, "sliding_window": 4}, "wanted at least one layer with the"),
    "a layer too many": ({"unrotated_layers": [0, 3]}, r"\[0, 3\]; wanted each of 0 to 2 at most once"),
    "a layer twice": ({"unrotated_layers": [1, 1]}, "wanted each of 0 to 2 at most once"),
    "a layer in quotes": ({"unrotated_layers": ["1"]}, "wanted a list of layers, from 0, or null"),
    "not a flag": ({"is_causal": 0}, "is_causal=0; wanted true or false"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_fields_that_contradict_each_other_are_refused_in_one_line(case):
    fields, sentence = WRONG[case]
    with pytest.raises(ConfigError, match=sentence) as refusal:
        DiffTransformerConfig.from_shape(SHAPE, "diff_v1", **fields)
    assert "\n" not in str(refusal.value)


def generated(model, ids: Tensor, count: int = 9, **options) -> Tensor:
    return model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0, **options)


def recomputed(model, ids: Tensor, count: int = 9) -> Tensor:
    for _ in range(count):
        ids = torch.cat([ids, stated(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("fields", [MIXED, ALL], ids=["mixed", "all"])
@pytest.mark.parametrize("attention", GENERATING)
@torch.no_grad()
def test_generate_writes_what_a_computation_without_a_cache_writes(attention, fields):
    model, ids = windowed(attention, fields=fields), tokens(2, 7)
    wanted = recomputed(model, ids)
    assert torch.equal(generated(model, ids), wanted)
    assert torch.equal(generated(model, ids, use_cache=False), wanted)
    assert torch.equal(generated(model, ids, cache_implementation="static", disable_compile=True), wanted)
    assert torch.equal(generated(model, ids, prefill_chunk_size=3), wanted)
    # A draft of another model is checked several tokens at a time, and the cache is cropped behind what is refused.
    draft = windowed(attention, fields=fields)
    with torch.no_grad():
        draft.model.embed_tokens.weight.add_(0.05 * torch.randn(71, 61, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(generated(model, ids[:1], assistant_model=draft), wanted[:1])
    padded = torch.nn.functional.pad(ids, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    assert torch.equal(generated(model, padded, attention_mask=mask)[:, 3:], wanted)


@pytest.mark.parametrize("fields", [MIXED, ALL], ids=["mixed", "all"])
@pytest.mark.parametrize("attention", GENERATING)
@torch.no_grad()
def test_continuous_batching_gives_every_request_its_own_tokens(attention, fields):
    model = windowed(attention, fields=fields)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 12, 7)]
    wanted = [recomputed(model, torch.tensor([prompt]), 5)[0, len(prompt) :].tolist() for prompt in prompts]
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=-1)
    engine = ContinuousBatchingConfig(page_size=4, num_blocks=12, max_batch_tokens=16, use_async_batching=False)
    results = model.generate_batch(prompts, generation_config=config, continuous_batching_config=engine)
    found = [results[key].generated_tokens for key in sorted(results, key=lambda key: int(key.rpartition("_")[2]))]
    assert found == wanted


def test_gradients_of_the_kernel_are_those_of_the_standard_call():
    model, ids = windowed("diff_v2"), tokens(2, LENGTH)
    gradients = []
    for implementation in (DIFF_FUSED, "sdpa"):
        model.set_attn_implementation(implementation)
        gradients.append(torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters())))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(0.1, expected.abs().max().item()))


def test_a_configuration_with_windows_survives_a_file(tmp_path):
    config = DiffTransformerConfig.from_shape(SHAPE, "diff_v1", **MIXED)
    config.save_pretrained(tmp_path)
    assert DiffTransformerConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@torch.no_grad()
def test_maps_hold_nothing_beyond_the_window():
    for attention in ("softmax", "diff_v2"):
        model = windowed(attention)
        beyond = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-WINDOW)
        for layer, seen in enumerate((False, True, False)):
            weights = torch.tensor(attention_maps(model, tokens(1, LENGTH), layer=layer, head=1).map_pos)
            torch.testing.assert_close(weights.sum(-1), torch.ones(LENGTH))
            assert bool(weights[beyond].abs().sum() > 0.1) == seen
            assert (weights[beyond] == 0).all() or seen


def test_the_library_refuses_windows_in_a_quantised_cache():
    with pytest.raises(ValueError, match="only supported for models with only full attention layers"):
        QuantizedCache("quanto", windowed("diff_v1").config)
