import math

import pytest
import torch

from diffattn.model.options import GREEDY_BELOW, REQUEST
from diffattn.serve.sampling import LEAST_LOGPROB, Likelihoods, Sampling, shape_logits

LOGITS = torch.tensor([0.3, -1.2, 2.0, 1.1, -0.4, 0.9])


def draws(count: int, logits: torch.Tensor = LOGITS, **options) -> torch.Tensor:
    chosen = [
        int(shape_logits(logits, Sampling(**{"temperature": 1.0, "seed": seed, **options}), []).argmax())
        for seed in range(count)
    ]
    return torch.bincount(torch.tensor(chosen), minlength=len(logits))


def assert_drawn_from(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Pearson's statistic below the 99.9th percentile for its degrees of freedom, at most 5: 20.5."""
    expected = probabilities * counts.sum()
    assert counts[probabilities == 0].sum() == 0
    seen = probabilities > 0
    statistic = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    assert float(statistic) < 20.5, (counts, expected)


def test_tokens_are_drawn_with_the_probabilities_of_the_softmax():
    assert_drawn_from(draws(3000), LOGITS.softmax(0))
    assert_drawn_from(draws(3000, temperature=0.5), (2 * LOGITS).softmax(0))


def test_top_k_and_top_p_leave_the_likeliest():
    three = LOGITS.softmax(0).where(LOGITS > 0.5, 0)
    assert_drawn_from(draws(2000, top_k=3), three / three.sum())
    # The three likeliest have 0.77 of the probability and the two likeliest 0.60.
    assert 0.5 < LOGITS.softmax(0)[[2, 3]].sum() < 0.7 < three.sum()
    assert_drawn_from(draws(2000, top_p=0.7), three / three.sum())


def test_a_draw_depends_on_the_seed_and_the_place_in_the_answer_alone():
    wide = torch.zeros(997)

    def chosen(seed: int, length: int) -> int:
        return int(shape_logits(wide, Sampling(temperature=1.0, seed=seed), [0] * length).argmax())

    first = [chosen(7, length) for length in range(20)]
    assert first == [chosen(7, length) for length in range(20)]
    assert len(set(first)) > 15
    assert first != [chosen(8, length) for length in range(20)]
    assert chosen(-1, 0) == chosen(-1, 0) != chosen(1, 0)


def test_greedy_takes_the_likeliest_and_changes_nothing():
    assert shape_logits(LOGITS, Sampling(), [2, 2, 2]) is LOGITS


def test_penalties_and_bias():
    once = shape_logits(LOGITS, Sampling(presence_penalty=1.5), [2, 2, 0])
    assert torch.allclose(once - LOGITS, torch.tensor([-1.5, 0, -1.5, 0, 0, 0]))
    each = shape_logits(LOGITS, Sampling(frequency_penalty=0.5), [2, 2, 0])
    assert torch.allclose(each - LOGITS, torch.tensor([-0.5, 0, -1.0, 0, 0, 0]))
    biased = shape_logits(LOGITS, Sampling(logit_bias={1: 100.0, 5: -3.0}), [])
    assert torch.allclose(biased - LOGITS, torch.tensor([0, 100.0, 0, 0, 0, -3.0]))
    assert int(biased.argmax()) == 1
    assert not math.isnan(float(shape_logits(LOGITS, Sampling(presence_penalty=2), []).sum()))


def test_min_p_leaves_the_tokens_near_the_likeliest():
    # e^-0.9 is 0.41 and e^-1.1 is 0.33 of the likeliest.
    two = LOGITS.softmax(0).where(LOGITS >= 1.1, 0)
    assert_drawn_from(draws(2000, min_p=0.35), two / two.sum())
    assert torch.equal(draws(50, min_p=1.0).nonzero().flatten(), torch.tensor([2]))


def test_a_repetition_penalty_makes_seen_tokens_less_likely_on_both_sides_of_zero():
    shaped = shape_logits(LOGITS, Sampling(repetition_penalty=2.0, prompt=[1, 1, 2]), [0, 2])
    assert torch.allclose(shaped, torch.tensor([0.15, -2.4, 1.0, 1.1, -0.4, 0.9]))
    assert torch.equal(shape_logits(LOGITS, Sampling(repetition_penalty=2.0), []), LOGITS)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-8, GREEDY_BELOW, 1e-4])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_temperature_next_to_nothing_takes_the_likeliest(temperature, scale):
    for seed in range(20):
        options = {"top_p": 0.9, "top_k": 3, "min_p": 0.1}
        sampling = Sampling(temperature=temperature, seed=seed, **options)
        assert int(shape_logits(LOGITS * scale, sampling, []).argmax()) == 2


def test_the_ends_of_all_ranges_together_leave_a_number_to_draw_with():
    names = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
    for end in ("lowest", "highest"):
        options = {name: getattr(REQUEST[name], end) for name in names}
        options |= {"top_p": options["top_p"] or math.ulp(0.0), "top_k": min(options["top_k"], len(LOGITS))}
        shaped = shape_logits(1e4 * LOGITS, Sampling(**options, prompt=[2, 3]), [1, 1, 5])
        assert torch.isfinite(shaped).any()
        assert not torch.isnan(shaped).any()


def test_likelihoods_are_those_of_the_unshaped_logits():
    noted = Likelihoods(2)
    noted.note(0, LOGITS)
    # What an evicted answer computes again takes the place of what it was.
    noted.note(0, LOGITS + 5)
    noted.note(1, torch.tensor([0.0, -math.inf, 0.0]))
    logprob, likeliest = noted.take(0, 1)
    expected = LOGITS.log_softmax(0)
    assert logprob == pytest.approx(float(expected[1]))
    assert likeliest == [(2, pytest.approx(float(expected[2]))), (3, pytest.approx(float(expected[3])))]
    assert noted.take(1, 1)[0] == LEAST_LOGPROB
    with pytest.raises(KeyError):
        noted.take(0, 1)
