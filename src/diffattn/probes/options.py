"""What the studies of ``diffattn eval`` are asked: their options, in a file that imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from diffattn.errors import ConfigError

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
BITS = (16, 8, 6, 4)
# Beyond these a study is a slip of the hand: it would take months, or more memory than there is.
MOST_SAMPLES, MOST_TOGETHER = 1_000_000, 65_536


def fitting_length(asked: int | None, positions: int | None, *, most: int = 1024) -> int:
    """What is asked for where it fits into a model, and what fits where nothing is.

    Args:
        asked: tokens; None: ``most``, or ``positions`` where these are fewer.
        positions: the model's ``max_position_embeddings``; None: any number.

    Raises:
        ConfigError: more than the model's positions, or none.

    >>> fitting_length(None, 512), fitting_length(300, 512), fitting_length(None, None)
    (512, 300, 1024)
    """
    if asked is None:
        return most if positions is None else min(most, positions)
    if asked < 1:
        raise ConfigError(f"a length of {asked} tokens is asked for; wanted at least 1")
    if positions is not None and asked > positions:
        raise ConfigError(
            f"a length of {asked} tokens is asked for; wanted at most {positions}, the model's max_position_embeddings"
        )
    return asked


def _bounded(options: object, **most: int) -> None:
    """Refuse counts with which a study would never end, or not fit into any memory.

    >>> _bounded(NoiseOptions(), samples=10)
    Traceback (most recent call last):
    diffattn.errors.ConfigError: samples is 50; wanted at most 10
    """
    for name, limit in most.items():
        value = getattr(options, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number > limit:
                raise ConfigError(f"{name} is {number}; wanted at most {limit:,}")


@dataclass(frozen=True, kw_only=True)
class NoiseOptions:
    """What is asked; the fields are the options of ``diffattn eval noise`` and ``noise_by_head``."""

    length: int | None = None
    """Tokens of a prompt with its question. Default: 1024, or what the models can read where that is less."""
    depths: tuple[float, ...] = DEPTHS
    """Where the answer is hidden: 0 is the beginning of the text, 1 its end."""
    samples: int = 50
    """Prompts at each depth."""
    batch_size: int = 4
    """Prompts that are read together."""
    seed: int = 0
    """Number that decides the prompts; models with the same tokenizer get the same ones."""

    def __post_init__(self) -> None:
        _bounded(self, samples=MOST_SAMPLES, batch_size=MOST_TOGETHER)
        if self.samples < 1 or self.batch_size < 1 or not self.depths:
            raise ConfigError(
                f"samples is {self.samples}, batch_size {self.batch_size}, with {len(self.depths)} depths; wanted at "
                "least one of each"
            )


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """What is asked; the fields are the options of ``diffattn eval retrieval``."""

    lengths: tuple[int, ...] = ()
    """Tokens of a prompt with its question and answer. Default: 1024, or what the models can read where that is
    less."""
    depths: tuple[float, ...] = DEPTHS
    """Where the first number that is asked for lies: 0 is the beginning of the text, 1 its end."""
    tasks: tuple[tuple[int, int], ...] = ((1, 1), (2, 2), (4, 2), (6, 2))
    """Pairs: how many numbers are hidden, and how many of them are asked for."""
    samples: int = 50
    """Prompts for each length, depth and task."""
    batch_size: int = 16
    """Prompts that are answered together."""
    seed: int = 0
    """Number that decides the prompts; models with the same tokenizer get the same ones."""

    def __post_init__(self) -> None:
        _bounded(self, samples=MOST_SAMPLES, batch_size=MOST_TOGETHER)
        if min(self.samples, self.batch_size) < 1 or not (self.depths and self.tasks):
            raise ConfigError(
                f"samples is {self.samples}, batch_size {self.batch_size}, with "
                f"{len(self.depths)} depths and {len(self.tasks)} tasks; wanted at least one of each"
            )


@dataclass(frozen=True, kw_only=True)
class IclOptions:
    """What is asked; the fields are the options of ``diffattn eval icl``."""

    shots: tuple[int, ...] = (4, 8, 16, 32)
    """How many examples a prompt has; several numbers are tried one after another."""
    queries: int = 100
    """Texts to classify at each number of examples."""
    permutations: int = 5
    """Orders of the examples that are tried: so many random ones, and so many by class."""
    seed: int = 0
    """Number that decides what is drawn."""
    data: str | None = None
    """A file of JSON lines with texts and labels, or a data set's id (id:config:split). Default: a made-up task."""
    labels: int = 4
    """Classes of the made-up task, 2 to 10."""
    text_column: str = "text"
    """Field of --data that holds the text."""
    label_column: str = "label"
    """Field of --data that holds the class."""

    def __post_init__(self) -> None:
        _bounded(self, shots=100_000, queries=MOST_SAMPLES, permutations=10_000)
        if not self.shots or min(*self.shots, self.queries, self.permutations) < 1:
            raise ConfigError(
                f"shots is {self.shots}, queries {self.queries}, permutations {self.permutations}; wanted each at "
                "least 1"
            )


