"""Long context: the average loss up to each position of a long text, read in chunks with a cache.

Source: arXiv 2410.05258v2, section 3.3 and Figure 4 (cumulative average negative log-likelihood up to 64K tokens).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from diffattn.errors import ConfigError, UnsupportedError
from diffattn.probes.options import MOST_SAMPLES, StudyOptions, fitting_length
from diffattn.probes.study import Point, StudiedModel, Study
from diffattn.results.study import Axes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class LongContextOptions(StudyOptions):
    """The options of ``diffattn eval long_context``."""

    length: int | None = None
    """Tokens of a text. Default: 4096, or without --rope-base what the models can read where that is less."""
    samples: int = 8
    """Texts that are read."""
    chunk: int = 512
    """Tokens that are read at once."""
    rope_base: float | None = None
    """Another base of the rotary frequencies, to read beyond the positions that the model was trained on."""

    def __post_init__(self) -> None:
        self.check_bounds(samples=(1, MOST_SAMPLES), chunk=(1, 1_000_000))

    def fitted(self, positions: int | None) -> LongContextOptions:
        """Returns the options with a length that fits the models, or any where the rotary base is another."""
        limit = positions if self.rope_base is None else None
        return replace(self, length=fitting_length(self.length, limit, most=4096))


class LossByPosition(NamedTuple):
    """The mean loss of the first predictions of each text."""

    positions: list[int]
    """Numbers of predictions: powers of two, and the whole length."""
    loss: list[list[float]]
    """The mean losses of each text over its first so many predictions, in nats per token."""


def measure_long_context(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    *,
    length: int,
    chunk: int = 512,
    on_progress: Callable[[int, int], None] = lambda done, all_: None,
) -> LossByPosition:
    """Measures the loss by position.

    Args:
        model: a causal model of ``transformers``.
        texts: token ids, each of at least ``length`` + 1.
        length: predicted tokens of each text; beyond the model's positions where its rotary base was extended.
        chunk: tokens that are read at once, which bounds memory.
        on_progress: called with tokens done and tokens in all.

    Raises:
        ConfigError: a length or chunk below 1, no text, or a text that is too short.
    """
    import torch
    import torch.nn.functional as F
    from transformers import DynamicCache

    if length < 1 or chunk < 1 or not texts or min(len(ids) for ids in texts) <= length:
        shortest = min((len(ids) for ids in texts), default=0)
        raise ConfigError(
            f"length is {length}, chunk is {chunk}, and the shortest of {len(texts)} texts has {shortest} tokens",
            "length and chunk of at least 1, and texts of more tokens than length",
            "change --length or --chunk",
        )
    device = model.device
    positions = sorted({*(2**power for power in range(length.bit_length())), length})
    losses = []
    for index, ids in enumerate(texts):
        cache, parts = DynamicCache(config=model.config), []
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            given = ids[None, start:stop].to(device)
            with torch.no_grad():
                logits = model(input_ids=given, past_key_values=cache, use_cache=True).logits[0].float()
            parts.append(F.cross_entropy(logits, ids[start + 1 : stop + 1].to(device), reduction="none").cpu())
            on_progress(index * length + stop, len(texts) * length)
        total = torch.cat(parts).double().cumsum(0)
        losses.append([(total[position - 1] / position).item() for position in positions])
    return LossByPosition(positions, losses)


def with_rope_base(model: PreTrainedModel, base: float) -> PreTrainedModel:
    """Returns the model with another base of its rotary frequencies; it shares the weights of the one given.

    Raises:
        UnsupportedError: a model without rotary positions of the plain kind.
    """
    import torch

    parameters = getattr(model.config, "rope_parameters", None)
    if not parameters or parameters.get("rope_type", "default") != "default":
        raise UnsupportedError(
            f"the positions of {type(model).__name__} are not plain rotary ones, so they have no base to change",
            "rope_type 'default'",
            "leave --rope-base out",
        )
    config = copy.deepcopy(model.config)
    config.rope_parameters["rope_theta"] = base
    with torch.device("meta"):
        extended = type(model)(config)
    extended.load_state_dict(model.state_dict(), assign=True)
    extended.tie_weights()
    extended.get_decoder().rotary_emb = type(model.get_decoder().rotary_emb)(config=config)
    return extended.to(model.device).eval()


def _measure(subject: StudiedModel, options: LongContextOptions) -> Iterator[Point]:
    """Yields the mean loss up to each position."""
    model, length = subject.model, options.length
    assert length is not None
    if options.rope_base is not None:
        model = with_rope_base(model, options.rope_base)
    texts = subject.first_blocks(options.samples, length + 1)
    found = measure_long_context(model, texts, length=length, chunk=options.chunk, on_progress=subject.on_progress)
    for index, position in enumerate(found.positions):
        yield Point("loss up to a position, nats per token", position, [losses[index] for losses in found.loss])


STUDY = Study(
    name="long_context",
    title="Loss over a long text",
    sentence="Measure the mean loss up to each position of a long text.",
    source="arXiv 2410.05258v2, section 3.3 and Figure 4",
    options=LongContextOptions,
    measure=_measure,
    axes=Axes(x="position", y="", by="", logarithmic=True),
)
