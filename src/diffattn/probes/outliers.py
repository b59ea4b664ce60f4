"""Activation outliers: the largest magnitudes of attention logits and hidden states over a long text, streamed.

Attention logits are the scaled scores ahead of the softmax, of every visible query-key pair and of both maps; hidden
states are what the layers pass on. The largest are exact. The median comes from a histogram of the magnitudes' leading
bits, whose bins are 0.8% wide, over every ``median_rows``-th row of the logits (the layer's number says which).

Source: arXiv 2410.05258v2, section 3.7 and Table 5 (top 1, 2, 3, 10, 100 and the median of the magnitudes).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from diffattn.errors import DataError
from diffattn.probes.options import MOST_TOGETHER, StudyOptions, fitting_length
from diffattn.probes.study import Point, StudiedModel, Study
from diffattn.results.study import Axes

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from diffattn.probes.attention_calls import LayerCall

RANKS = (1, 2, 3, 10, 100)
# The 8 bits of the exponent and the first 7 of the fraction of a float32, its sign being gone: those of a bfloat16.
_BINS = 1 << 15


@dataclass(frozen=True, kw_only=True)
class OutlierOptions(StudyOptions):
    """The options of ``diffattn eval outliers``."""

    tokens: int = 400_000
    """Tokens to read, at least."""
    context: int | None = None
    """Tokens that are read at once. Default: 1024, or what the models can read where that is less."""
    batch_size: int = 4
    """Blocks that are read together."""

    def __post_init__(self) -> None:
        self.check_bounds(tokens=(1, 10**12), batch_size=(1, MOST_TOGETHER))

    def fitted(self, positions: int | None) -> OutlierOptions:
        """Returns the options with a context that fits the models."""
        return replace(self, context=fitting_length(self.context, positions))


class Outliers(NamedTuple):
    """The largest magnitudes of a model, by name: ``top_1`` … ``top_100``, as many as there are, and ``median``."""

    tokens: int
    """Tokens that were read."""
    attention_logits: dict[str, float]
    """The scaled scores ahead of the softmax."""
    hidden_states: dict[str, float]
    """The outputs of the layers."""


class Magnitudes:
    """The largest magnitudes of all numbers that were added, and their median; finite numbers only."""

    def __init__(self, keep: int = max(RANKS)) -> None:
        import torch

        self._keep = keep
        self._largest = torch.zeros(0)
        self._least = 0.0
        self._bins = torch.zeros(_BINS, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Takes the values into account for the largest."""
        import torch

        if not values.numel():
            return
        # Nearly every block has none that are large enough; one pass at the speed of memory finds that out.
        least, greatest = (bound.item() for bound in values.aminmax())
        full = len(self._largest) == self._keep
        if full and max(-least, greatest) <= self._least:
            return
        magnitudes = values.abs().flatten().float()
        large = magnitudes[magnitudes > self._least] if full else magnitudes
        large = large.topk(min(self._keep, large.numel())).values.cpu()
        self._largest = torch.cat([self._largest, large]).sort(descending=True).values[: self._keep]
        self._least = self._largest[-1].item()

    def add_to_median(self, values: Tensor) -> None:
        """Takes the values into account for the median."""
        import torch

        bins = values.abs().float().flatten().view(torch.int32) >> 16
        self._bins += torch.bincount(bins, minlength=_BINS).cpu()

    def summary(self) -> dict[str, float]:
        """Returns ``top_1`` … ``top_100``, as many as there are, and ``median``."""
        import torch

        found = {f"top_{rank}": self._largest[rank - 1].item() for rank in RANKS if rank <= len(self._largest)}
        half = (int(self._bins.sum()) + 1) // 2
        middle = int((self._bins.cumsum(0) >= half).nonzero()[0])
        # The middle of the bin.
        bits = torch.tensor((middle << 16) + (1 << 15), dtype=torch.int32)
        return found | {"median": bits.view(torch.float32).item()}


def measure_outliers(
    model: PreTrainedModel,
    blocks: Iterable[Tensor],
    *,
    tokens: int,
    median_rows: int = 16,
    on_progress: Callable[[int, int], None] = lambda done, all_: None,
) -> Outliers:
    """Streams a text through a model.

    Args:
        model: a model whose attention can be read.
        blocks: token ids (B, T), as many as it takes.
        tokens: the number of tokens to read, at least.
        median_rows: one in so many rows of the logits counts towards their median.
        on_progress: called with tokens done and tokens in all.

    Raises:
        DataError: fewer tokens than asked for.
        UnsupportedError: a model whose attention cannot be read.
    """
    import torch

    from diffattn.probes.attention_calls import served_by

    logits, hidden, done = Magnitudes(), Magnitudes(), 0
    device = model.device

    def read(call: LayerCall) -> None:
        for which in range(len(call.queries)):
            for scores in call.seen_scores(which):
                logits.add(scores)
            some = range(call.layer % median_rows, call.queries[0].shape[1], median_rows)
            scores = call.logits(which, some)
            logits.add_to_median(scores[scores > -torch.inf])

    def pass_on(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        states = output[0] if isinstance(output, tuple) else output
        hidden.add(states)
        hidden.add_to_median(states)

    hooks = [layer.register_forward_hook(pass_on) for layer in model.get_decoder().layers]
    try:
        with torch.no_grad(), served_by(model, read):
            for ids in blocks:
                model(input_ids=ids.to(device), use_cache=False, logits_to_keep=1)
                done += ids.numel()
                on_progress(min(done, tokens), tokens)
                if done >= tokens:
                    break
    finally:
        for hook in hooks:
            hook.remove()
    if done < tokens:
        given = f"the held-out text has {done} tokens in whole blocks"
        raise DataError(given, str(tokens), "give more text, or ask for fewer --tokens")
    return Outliers(done, logits.summary(), hidden.summary())


def _batches(subject: StudiedModel, options: OutlierOptions) -> Iterator[Tensor]:
    """Yields the held-out text as batches of blocks."""
    import torch

    assert options.context is not None
    blocks = subject.blocks(options.context)
    while batch := list(itertools.islice(blocks, options.batch_size)):
        yield torch.stack(batch)


def _measure(subject: StudiedModel, options: OutlierOptions) -> Iterator[Point]:
    """Yields the largest magnitudes by their rank, and the median."""
    batches = _batches(subject, options)
    found = measure_outliers(subject.model, batches, tokens=options.tokens, on_progress=subject.on_progress)
    for panel, magnitudes in (("attention logits", found.attention_logits), ("hidden states", found.hidden_states)):
        for name, value in magnitudes.items():
            rank = name.removeprefix("top_")
            if rank == "median":
                yield Point(f"{panel}, median", 1, [value])
            else:
                yield Point(panel, int(rank), [value])


STUDY = Study(
    name="outliers",
    title="Activation outliers",
    sentence="Measure the largest attention logits and hidden states of a model.",
    source="arXiv 2410.05258v2, section 3.7 and Table 5",
    options=OutlierOptions,
    measure=_measure,
    axes=Axes(x="rank", y="magnitude", by="", logarithmic=True),
)
