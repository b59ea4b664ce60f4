"""A shape from a number of parameters."""

import pytest

from diffattn.errors import ConfigError
from diffattn.plan.cost import count_parameters
from diffattn.plan.rule import parse_count, shape_about


@pytest.mark.parametrize(("text", "count"), [("200k", 200_000), ("1.3B", 1_300_000_000), ("8M", 8_000_000),
                                             ("4096", 4096), (7, 7), ("2T", 2 * 10**12), ("1_000", 1000)])  # fmt: skip
def test_counts_are_read_as_people_write_them(text: str | int, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "-3", "0", "0.2", "M", "3X", "1.2.3", "nan", None])
def test_what_is_no_count_is_one_line(text: object) -> None:
    with pytest.raises(ConfigError, match="wanted a whole number from 1"):
        parse_count(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("wanted", [60e6, 162e6, 1.3e9, 6.8e9, 11e9, 70e9])
def test_the_shape_is_near_the_number_and_takes_every_variant(wanted: float) -> None:
    shape = shape_about(wanted)
    assert count_parameters(shape, "softmax").total == pytest.approx(wanted, rel=0.15)
    for attention in ("diff_v1", "diff_v2"):
        shape.check_variant(attention)
    assert shape.num_heads * shape.head_dim == shape.hidden_size
    assert 0 <= 3 * shape.intermediate_size - 8 * shape.hidden_size < 24


def test_the_rule_is_the_papers_shape_at_its_width_of_4096() -> None:
    shape = shape_about(6.837e9)
    assert (shape.hidden_size, shape.num_layers, shape.num_heads, shape.head_dim) == (4096, 32, 32, 128)


def test_non_embedding_leaves_the_vocabulary_out() -> None:
    small, large = (shape_about(1e6, non_embedding=True, vocab_size=size) for size in (300, 50_000))
    assert small.hidden_size == large.hidden_size
    sizes = [shape_about(n * 1e5, non_embedding=True).hidden_size for n in range(1, 60)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(("wanted", "non_embedding"), [(1e3, True), (1e5, False), (1e16, False)])
def test_what_the_rule_does_not_reach_is_one_line(wanted: float, non_embedding: bool) -> None:
    with pytest.raises(ConfigError, match="parameters, which the rule reaches") as caught:
        shape_about(wanted, non_embedding=non_embedding)
    assert "\n" not in str(caught.value)
