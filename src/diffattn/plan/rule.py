"""A shape from a number of parameters: one stated rule for depth, width and heads, for ladders and for "about 1.3B"."""

from __future__ import annotations

import math

from diffattn.errors import ConfigError
from diffattn.plan.cost import count_parameters
from diffattn.plan.shape import ModelShape
from diffattn.quantities import COUNTS, short, whole
from diffattn.variants import BASELINE

PAPER_VOCABULARY = 100_288


def parse_count(text: str | int | float) -> int:
    """Reads a count as people write it: 200k, 1.3B, 6,8B, 8M, 4096; k, M, B and T are powers of 1000.

    Raises:
        ConfigError: text that is no whole number from 1 to 10^18.

    >>> parse_count("1.3B"), parse_count("6,8b"), parse_count("200k"), parse_count("4,096")
    (1300000000, 6800000000, 200000, 4096)
    """
    value = whole(text, COUNTS)
    if value is None:
        raise ConfigError(
            f"{short(text)} given as a count", "a whole number from 1", "write it such as 4096, 200k, 8M or 1.3B"
        )
    return value


def shape_about(
    parameters: float,
    *,
    non_embedding: bool = False,
    vocab_size: int = PAPER_VOCABULARY,
    context: int = 2048,
    group: int = 1,
) -> ModelShape:
    """Returns the shape nearest to a number of parameters, by one rule.

    Width D is a multiple of 16 below 512, of 128 below 2048, else of 256. Depth ``L = round(√D / 2)``, at least 2,
    which is the paper's 32 layers at its width of 4096 (and 36 where it has 40 at 5120); from D = 2048 on up to two
    layers more or fewer, where that is nearer. Heads aim at a width of 32 below D = 512, 64 below 2048, else 128: n is
    the even divisor of D nearest D / aim, with an even head width. FFN width ``8D/3`` to the next multiple of 8. As
    many key/value heads as heads, or one for each ``group`` of heads, whose number is then a multiple of 2 · group;
    embedding tied.

    Args:
        parameters: wanted, of the softmax Transformer; matched V1 and V2 have as many.
        non_embedding: whether ``parameters`` counts everything but the embedding. Default: False, all.
        vocab_size: rows of the embedding. Default: 100,288, the paper's.
        context: longest sequence, in tokens. Default: 2048.
        group: query heads for each key/value head. Default: 1.

    Raises:
        ConfigError: fewer parameters than the smallest shape of the rule has by more than half, or more than the
            widest by more than half.

    Source: the rule is ours, read off arXiv 2410.05258v2, Table 10.

    >>> shape = shape_about(200e3, non_embedding=True, vocab_size=1024)
    >>> shape.hidden_size, shape.num_layers, shape.num_heads, shape.head_dim
    (64, 4, 4, 16)
    """

    def size(shape: ModelShape) -> int:
        counted = count_parameters(shape, BASELINE)
        return counted.non_embedding if non_embedding else counted.total

    # Those that 2 · group heads of an even width divide.
    widths = [width for width in _WIDTHS if width % (4 * group) == 0]
    low, high = 0, len(widths) - 1
    smallest, largest = (size(_shape(widths[end], vocab_size, context, group)) for end in (low, high))
    if not smallest / 1.5 <= parameters <= 1.5 * largest:
        raise ConfigError(
            f"{parameters:g} {'non-embedding ' if non_embedding else ''}parameters with a vocabulary of {vocab_size}",
            f"from {smallest} to {largest:.2g} parameters, which the rule reaches with it",
            "change one of the two, or write the shape as a .toml file",
        )
    while low < high:
        middle = (low + high) // 2
        if size(_shape(widths[middle], vocab_size, context, group)) < parameters:
            low = middle + 1
        else:
            high = middle
    # Widths are far apart from 2048 on, so there a few layers more or less come nearer to the number.
    candidates = [
        _shape(widths[index], vocab_size, context, group, more)
        for index in (max(0, low - 1), low)
        for more in ((0,) if widths[index] < 2048 else (0, -1, 1, -2, 2))
    ]
    return min(candidates, key=lambda shape: abs(math.log(size(shape) / parameters)))


_WIDTHS = (*range(16, 512, 16), *range(512, 2048, 128), *range(2048, 65_537, 256))


def _shape(width: int, vocab_size: int, context: int, group: int, more_layers: int = 0) -> ModelShape:
    aim = 32 if width < 512 else 64 if width < 2048 else 128
    fitting = [n for n in range(2 * group, width // 2 + 1, 2 * group) if width % n == 0 and (width // n) % 2 == 0]
    heads = min(fitting, key=lambda n: (abs(math.log(n * aim / width)) if n >= 4 else 9.0, -n))
    return ModelShape(
        hidden_size=width,
        num_layers=max(2, round(math.sqrt(width) / 2)) + more_layers,
        num_heads=heads,
        num_kv_heads=heads // group,
        intermediate_size=math.ceil(8 * width / 3 / 8) * 8,
        vocab_size=vocab_size,
        max_position_embeddings=context,
        name=f"rule-{width}",
        source="diffattn's rule for a number of parameters: L = round(sqrt(D) / 2), FFN 8D/3",
    )
