import math

import torch

from diffattn.serve.sampling import Sampling, shape_logits

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