@dataclass(frozen=True, kw_only=True)
class OutlierOptions:
    """Of ``diffattn eval outliers``."""

    tokens: int = 400_000
    """Tokens to read, at least."""
    context: int | None = None
    """Tokens that are read at once. Default: 1024, or what the models can read where that is less."""
    batch_size: int = 4
    """Blocks that are read together."""

    def __post_init__(self) -> None:
        _bounded(self, tokens=10**12, batch_size=MOST_TOGETHER)
        if self.tokens < 1:
            raise ConfigError(f"tokens is {self.tokens}; wanted at least 1")


@dataclass(frozen=True, kw_only=True)
class LowBitOptions:
    """Of ``diffattn eval low_bit``."""

    bits: tuple[int, ...] = BITS
    """Numbers of bits to try; 16 leaves the logits as they are."""
    context: int | None = None
    """Tokens that are read at once. Default: 1024, or what the models can read where that is less."""
    samples: int = 32
    """How many blocks of --context tokens are read."""

    def __post_init__(self) -> None:
        _bounded(self, samples=MOST_SAMPLES)


@dataclass(frozen=True, kw_only=True)
class LongContextOptions:
    """Of ``diffattn eval long_context``."""

    length: int | None = None
    """Tokens of a text. Default: 4096, or without --rope-base what the models can read where that is less."""
    samples: int = 8
    """How many texts are read."""
    chunk: int = 512
    """Tokens that are read at once."""
    rope_base: float | None = None
    """Another base of the rotary frequencies, to read beyond the positions that the model was trained on."""

    def __post_init__(self) -> None:
        _bounded(self, samples=MOST_SAMPLES, chunk=1_000_000)


@dataclass(frozen=True, kw_only=True)
class StandardOptions:
    """Of ``diffattn eval standard``."""

    tasks: tuple[str, ...] = ("text_continuation", "text_likelihood")
    """Names of tasks of lm-eval; paper means the seven of the paper's Table 1, which need a network."""
    shots: int | None = None
    """Solved examples in each prompt. Default: the task's own number."""
    limit: int | None = None
    """Questions of each task. Default: all."""
    batch_size: int = 8
    """Texts that are read together."""
    seed: int = 0
    """Number that decides what is drawn."""

    def __post_init__(self) -> None:
        _bounded(self, shots=1000, limit=10**9, batch_size=MOST_TOGETHER)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"tasks is {' '.join(self.tasks) or 'empty'}; wanted at least one, each once")
        for name, value, least in (
            ("limit", self.limit, 1),
            ("shots", self.shots, 0),
            ("batch_size", self.batch_size, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; wanted at least {least}")


OPTIONS: dict[str, type] = {
    "retrieval": RetrievalOptions,
    "noise": NoiseOptions,
    "noise_by_head": NoiseOptions,
    "icl": IclOptions,
    "outliers": OutlierOptions,
    "low_bit": LowBitOptions,
    "long_context": LongContextOptions,
    "standard": StandardOptions,
}


def fitted(options: Any, positions: int | None) -> Any:
    """The options with their length, where it is left open, made to fit models with so many positions.

    Raises: `ConfigError` as `fitting_length`.
    """
    if isinstance(options, RetrievalOptions):
        return replace(options, lengths=tuple(fitting_length(each, positions) for each in options.lengths or (None,)))
    if isinstance(options, NoiseOptions):
        return replace(options, length=fitting_length(options.length, positions))
    if isinstance(options, OutlierOptions | LowBitOptions):
        return replace(options, context=fitting_length(options.context, positions))
    if isinstance(options, LongContextOptions):
        limit = positions if options.rope_base is None else None
        return replace(options, length=fitting_length(options.length, limit, most=4096))
    return options
