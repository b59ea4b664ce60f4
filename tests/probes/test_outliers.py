"""Streamed magnitudes against those of everything at once, and rounding against its definition."""

import pytest
import torch
from support.needle_model import VOCABULARY, reader

from diffattn.errors import ConfigError, DataError
from diffattn.probes import attention_calls as layer_calls
from diffattn.probes.attention_calls import served_by
from diffattn.probes.low_bit import low_bit_attention, measure_low_bit, quantise_rows
from diffattn.probes.outliers import RANKS, Magnitudes, measure_outliers

MODELS = ("softmax", "diff_v1", "diff_v2", "llama")
LENGTH = 37


def blocks(count: int, length: int = LENGTH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(2, VOCABULARY, (2, length), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 99, 20_000])
def test_magnitudes_of_parts_are_those_of_the_whole(count, dtype):
    values = (torch.randn(count, generator=torch.Generator().manual_seed(count)) ** 3).to(dtype)
    seen = Magnitudes()
    for part in values.split(977):
        seen.add(part)
        seen.add_to_median(part)
    summary, ordered = seen.summary(), values.abs().float().sort(descending=True).values
    for rank in RANKS:
        assert (f"top_{rank}" in summary) == (rank <= count)
        if rank <= count:
            assert summary[f"top_{rank}"] == ordered[rank - 1]
    assert summary["median"] == pytest.approx(ordered[count // 2].item(), rel=0.008)


@pytest.mark.parametrize("attention", MODELS)
def test_outliers_are_those_of_all_logits_and_hidden_states_at_once(attention, monkeypatch):
    model, text = reader(attention), blocks(3)
    logits, hidden = [], []

    def keep(call):
        for which in range(len(call.queries)):
            scores = call.logits(which, range(LENGTH))
            logits.append(scores[scores > -torch.inf])

    with torch.no_grad(), served_by(model, keep):
        for ids in text:
            hidden += [x.flatten() for x in model(ids, output_hidden_states=True).hidden_states[1:-1]]
    # Several blocks of rows, none of which ends where the text does.
    monkeypatch.setattr(layer_calls, "BLOCK", 2 * 12 * LENGTH * 8)
    result = measure_outliers(model, text, tokens=200, median_rows=1)
    assert result.tokens == 2 * LENGTH * 3
    magnitudes = torch.cat(logits).abs()
    for rank in RANKS:
        expected = magnitudes.sort(descending=True).values[rank - 1].item()
        assert result.attention_logits[f"top_{rank}"] == pytest.approx(expected, rel=1e-5)
    assert result.attention_logits["median"] == pytest.approx(magnitudes.median().item(), rel=0.02)
    # The last entry of hidden_states has passed the final norm; what the last layer passes on has not.
    assert result.hidden_states["top_1"] >= torch.cat(hidden).abs().max().item() * (1 - 1e-6)


def test_one_large_value_is_found_wherever_it_is():
    model, text = reader("diff_v1"), blocks(1)
    layer = model.model.layers[1]
    handle = layer.register_forward_hook(
        lambda _, __, out: out.index_put((torch.tensor(1), torch.tensor(5)), torch.tensor(777.0))
    )
    result = measure_outliers(model, text, tokens=10)
    handle.remove()
    assert result.hidden_states["top_1"] >= 777.0


def test_too_little_text_is_refused():
    with pytest.raises(DataError, match=f"the held-out text has {2 * LENGTH} tokens in whole blocks; wanted 1000"):
        measure_outliers(reader("softmax"), blocks(1), tokens=1000)


def test_rounding_is_absmax_of_each_row():
    logits = torch.randn(3, 5, 41) * 4
    logits[:, 2, 7:] = -torch.inf
    for bits in (2, 4, 8):
        rounded, steps = quantise_rows(logits, bits), 2 ** (bits - 1) - 1
        for row, got in zip(logits.flatten(0, 1), rounded.flatten(0, 1), strict=True):
            seen = row > -torch.inf
            step = row[seen].abs().max() / steps
            assert (got[~seen] == -torch.inf).all()
            assert ((got[seen] - row[seen]).abs() <= step / 2 + 1e-6).all()
            assert len(torch.unique((got[seen] / step).round())) <= 2 * steps + 1
            torch.testing.assert_close(got[seen] / step, (got[seen] / step).round(), rtol=0, atol=1e-4)
    assert (quantise_rows(torch.zeros(2, 3), 4) == 0).all()
    assert (quantise_rows(torch.full((1, 3), -torch.inf), 4) == -torch.inf).all()


@pytest.mark.parametrize("attention", MODELS)
def test_loss_at_many_bits_is_the_models_own_and_at_few_is_not(attention, monkeypatch):
    model, text = reader(attention), blocks(2)
    monkeypatch.setattr(layer_calls, "BLOCK", 2 * 12 * LENGTH * 8)
    seen = []
    result = measure_low_bit(model, text, bits=(16, 15, 2), on_progress=lambda *progress: seen.append(progress))
    assert seen == [(index, 6) for index in range(1, 7)]
    for index, ids in enumerate(text):
        own = model(ids, labels=ids).loss.item()
        assert result[16].loss[index] == pytest.approx(own, abs=1e-5)
        assert result[15].loss[index] == pytest.approx(own, abs=1e-3)
        assert abs(result[2].loss[index] - own) > 1e-3
        right = (model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean().item()
        assert result[16].accuracy[index] == pytest.approx(right)


def test_unrounded_rows_in_its_place_are_the_models_logits():
    model, (ids,) = reader("diff_v1"), blocks(1)
    with torch.no_grad():
        expected = model(ids).logits
        with served_by(model, lambda call: low_bit_attention(call, 24)):
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("bits", [1, 17])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ConfigError, match=f"bits is {bits}; wanted 2 to 16"):
        measure_low_bit(reader("softmax"), blocks(1), bits=(bits,))
