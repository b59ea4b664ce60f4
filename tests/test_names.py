"""Names and numbers as people write them."""

from decimal import Decimal
from pathlib import Path

import pytest

from diffattn.cli.arguments import check, chosen, parse
from diffattn.cli.compare import compare
from diffattn.cli.main import VERBS, load
from diffattn.cli.options import options_of
from diffattn.cli.train import train
from diffattn.errors import ConfigError
from diffattn.names import SHORT_DTYPES, one_of
from diffattn.plan.hardware import MACHINES
from diffattn.plan.named_model import load_shape
from diffattn.plan.rule import parse_count
from diffattn.plan.shape import ModelShape, presets
from diffattn.quantities import AmbiguousError, read_quantity, short
from diffattn.scaling.options import AblationOptions, LadderOptions
from diffattn.study.options import CompareOptions
from diffattn.train.options import TrainOptions
from diffattn.variants import VARIANTS


def test_every_name_is_found_in_any_case_and_without_its_marks() -> None:
    for names in (VARIANTS, list(MACHINES)):
        for name in names:
            for text in (name, name.upper(), name.lower(), f" {name} ", name.replace("_", "-"), name.replace(" ", "")):
                assert one_of(text, names) == name


def test_a_part_counts_from_the_start_of_a_word_and_has_to_be_of_one_name() -> None:
    assert one_of("v2", VARIANTS) == "diff_v2"
    assert one_of("gda", VARIANTS) == "diff_gda"
    for text in ("diff", "diffv", "iff_v1", "1", "d", "", " ", "_", "x" * 5000):
        with pytest.raises(ConfigError) as caught:
            one_of(text, VARIANTS)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6.8B", 6_800_000_000), ("6,8b", 6_800_000_000), ("6 800 000 000", 6_800_000_000), ("1_000", 1000),
        ("6,837,000,000", 6_837_000_000), ("6.837.000.000", 6_837_000_000), ("6'837'000", 6_837_000), ("1e6", 10**6),
        ("1.5E+9", 1_500_000_000), (" 8M ", 8_000_000), ("4,096", 4096), ("0.5k", 500), (7.0, 7),
        ("1,234.5k", 1_234_500),
    ],
)  # fmt: skip
def test_counts_are_read_as_people_write_them(text: str | float, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize(
    "text",
    ["1,2,3", "1.2.3", "12,34,567", "6,837B", "1.5", "-1", "+", "1e400", "9" * 61, "9" * 5000, "1e19", "nan", "inf",
     "0x10", "1 2", "1__0", "8 GB", "٣x", "1.0005k", "0", "0M", "", "."],
)  # fmt: skip
def test_what_is_no_count_is_one_short_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_count(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_comma_before_three_digits_is_not_guessed() -> None:
    assert read_quantity("1,234", decimal_comma=True) == (Decimal("1.234"), "")
    assert read_quantity("1,234", decimal_comma=False) == (Decimal(1234), "")
    with pytest.raises(AmbiguousError, match=r"write 1\.234 or 1234"):
        read_quantity("1,234")
    assert len(short("9" * 10_000)) < 60


def test_presets_are_found_in_any_case_and_by_their_count() -> None:
    for name in presets():
        for text in (name, name.lower(), name.replace(".", ",")):
            assert load_shape(text) == ModelShape.preset(name)
    assert load_shape("0.3M") == ModelShape.preset("300K")
    for text in ("", "3", "M", "3X", "nan"):
        with pytest.raises(ConfigError, match="preset"):
            load_shape(text)


def test_a_choice_of_an_option_is_found_in_any_case(tmp_path: Path) -> None:
    words = ["--attention", "DIFF_V1", "--device=CPU", "--dtype", "BFloat", "--out", str(tmp_path), "--json"]
    meant = ["--attention", "diff_v1", "--device=cpu", "--dtype", "bfloat16", "--out", str(tmp_path), "--json"]
    options = options_of(train)
    assert chosen(options, words) == meant
    assert check("train", options, meant) == {"attention", "device", "dtype", "out", "json"}
    # A word behind the one value that the option takes, or behind --, is no choice.
    assert chosen(options, ["--attention", "V2", "V2", "--", "V2"]) == ["--attention", "diff_v2", "V2", "--", "V2"]


def test_short_names_of_number_formats_are_taken_by_every_verb_that_has_the_format() -> None:
    taken = 0
    for verb in VERBS:
        options = options_of(load(verb))
        for option in options:
            for brief, name in SHORT_DTYPES.items():
                if name in option.choices:
                    assert chosen(options, [option.name, brief.upper()]) == [option.name, name]
                    taken += 1
    assert taken >= 2 * 13


def test_a_choice_that_two_names_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="wanted one of softmax, diff_v1, diff_v2, diff_gda, diff_gda_v2, gated"):
        check("train", options_of(train), ["--attention", "diff"])
    assert parse("compare", compare, ["--match", "Shape", "--variants", "SOFTMAX", "V1"]) is not None


def test_variants_are_found_in_any_case() -> None:
    assert CompareOptions(variants=("Softmax", "V1", "DIFF-V2")).variants == ("softmax", "diff_v1", "diff_v2")
    assert LadderOptions(text="sotu", variants=("SOFTMAX", "DIFF_V1+NO_NORM")).variants == (
        "softmax",
        "diff_v1+no_norm",
    )
    with pytest.raises(ConfigError, match="each"):
        CompareOptions(variants=("diff_v1", "DIFF_V1"))


@pytest.mark.parametrize("options", [TrainOptions, CompareOptions, LadderOptions, AblationOptions])
def test_one_text_may_be_given_as_a_name(options: type) -> None:
    assert options().text == ("sotu",)
    assert options(text="a.txt").text == options(text=["a.txt"]).text == ("a.txt",)
    assert options(text=["a.txt:1", Path("b.txt")]).text == ("a.txt:1", "b.txt")
    if options is AblationOptions:
        assert options(text="a.txt").ladder().text == ("a.txt",)
