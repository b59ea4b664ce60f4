"""Rows that hold several sequences: each as it is alone, whatever the mask, the cache and the implementation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from support.fused_cases import needs_the_kernel
from support.kernel_calls import recorded_calls
from support.packed_cases import (
    ATTENTIONS,
    IMPLEMENTATIONS,
    LENGTH,
    PADDED,
    WHOLE,
    alone,
    caches,
    positions_of,
    real_of,
    spans,
    twins,
)
from support.small_models import SHAPE, assert_same_logits, small_model, tokens
from torch import Tensor
from transformers import DataCollatorWithFlattening

from diffattn.errors import ConfigError
from diffattn.layer_kinds import FULL
from diffattn.model.fused import DIFF_FUSED
from diffattn.model.masks import layers
from diffattn.model.masks.layers import layer_masks
from diffattn.model.masks.sequences import starts_of

PADDING_MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "int": Tensor.long,
    "int32": Tensor.int,
    "bool": Tensor.bool,
    "float": Tensor.float,
}


@pytest.mark.parametrize(("attention", "implementation"), IMPLEMENTATIONS)
@torch.no_grad()
def test_each_sequence_is_as_alone_under_every_padding_mask_and_cache(attention, implementation):
    model, ids, expected = twins(attention)
    model.set_attn_implementation(implementation)
    for rows in (WHOLE, PADDED):
        real = real_of(rows)
        given = [kind(real) for kind in PADDING_MASKS.values()] + ([None] if rows is WHOLE else [])
        for mask in given:
            for padding in (0, 1, 5):
                for cache in caches(model).values():
                    logits = model(ids, attention_mask=mask, position_ids=positions_of(rows, padding), **cache).logits
                    assert_same_logits(logits[real], expected[rows][real])


@needs_the_kernel
@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
@torch.no_grad()
def test_the_kernel_serves_packed_rows_and_holds_no_mask_of_queries_and_keys(attention, monkeypatch):
    model, ids, _ = twins(attention)
    model.set_attn_implementation(DIFF_FUSED)
    served = recorded_calls(monkeypatch)
    masks = layer_masks(model.config, ids[..., None], real_of(PADDED), positions_of(PADDED), None, {})
    assert masks[FULL].shape == (2, 3, 1, 1, LENGTH)
    for cache in caches(model).values():
        model(ids, attention_mask=real_of(PADDED), position_ids=positions_of(PADDED), **cache)
    assert served == ["kernel"] * 3 * SHAPE.num_layers


def ignores_restarts(x, attention_mask, position_ids, *others):
    return None


def first_of(starts: Tensor) -> Tensor:
    return torch.where(starts, torch.arange(LENGTH), 0).cummax(-1).values


def takes_padding_for_tokens(x, attention_mask, position_ids, *others):
    return first_of(starts_of(position_ids, None))


def begins_where_the_position_is_zero(x, attention_mask, position_ids, *others):
    return first_of(position_ids == 0)


def all_rows_as_the_first(x, attention_mask, position_ids, *others):
    return first_of(starts_of(position_ids, attention_mask.bool())[:1].repeat(x.shape[0], 1))


WRONG = [ignores_restarts, takes_padding_for_tokens, begins_where_the_position_is_zero, all_rows_as_the_first]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("attention", "implementation"), [("diff_v1", DIFF_FUSED), ("diff_v2", "sdpa")])
@torch.no_grad()
def test_known_wrong_ways_to_find_sequences_are_found_out(attention, implementation, wrong, monkeypatch):
    model, ids, expected = twins(attention)
    model.set_attn_implementation(implementation)
    real, positions = real_of(PADDED), positions_of(PADDED)
    # The last sequence of the second row begins at 3, as one that was cut does; and padding within the third's.
    positions[1, 16:20] += 3
    real[2, 10] = False
    positions[2, 11:] -= 1
    given = {"attention_mask": real.long(), "position_ids": positions, "use_cache": False}
    alone_2 = model(ids[2:, real[2]], use_cache=False).logits

    def check() -> None:
        logits = model(ids, **given).logits
        assert_same_logits(logits[:2][real[:2]], expected[PADDED][:2][real[:2]])
        assert_same_logits(logits[2:, real[2]], alone_2)

    check()
    monkeypatch.setattr(layers, "first_places", wrong)
    with pytest.raises(AssertionError):
        check()


# Each as a row of positions behind its mask; what the library's own code and others write before the first token.
LEFT = [0, 0, 0, 1, 1, 1, 1]
HOLE = [1, 1, 0, 0, 1, 1, 1]
ONE_SEQUENCE = {
    "ones": (LEFT, [1, 1, 1, 0, 1, 2, 3]),
    "zeros": (LEFT, [0, 0, 0, 0, 1, 2, 3]),
    "counted through": (LEFT, [0, 1, 2, 3, 4, 5, 6]),
    "falling": (LEFT, [9, 8, 7, 0, 1, 2, 3]),
    "none": (LEFT, None),
    "hole, ones": (HOLE, [0, 1, 1, 1, 2, 3, 4]),
    "hole, zeros": (HOLE, [0, 1, 0, 0, 2, 3, 4]),
    "right": ([1, 1, 1, 1, 0, 0, 0], [0, 1, 2, 3, 1, 1, 1]),
}


@pytest.mark.parametrize("case", ONE_SEQUENCE)
@pytest.mark.parametrize(("attention", "implementation"), IMPLEMENTATIONS)
@torch.no_grad()
def test_positions_that_repeat_under_padding_are_one_sequence(attention, implementation, case):
    model, ids, _ = twins(attention)
    model.set_attn_implementation(implementation)
    row, given = ONE_SEQUENCE[case]
    ids, mask = ids[:2, :7], torch.tensor([row, [1] * 7])
    positions = None if given is None else torch.tensor([given, list(range(7))])
    real = mask[0].bool()
    for cache in caches(model).values():
        logits = model(ids, attention_mask=mask, position_ids=positions, **cache).logits
        assert_same_logits(logits[:1, real], model(ids[:1, real]).logits)
        assert_same_logits(logits[1:], model(ids[1:]).logits)


def test_positions_that_jump_ahead_or_start_late_are_one_sequence():
    """Positions may be skipped, as when a model is trained for longer texts; nothing restarts there."""
    for positions in (torch.arange(7) * 3, torch.arange(7) + 40, torch.tensor([0, 1, 2, 40, 41, 42, 43])):
        assert not starts_of(positions[None], None).any()
        assert not starts_of(positions[None], torch.tensor([[0, 1, 1, 0, 1, 1, 1]]).bool()).any()


@pytest.mark.parametrize("implementation", ["sdpa", pytest.param(DIFF_FUSED, marks=needs_the_kernel)])
@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
def test_gradients_are_the_sums_of_those_of_each_sequence_alone(attention, implementation):
    model, ids, _ = twins(attention)
    model.set_attn_implementation(implementation)
    real = real_of(PADDED)
    weights = torch.randn(3, LENGTH, SHAPE.vocab_size, generator=torch.Generator().manual_seed(3)) * real[..., None]
    parameters = list(model.parameters())
    logits = model(ids, attention_mask=real.long(), position_ids=positions_of(PADDED)).logits
    actual = torch.autograd.grad((logits * weights).sum(), parameters)
    expected = torch.autograd.grad((alone(model, ids, PADDED) * weights).sum(), parameters)
    for gradient, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5 * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_a_flattened_batch_of_the_librarys_collator(attention):
    model, ids, expected = twins(attention)
    features = [{"input_ids": ids[0, span].tolist()} for span in spans(WHOLE[0])]
    for positions, lengths in ((True, False), (True, True), (False, True)):
        collator = DataCollatorWithFlattening(return_position_ids=positions, return_flash_attn_kwargs=lengths)
        batch = collator(features, return_tensors="pt")
        assert ("position_ids" in batch, "cu_seq_lens_q" in batch) == (positions, lengths)
        for implementation in {"sdpa", model.config._attn_implementation}:
            model.set_attn_implementation(implementation)
            assert_same_logits(model(**batch).logits, expected[WHOLE][:1])
    # Positions that go on are no word against the lengths.
    batch["position_ids"] = torch.arange(LENGTH)[None]
    assert_same_logits(model(**batch).logits, expected[WHOLE][:1])
    for wrong in ([0, 5, 14], [1, 5, 21]):
        with pytest.raises(ConfigError, match=r"^cu_seq_lens_q runs from . to .* for 21 tokens .* wanted 0 to 21"):
            model(ids[:1], cu_seq_lens_q=torch.tensor(wrong, dtype=torch.int32))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(("attention", "implementation"), [("softmax", "sdpa"), ("diff_v1", DIFF_FUSED)])
@torch.no_grad()
def test_behind_a_cache_the_first_tokens_go_on_and_the_next_sequence_begins(attention, implementation, kind):
    model, ids, expected = twins(attention)
    model.set_attn_implementation(implementation)
    real, positions = real_of(PADDED[:1]), positions_of(PADDED[:1])
    for cut in (1, 2, 3, 4):
        for mask in (real.long(), None):
            shown = slice(None) if mask is not None else slice(2, None)
            given = {"past_key_values": caches(model)["static"]["past_key_values"]} if kind == "static" else {}
            cache, pieces = None, []
            for piece in (slice(0, cut), slice(cut, LENGTH)):
                so_far = None if mask is None else mask[:, : piece.stop]
                options = given if cache is None else {"past_key_values": cache}
                outputs = model(
                    ids[:1, shown][:, piece],
                    attention_mask=so_far,
                    position_ids=positions[:, shown][:, piece],
                    **options,
                )
                cache = outputs.past_key_values
                pieces.append(outputs.logits)
            found = real if mask is not None else real[:, shown]
            assert_same_logits(torch.cat(pieces, dim=1)[found], expected[PADDED][:1][real])


@pytest.mark.parametrize("length", [1, 4])
@torch.no_grad()
def test_going_on_behind_a_packed_cache_is_refused(length):
    model, ids, _ = twins("diff_v2")
    cache = model(ids, position_ids=positions_of(WHOLE)).past_key_values
    following = torch.arange(length) + torch.tensor([[7], [19], [21]])
    with pytest.raises(ConfigError, match=r"^position_ids begin at 7 behind 21 cached tokens of row 0, .*; wanted"):
        model(ids[:, :length], position_ids=following, past_key_values=cache)
    with pytest.raises(ConfigError, match="begin at 0 behind 21 cached tokens of row 1"):
        model(ids[:, :length], position_ids=following + torch.tensor([[14], [-19], [0]]), past_key_values=cache)
    with pytest.raises(ConfigError, match="behind 21 cached tokens"):
        model.generate(ids[:1], position_ids=positions_of(WHOLE)[:1], max_new_tokens=3, pad_token_id=0)
    # A mask that says it all is the way out.
    visible = torch.zeros(1, 1, 1, LENGTH + 1, dtype=torch.bool)
    visible[..., 14:] = True
    cache = model(ids[:1], position_ids=positions_of(WHOLE)[:1]).past_key_values
    decoded = model(ids[:1, :1], attention_mask=visible, position_ids=torch.tensor([[7]]), past_key_values=cache).logits
    assert_same_logits(decoded, model(torch.cat([ids[:1, 14:], ids[:1, :1]], 1)).logits[:, -1:])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_the_prompt_of_generate_may_not_be_packed_but_its_first_token_is_right(cache):
    model, ids, expected = twins("diff_v1")
    model.set_attn_implementation(DIFF_FUSED)
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    first = model.generate(ids, position_ids=positions_of(WHOLE), **options)[:, -1]
    assert torch.equal(first, expected[WHOLE][:, -1].argmax(-1))
    with pytest.raises(ConfigError, match="behind 21 cached tokens"):
        model.generate(ids, position_ids=positions_of(WHOLE), **options | {"max_new_tokens": 3})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("implementation", ["sdpa", pytest.param(DIFF_FUSED, marks=needs_the_kernel)])
def test_a_compiled_step_finds_the_sequences_of_every_row_it_is_given(implementation):
    model = small_model("diff_v1", shape=dataclasses.replace(SHAPE, num_layers=1), attn_implementation=implementation)
    ids = tokens(3, LENGTH)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows, mask in ((PADDED, real_of(PADDED).long()), (WHOLE, torch.ones_like(ids)), (WHOLE[::-1], None)):
        logits = compiled(ids, attention_mask=mask, position_ids=positions_of(rows)).logits
        assert_same_logits(logits[real_of(rows)], alone(model, ids, rows)[real_of(rows)])
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("implementation", ["sdpa", pytest.param(DIFF_FUSED, marks=needs_the_kernel)])
@torch.no_grad()
def test_an_exported_program_finds_the_sequences_of_rows_of_any_length(implementation):
    shape = dataclasses.replace(SHAPE, num_layers=1)
    model = small_model("diff_v1", shape=shape, use_cache=False, attn_implementation=implementation)
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)

    def given(rows, first=0):
        others = {"attention_mask": real_of(rows).long(), "position_ids": positions_of(rows)}
        return {name: x[:, first:] for name, x in {"input_ids": tokens(3, LENGTH), **others}.items()}

    sizes = {name: {0: batch, 1: length} for name in given(WHOLE)}
    program = torch.export.export(model, (), given(WHOLE), dynamic_shapes=sizes, strict=False).module()
    for rows in (WHOLE, PADDED):
        real = real_of(rows)
        assert_same_logits(program(**given(rows)).logits[real], alone(model, tokens(3, LENGTH), rows)[real])
    assert_same_logits(program(**given(WHOLE, LENGTH - 2)).logits, model(**given(WHOLE, LENGTH - 2)).logits)
