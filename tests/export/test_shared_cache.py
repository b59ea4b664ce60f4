"""The cache of an exported graph: one buffer for past and present, other programs' ways, and the logits of the last."""

import numpy as np
import pytest
import torch
from support.small_exports import decoder, model_of, padded, whole
from support.small_models import SHAPE, assert_same_logits, tokens

from diffattn.export.graph import to_graph


def test_the_cache_is_the_models(cached):
    model, session = cached
    ids = tokens(2, 7)
    _, cache = session.logits(ids.numpy())
    with torch.no_grad():
        expected = model(ids, use_cache=True).past_key_values
    ours = [tensor for layer in expected.layers for tensor in (layer.keys, layer.values)]
    assert len(cache.values) == len(ours) == 2 * model.config.num_hidden_layers
    for value, tensor in zip(cache.values, ours, strict=True):
        assert_same_logits(torch.from_numpy(value.numpy()[:, :, : cache.length]), tensor)


def test_steps_write_into_one_buffer_and_leave_earlier_caches_as_they_were(cached):
    model, session = cached
    ids = tokens(2, 7).numpy()
    _, start = session.logits(ids[:1, :4], cache=session.empty_cache(1, 6))
    _, one = session.logits(ids[:1, 4:5], cache=start)
    assert one.values is start.values
    # A second text goes on from the same start, and then the first one, beyond the places that it was given.
    _, other = session.logits(ids[1:, 4:5], cache=start)
    assert other.values is not start.values
    logits, _ = session.logits(ids[:1, 5:], cache=one)
    alone = torch.from_numpy(ids[:1])
    assert_same_logits(torch.from_numpy(logits), whole(model, alone, torch.ones_like(alone))[:, 5:])
    mixed = torch.from_numpy(np.concatenate([ids[:1, :4], ids[1:, 4:6]], axis=1))
    logits, _ = session.logits(mixed[:, 5:].numpy(), cache=other)
    assert_same_logits(torch.from_numpy(logits), whole(model, mixed, torch.ones_like(mixed))[:, 5:])


def test_a_program_may_give_caches_of_the_exact_length_and_leave_the_number_of_logits_out(cached):
    model, decoder = cached
    ids = tokens(3, 7)
    wanted = whole(model, ids, torch.ones_like(ids)).numpy()
    past, start = (
        {name: value.numpy() for name, value in zip(decoder.past_names, decoder.empty_cache(3).values, strict=True)},
        0,
    )
    for stop in (4, 5, 6, 7):
        places = np.arange(start, stop)[None].repeat(3, 0)
        given = {"input_ids": ids[:, start:stop].numpy(), "position_ids": places}
        logits, *present = decoder.session.run(
            decoder.outputs, given | past | {"attention_mask": np.ones((3, stop), np.int64)}
        )
        assert {array.shape[2] for array in present} == {stop}
        past, start = dict(zip(decoder.past_names, present, strict=True)), stop
        np.testing.assert_allclose(logits, wanted[:, stop - 1 : stop], rtol=0, atol=1e-5)


@pytest.mark.parametrize("last", [1, 3, 0])
def test_logits_of_the_last_tokens_are_those_of_all(cached, last):
    model, session = cached
    ids, mask = padded(2, 7, padding=3)
    wanted = whole(model, ids, mask)[:, -last:]
    found, cache = session.logits(ids.numpy(), mask.numpy(), last=last)
    # No one asks what is written behind padding.
    real = mask.bool()[:, -last:]
    assert_same_logits(torch.from_numpy(found)[real], wanted[real])
    _, cache = session.logits(ids[:, :4].numpy(), mask[:, :4].numpy())
    found, _ = session.logits(ids[:, 4:].numpy(), mask.numpy(), cache, last=last)
    assert_same_logits(torch.from_numpy(found), wanted[:, -3:])


@pytest.mark.full
@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
def test_a_width_that_no_kernel_shares_buffers_for_is_exported_with_standard_operators(attention, tmp_path):
    model = model_of(attention, shape=SHAPE)
    graph = to_graph(model)
    assert {node.domain for node in graph.graph} == {""}
    session = decoder(graph, tmp_path)
    assert not session.shares_buffers
    ids, mask = padded(3, 11, padding=5)
    first, cache = session.logits(ids[:, :7].numpy(), mask[:, :7].numpy())
    second, _ = session.logits(ids[:, 7:].numpy(), mask.numpy(), cache)
    logits, real = torch.from_numpy(np.concatenate([first, second], axis=1)), mask.bool()
    assert_same_logits(logits[real], whole(model, ids, mask)[real])
