"""The options of a training run beside its recipe: the model and the text, in a file that imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffattn.errors import ConfigError
from diffattn.model.options import MATCHES
from diffattn.names import several
from diffattn.variants import DEFAULT, VARIANTS

NO_TRACKER = "none"
TRACKERS = (NO_TRACKER, "tensorboard", "trackio", "wandb")
"""The values of ``track``."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The model that :func:`diffattn.train.single.train_shape` builds, or the one that
    :func:`diffattn.train.continued.continue_training` trains on, and the text that it reads."""

    source: Path | None = field(default=None, metadata={"option": "from"})
    """Folder of a model with its tokenizer to train on, in place of a new model of ``shape``. Then ``learning_rate`` is
    0.0001 and ``context`` at most 512, unless they are given. Default: none."""
    shape: str = "3M"
    """Size of the softmax model: a preset (300K, 3M, 30M, 830M, 1.4B, ...) or a TOML file."""
    attention: str = field(default=DEFAULT, metadata={"choices": VARIANTS})
    """The attention of the model, one of the variants."""
    match: str = field(default="parameters", metadata={"choices": MATCHES})
    """Way to match the softmax model. parameters: V2 gets a narrower feed-forward network, and diff_gda a wider one, so
    that all have equally many parameters. shape: all keep its width, and V2 has more parameters."""
    text: tuple[str, ...] = ("sotu",)
    """Text to read, of one source or several: a file, a folder, a pattern of files, or a data set's id; several may
    have weights, such as a.txt:0.7 b.txt:0.3 (docs/text.md). sotu is 12 MB of speeches that come with diffattn."""
    text_column: str = field(default="text", metadata={"option": "field"})
    """Name of the field that holds the text, where the text is rows of JSON, CSV or Parquet."""
    context: int | None = None
    """Tokens that the model reads at once. Default: as many as the shape says."""
    tokenizer: Path | None = None
    """Folder of a tokenizer for a new model, which may have as many tokens as the shape's vocab_size or fewer. Default:
    one is trained on the text."""
    lossy_tokenizer: bool = False
    """Use a tokenizer that loses more than 1% of the text; only with ``source`` or ``tokenizer``."""
    chat_template: Path | None = None
    """File of a chat template (Jinja), which writes the conversations of the text and goes into the model's folder, for
    generate and serve. Default: the tokenizer's own, if it has one."""
    track: tuple[str, ...] = field(default=(NO_TRACKER,), metadata={"choices": TRACKERS})
    """Programs that show the metrics too, one or several; their files lie in the run folder, and metrics.jsonl is
    written anyway."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", several(self.text))


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """The place where a run is trained; it changes no result.

    Raises:
        ConfigError: ranks without Ray, or fewer than one.
    """

    on: Literal["here", "ray"] = "here"
    """Place where the run is trained. here: this process, or those of torchrun. ray: processes that Ray starts, on the
    cluster that runs here or that RAY_ADDRESS names, else on this machine; Ray has to be installed."""
    ranks: int | None = None
    """Processes that Ray starts, with --on ray. Default: one for each GPU of the cluster; without any, one for each
    processor thread, as far as they can share the batch equally."""

    def __post_init__(self) -> None:
        if self.on not in ("here", "ray"):
            raise ConfigError(f"on is {self.on!r}", "here or ray", "change --on")
        if self.ranks is not None and self.on != "ray":
            raise ConfigError(
                f"--ranks {self.ranks} without --on ray", "--on ray beside it", "or start the ranks with torchrun"
            )
        if self.ranks is not None and self.ranks < 1:
            raise ConfigError(f"ranks is {self.ranks}", "at least 1", "leave --ranks out")
