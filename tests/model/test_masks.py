"""Masks of four dimensions, one rule for every form and implementation, and masks that are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.packed_cases import (
    IMPLEMENTATIONS,
    LENGTH,
    PADDED,
    WHOLE,
    positions_of,
    real_of,
    twins,
    visible_of,
)
from support.small_models import SHAPE, assert_same_logits, small_model, tokens
from torch import Tensor

from diffattn.errors import ConfigError
from diffattn.layer_kinds import FULL
from diffattn.model.fused import DIFF_FUSED
from diffattn.model.masks import layers, whole
from diffattn.model.masks.layers import layer_masks


def additive(visible: Tensor, hidden: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, hidden)


WHOLE_MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": Tensor.bool,
    "int64": Tensor.long,
    "int32": Tensor.int,
    "uint8": Tensor.byte,
    "0 and -inf": lambda visible: additive(visible, -torch.inf),
    "0 and min": lambda visible: additive(visible, torch.finfo(torch.float32).min),
    "0 and min of float16, in it": lambda visible: additive(visible, torch.finfo(torch.float16).min, torch.float16),
    "float64": lambda visible: additive(visible, torch.finfo(torch.float64).min, torch.float64),
}


@pytest.mark.parametrize(("attention", "implementation"), IMPLEMENTATIONS)
@torch.no_grad()
def test_a_mask_of_four_dimensions_says_all_in_every_form(attention, implementation):
    model, ids, expected = twins(attention)
    model.set_attn_implementation(implementation)
    for rows in (WHOLE, PADDED):
        real, visible = real_of(rows), visible_of(rows)
        for form in WHOLE_MASKS.values():
            for heads in (1, model.config.num_attention_heads):
                mask = form(visible).expand(-1, heads, -1, -1)
                for positions in (positions_of(rows), None):
                    logits = model(ids, attention_mask=mask, position_ids=positions).logits
                    assert_same_logits(logits[real], expected[rows][real])
                    assert logits.isfinite().all()
    # One for every row, and one whose queries are all the same, behind a cache.
    one = model(ids[:1], attention_mask=WHOLE_MASKS["bool"](visible_of(WHOLE[:1]))).logits
    assert_same_logits(one, expected[WHOLE][:1])
    last = torch.ones(1, 1, 1, 7, dtype=torch.int32)
    cache = model(ids[:1, 14:20], position_ids=positions_of(WHOLE)[:1, 14:20]).past_key_values
    logits = model(ids[:1, 20:], attention_mask=last, past_key_values=cache).logits
    assert_same_logits(logits, expected[WHOLE][:1, 20:])


@pytest.mark.parametrize(("attention", "implementation"), IMPLEMENTATIONS)
@torch.no_grad()
def test_maps_of_each_head_may_have_a_mask_of_their_own(attention, implementation):
    """The heads of the call, in their order: a bool mask, and the same as numbers added to the scores, agree."""
    model, ids, _ = twins(attention)
    heads = model.config.num_attention_heads
    visible = (torch.rand(3, heads, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5).tril()
    visible |= torch.eye(LENGTH, dtype=torch.bool)
    logits = []
    for name in ("eager", implementation):
        model.set_attn_implementation(name)
        logits += [model(ids, attention_mask=WHOLE_MASKS[form](visible)).logits for form in ("bool", "0 and min")]
    for other in logits[1:]:
        assert_same_logits(other, logits[0])
    # A bias is more than a mask, and added under every implementation.
    bias = torch.randn(3, heads, LENGTH, LENGTH).masked_fill(~visible, -torch.inf)
    biased = model(ids, attention_mask=bias).logits
    model.set_attn_implementation("eager")
    assert_same_logits(biased, model(ids, attention_mask=bias).logits)
    assert (biased - logits[0]).abs().max() > 0.1


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2"])
@torch.no_grad()
def test_a_mask_of_ints_is_never_taken_for_the_kernels_own(attention):
    model, ids, _ = twins(attention)
    model.set_attn_implementation("sdpa")
    for dtype in (torch.int32, torch.int64, torch.bool):
        visible = torch.ones(3, 1, 1, LENGTH, dtype=dtype)
        visible[..., 3] = 0
        model.set_attn_implementation("sdpa")
        expected = model(ids, attention_mask=visible).logits
        if attention != "softmax":
            model.set_attn_implementation(DIFF_FUSED)
        assert_same_logits(model(ids, attention_mask=visible).logits, expected)
        # Every query sees every key but one: not causal.
        assert (expected - model(ids).logits).abs().max() > 0.1


@pytest.mark.full
# Flex attention compiles itself, and the libraries' own code meets what this version of torch has retired.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_flex_attention_tells_sequences_apart():
    # Flex attention wants widths that are powers of two.
    model = small_model("diff_v1", shape=dataclasses.replace(SHAPE, head_dim=8, num_layers=1))
    ids, real = tokens(3, LENGTH), real_of(PADDED)
    each = (torch.rand(3, 12, LENGTH, LENGTH) < 0.5).tril() | torch.eye(LENGTH, dtype=torch.bool)
    calls = [
        {"attention_mask": real.long(), "position_ids": positions_of(PADDED)},
        {"attention_mask": WHOLE_MASKS["0 and -inf"](each)},
    ]
    expected = [model(ids, **given).logits for given in calls]
    model.set_attn_implementation("flex_attention")
    for given, wanted in zip(calls, expected, strict=True):
        # Each call is another graph; of several it would make one for any size, which fails to compile on CPU.
        torch._dynamo.reset()
        assert_same_logits(model(ids, **given).logits[real], wanted[real])
    with pytest.raises(ConfigError, match="with flex_attention, which hides a key or does not and adds none; wanted"):
        model(ids, attention_mask=torch.randn(3, 1, LENGTH, LENGTH))


VISIBLE = visible_of(WHOLE)
REFUSED: dict[str, tuple[Any, str]] = {
    "ints beside 0 and 1": (VISIBLE.long() * 2, "integers holds others than 0 and 1; wanted"),
    "added ints": ((~VISIBLE).int() * -10000, "integers holds others than 0 and 1; wanted"),
    "floats of 0 and 1": (VISIBLE.float(), "0.0 and 1.0, and floats are added to the scores; wanted"),
    "keys": (VISIBLE[..., 1:], r"is \(3, 1, 21, 20\); wanted \(3 or 1, 12 or 1, 21 or 1, 21\)"),
    "heads": (VISIBLE.expand(-1, 6, -1, -1), r"is \(3, 6, 21, 21\); wanted"),
    "rows": (VISIBLE[:2], r"is \(2, 1, 21, 21\); wanted"),
    "three dimensions": (VISIBLE[:, 0], "of 3 dimensions; wanted a tensor"),
    "the kernel's own": (torch.zeros(2, 3, 1, 1, LENGTH, dtype=torch.int32), "of 5 dimensions"),
    "a list": (VISIBLE.tolist(), "class 'list'.*; wanted a tensor"),
    "added floats of two dimensions": (additive(real_of(PADDED), -torch.inf), r"\(batch, keys\) holds numbers below 0"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("implementation", ["sdpa", "eager", DIFF_FUSED])
def test_masks_that_say_nothing_clear_are_refused_in_one_line(case, implementation):
    model, ids, _ = twins("diff_v1")
    model.set_attn_implementation(implementation)
    mask, sentence = REFUSED[case]
    with pytest.raises(ConfigError, match=f"^attention_mask .*{sentence}") as refusal:
        model(ids, attention_mask=mask)
    assert "\n" not in str(refusal.value)


def test_fewer_columns_than_tokens_are_refused():
    model, ids, _ = twins("diff_v1")
    cache = model(ids[:, :5]).past_key_values
    given = {"attention_mask": torch.ones(3, 2), "position_ids": torch.arange(5, 7)[None]}
    with pytest.raises(ConfigError, match=r"is \(3, 2\) for 5 cached and 2 new tokens; wanted a column for each"):
        model(ids[:, 5:7], past_key_values=cache, **given)


def test_flash_attention_is_given_only_what_it_tells_apart(monkeypatch):
    """Its package serves GPUs alone; what it would be given is decided before."""
    model, ids, _ = twins("diff_v1")
    for module in (layers, whole):
        monkeypatch.setattr(module, "is_flash_attention_requested", lambda config: True)
    real, positions, x = real_of(WHOLE), positions_of(WHOLE), ids[..., None].float()
    for mask, rows in ((real, 3), (real_of(PADDED), 1)):
        given = (x[:rows], mask[:rows], positions_of(PADDED if rows == 1 else WHOLE)[:rows])
        with pytest.raises(ConfigError, match="which flash attention does not separate; wanted one row without"):
            layer_masks(model.config, *given, None, {})
    with pytest.raises(ConfigError, match="4-D attention_mask with flash attention, which takes none; wanted"):
        layer_masks(model.config, x, VISIBLE, positions, None, {})
    model.set_attn_implementation("sdpa")
    assert layer_masks(model.config, x[:1], real[:1], positions[:1], None, {}) == {FULL: None}
