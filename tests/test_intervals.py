import math

import pytest
from scipy import stats

from diffattn.intervals import paired_difference, pairs, verdict
from diffattn.results.comparison import VariantResult
from diffattn.results.interval import Interval


def test_interval_is_that_of_a_paired_t_test() -> None:
    values, baseline = [3.10, 3.25, 3.02, 3.40], [3.12, 3.31, 3.01, 3.50]
    got = paired_difference(values, baseline)
    interval = stats.ttest_rel(values, baseline).confidence_interval(0.95)
    assert got.mean == pytest.approx(-0.0425)
    assert got.low == pytest.approx(interval.low, rel=1e-12)
    assert got.high == pytest.approx(interval.high, rel=1e-12)


def test_coverage_of_the_interval_over_synthetic_pairs() -> None:
    # With a true difference of 0.3 the interval must hold it in about 95 of 100 cases, also with 2 seeds.
    import random

    draw = random.Random(0)
    hits = 0
    for _ in range(1000):
        base = [draw.gauss(3, 1) for _ in range(2)]
        got = paired_difference([value + draw.gauss(0.3, 0.1) for value in base], base)
        hits += got.low <= 0.3 <= got.high
    assert 930 <= hits <= 970


def test_unequal_numbers_of_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(-0.3, -0.1, "lower"), (0.1, 0.3, "higher"), (-0.1, 0.3, "no difference seen"), (0.0, 0.4, "no difference seen")],
)
def test_verdict_says_what_the_interval_allows(low: float, high: float, word: str) -> None:
    difference = Interval((low + high) / 2, low, high)
    sentence = verdict("diff_v1", difference, seeds=3, surplus=0.0)
    words = [known for known in ("lower", "higher", "no difference seen") if known in sentence]
    assert words == [word]
    assert "parameters" not in sentence


def test_one_seed_claims_nothing() -> None:
    difference = paired_difference([2.0], [3.0])
    assert difference == Interval(-1.0, None, None)
    assert "no difference seen" in verdict("diff_v1", difference, seeds=1, surplus=0.0)


def test_a_gain_bought_with_parameters_is_visible() -> None:
    sentence = verdict("diff_v2", Interval(-0.2, -0.3, -0.1), seeds=3, surplus=0.081)
    assert "with +8.1% parameters" in sentence


def variant(losses: list[float], parameters: int) -> VariantResult:
    return VariantResult(
        parameters=parameters, val_loss=losses, attention_parameters=1, intermediate_size=1, bits_per_byte=losses,
        attention_backend="standard", train_tokens_per_second=1.0, train_peak_bytes=1, cache_bytes_per_token=1.0,
        model_flops_per_token=1, executed_flops_per_token=1, checkpoint_bytes=1, load_seconds=1.0,
        first_token_seconds=1.0,
    )  # fmt: skip


def test_pairs_need_the_baseline() -> None:
    rows = {name: variant([1.0, 2.0], 10) for name in ("diff_v1", "diff_v2")}
    assert pairs(rows) == {}
    rows["softmax"] = variant([1.5, 2.5], 8)
    found = pairs(rows)
    assert set(found) == {"diff_v1", "diff_v2"}
    assert found["diff_v1"].parameters_ratio == 1.25
    assert math.isclose(found["diff_v1"].val_loss_difference.mean, -0.5)
