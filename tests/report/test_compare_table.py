import math
from dataclasses import replace

import pytest
from support.synthetic_comparison import comparison

from diffattn.humanize import count, exact, flops, loss, seconds, signed, size
from diffattn.report.compare_table import MEASURES, cell, compare_rows
from diffattn.results.comparison import ComparisonResult, VariantResult


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (count(0), "0"),
        (count(999), "999"),
        (count(999.96), "1.00 k"),
        (count(999_499), "999 k"),
        (count(999_999), "1.00 M"),
        (count(13_123_000_000), "13.1 B"),
        (count(-3_021_312), "-3.02 M"),
        (size(1023), "1023 B"),
        (size(1024), "1 KiB"),
        (size(1_048_575), "1.00 MiB"),
        (size(4096), "4 KiB"),
        (flops(12_345_678), "12.3 MFLOP"),
        (flops(9_999_999), "10.0 MFLOP"),
        (seconds(0.0000421), "42.1 µs"),
        (seconds(0.99999), "1.00 s"),
        (seconds(59.99), "1 min 00 s"),
        (seconds(3599.9), "1 h 00 min"),
        (loss(3.41236), "3.4124"),
        (exact(0.1), "0.1"),
    ],
)
def test_number_is_written_with_three_digits_and_the_prefix_of_its_rounded_size(written: str, expected: str) -> None:
    assert written == expected


@pytest.mark.parametrize("formatter", [count, size, flops, seconds, loss, signed, exact])
def test_what_is_not_a_finite_number_gets_words(formatter) -> None:
    assert formatter(None) == "–"
    assert formatter(math.nan) == "not a number"
    assert formatter(math.inf) == "∞"


def test_small_difference_keeps_its_sign() -> None:
    assert signed(-0.00001).startswith("−")
    assert signed(0.00001).startswith("+")


def variant(**measured) -> VariantResult:
    return replace(comparison().variants["softmax"], **measured)


def of(**variants: VariantResult) -> ComparisonResult:
    return replace(comparison(), variants=variants, pairs={})


def test_rows_are_measures_and_columns_are_variants() -> None:
    rows = compare_rows(comparison())
    assert rows[0] == ["measure", "softmax", "diff_v1", "diff_v2"]
    assert len(rows) == 1 + len(MEASURES)
    assert {len(row) for row in rows} == {4}
    by_label = {row[0]: row[1:] for row in rows}
    assert by_label["Parameters"][0] == "3.02 M"
    assert by_label["KV cache (per token)"] == ["1.2 KiB"] * 3


def test_loss_is_the_mean_and_each_seed() -> None:
    rows = compare_rows(of(softmax=variant(val_loss=[3.5, 3.7]), diff_v1=variant(val_loss=[3.25])))
    assert rows[1] == ["Held-out loss (nats per token)", "3.6000 (3.5000, 3.7000)", "3.2500"]


def test_measure_that_no_variant_has_is_left_out_and_one_that_some_lack_is_a_dash() -> None:
    nothing = {measure.key: None for measure in MEASURES}
    result = of(softmax=variant(**nothing | {"parameters": 812}), diff_v1=variant(**nothing))
    assert compare_rows(result) == [["measure", "softmax", "diff_v1"], ["Parameters", "812", "–"]]


def test_ratio_is_to_the_baseline_and_says_when_nothing_changed() -> None:
    parameters = next(measure for measure in MEASURES if measure.key == "parameters")
    baseline = variant(parameters=1000)
    assert cell(parameters, variant(parameters=1000), baseline).ratio == "same"
    assert cell(parameters, variant(parameters=1310), baseline).ratio == "1.31×"
    assert cell(parameters, variant(parameters=1001), baseline).ratio == "1.0010×"
    assert cell(parameters, variant(parameters=1001), None).ratio == ""
    assert cell(parameters, variant(parameters=1001), variant(parameters=0)).ratio == ""
