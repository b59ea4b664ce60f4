"""A study for ``diffattn eval``: the share of attention that each layer spends on the first token of a text.

Trained models often look at the first token where nothing else is of use. The share is that of absolute weights, so
that it lies between 0 and 1 for a difference of two maps too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diffattn.probes.options import StudyOptions, fitting_length
from diffattn.probes.study import Point, StudiedModel, Study
from diffattn.results.study import Axes

if TYPE_CHECKING:
    from diffattn.probes.attention_calls import LayerCall


@dataclass(frozen=True, kw_only=True)
class FirstTokenOptions(StudyOptions):
    """The options of ``diffattn eval first_token``: each field, with its sentence, is one of the command line."""

    context: int | None = None
    """Tokens of a text. Default: 256, or what the models can read where that is less."""
    samples: int = 8
    """Texts that are read."""

    def __post_init__(self) -> None:
        self.check_bounds(samples=(1, 10_000))

    def fitted(self, positions: int | None) -> FirstTokenOptions:
        """Returns the options with a length that fits the models."""
        return replace(self, context=fitting_length(self.context, positions, most=256))


def measure(subject: StudiedModel, options: FirstTokenOptions) -> Iterator[Point]:
    """Yields the share of each layer: a point for each layer, with a value for each text."""
    # Imported here, so that lists and help do not wait for it.
    import torch

    from diffattn.probes.attention_calls import served_by

    assert options.context is not None
    shares: dict[int, list[float]] = {}

    def read(call: LayerCall) -> None:
        first = every = 0.0
        for rows in call.row_blocks():
            weights = call.map_diff(rows).abs()
            first += weights[..., 0].sum().item()
            every += weights.sum().item()
        shares.setdefault(call.layer, []).append(first / every)

    blocks = subject.first_blocks(options.samples, options.context)
    with torch.no_grad(), served_by(subject.model, read):
        for done, block in enumerate(blocks, 1):
            subject.model(input_ids=block[None].to(subject.model.device), use_cache=False, logits_to_keep=1)
            subject.on_progress(done, len(blocks))
    for layer, values in shares.items():
        yield Point("first token", layer, values)


STUDY = Study(
    name="first_token",
    title="Attention to the first token",
    sentence="Measure how much of its attention each layer spends on the first token.",
    source="arXiv 2309.17453 (attention sinks)",
    options=FirstTokenOptions,
    measure=measure,
    axes=Axes(x="layer", y="share of attention", by="", logarithmic=False),
)
