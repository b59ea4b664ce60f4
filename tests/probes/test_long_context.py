"""Loss by position, in chunks with a cache, against one pass over the whole text."""

import pytest
import torch
import torch.nn.functional as F
from support.needle_model import VOCABULARY, reader

from diffattn.errors import ConfigError, UnsupportedError
from diffattn.probes.long_context import measure_long_context, with_rope_base

LENGTH = 75


def texts(count: int) -> list[torch.Tensor]:
    return list(torch.randint(2, VOCABULARY, (count, LENGTH + 1), generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("chunk", [1, 16, LENGTH])
@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2", "llama"])
def test_cumulative_loss_is_that_of_one_pass(attention, chunk):
    model, given = reader(attention), texts(2)
    result = measure_long_context(model, given, length=LENGTH, chunk=chunk)
    assert result.positions == [1, 2, 4, 8, 16, 32, 64, LENGTH]
    for ids, losses in zip(given, result.loss, strict=True):
        with torch.no_grad():
            each = F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="none")
        for position, loss in zip(result.positions, losses, strict=True):
            assert loss == pytest.approx(each[:position].mean().item(), abs=2e-5)


@pytest.mark.parametrize("attention", ["diff_v1", "llama"])
def test_another_rotary_base_is_that_of_a_model_built_with_it(attention):
    model, (ids,) = reader(attention), texts(1)
    extended = with_rope_base(model, 500_000.0)
    built = type(model)(extended.config).eval()
    built.load_state_dict(model.state_dict())
    assert model.config.rope_parameters["rope_theta"] == 10_000.0
    with torch.no_grad():
        assert torch.equal(extended(ids[None]).logits, built(ids[None]).logits)
        assert (extended(ids[None]).logits - model(ids[None]).logits).abs().max() > 1e-3
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in extended.parameters()} == shared


def test_a_model_without_plain_rotary_positions_has_no_base():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(UnsupportedError, match="positions of GPT2LMHeadModel are not plain rotary ones"):
        with_rope_base(GPT2LMHeadModel(GPT2Config(vocab_size=71, n_embd=44, n_layer=1, n_head=4)), 1e6)


@pytest.mark.parametrize(
    ("length", "chunk", "count"),
    [(0, 8, 1), (8, 0, 1), (LENGTH + 1, 8, 1), (8, 8, 0)],
)
def test_what_cannot_be_is_refused(length, chunk, count):
    with pytest.raises(ConfigError, match="texts of more tokens than length"):
        measure_long_context(reader("softmax"), texts(2)[:count], length=length, chunk=chunk)
