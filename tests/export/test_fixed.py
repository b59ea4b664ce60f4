import pytest
import torch
from support.small_exports import model_of
from support.small_models import assert_same_logits, tokens

from diffattn.errors import ConfigError
from diffattn.export.fixed import FixedDecoder


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2", "gated", "dex"])
@torch.no_grad()
def test_tokens_written_one_by_one_and_together_have_the_logits_of_a_whole_pass(attention):
    model, ids = model_of(attention), tokens(2, 11)
    expected = model(ids).logits
    decoder = FixedDecoder(model, 13, batch=2)
    assert_same_logits(decoder(ids[:, :6], torch.arange(6)), expected[:, 5])
    for place in range(6, 11):
        assert_same_logits(decoder(ids[:, place : place + 1], torch.tensor([place])), expected[:, place])


@torch.no_grad()
def test_a_new_text_does_not_see_what_an_earlier_one_left():
    model, ids = model_of("diff_v1"), tokens(1, 4)
    expected = model(ids).logits[:, -1]
    decoder = FixedDecoder(model, 9)
    decoder(tokens(1, 9) + 1, torch.arange(9))
    assert_same_logits(decoder(ids, torch.arange(4)), expected)


@pytest.mark.parametrize(
    ("length", "batch", "said"), [(0, 1, "length is 0"), (9999, 1, "length is"), (8, 0, "batch is 0")]
)
def test_impossible_sizes_are_refused(length, batch, said):
    with pytest.raises(ConfigError, match=said):
        FixedDecoder(model_of("softmax"), length, batch=batch)
