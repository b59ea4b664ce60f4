"""Attention to the answer and to noise: where the last token of a prompt looks, for a needle at several depths.

The maps' last row is summed over five spans of the prompt (the first token, the text before the needle, the needle,
the text behind it, the question), averaged over heads and layers and divided by its sum: shares, of which ``noise`` is
that of the two texts. A differential model has them of map_diff, and of map_pos and map_neg each. Shares of map_diff
can be negative where more noise is subtracted than there is.

Source: arXiv 2410.05258v2, section 3.4 and Table 3, which does not say how the spans are normalised; this is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from diffattn.probes.options import DEPTHS, MOST_SAMPLES, MOST_TOGETHER, StudyOptions, fitting_length
from diffattn.probes.study import Point, StudiedModel, Study
from diffattn.results.study import Axes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from diffattn.data.needles import Haystack, NeedlePrompt
    from diffattn.probes.attention_calls import LayerCall

SPANS = ("bos", "before", "answer", "behind", "query")
NOISE = ("before", "behind")


@dataclass(frozen=True, kw_only=True)
class NoiseOptions(StudyOptions):
    """The options of ``diffattn eval noise`` and ``diffattn eval noise_by_head``."""

    length: int | None = None
    """Tokens of a prompt with its question. Default: 1024, or what the models can read where that is less."""
    depths: tuple[float, ...] = DEPTHS
    """Depths at which the answer is hidden: 0 is the beginning of the text, 1 its end."""
    samples: int = 50
    """Prompts at each depth."""
    batch_size: int = 4
    """Prompts that are read together."""
    seed: int = 0
    """Random seed for the prompts; models with the same tokenizer get the same ones."""

    def __post_init__(self) -> None:
        self.check_bounds(samples=(1, MOST_SAMPLES), batch_size=(1, MOST_TOGETHER), depths=(0, 1))

    def fitted(self, positions: int | None) -> NoiseOptions:
        """Returns the options with a length that fits the models."""
        return replace(self, length=fitting_length(self.length, positions))


class MapShares(NamedTuple):
    """The attention of the last token in one map."""

    shares: list[list[list[float]]]
    """The share of each span, by depth and by sample."""
    by_head: dict[str, list[list[float]]]
    """The mean share of ``answer`` and of ``noise``, by layer and by head."""


def measure_noise(
    model: PreTrainedModel,
    haystack: Haystack,
    options: NoiseOptions,
    *,
    on_progress: Callable[[int, int], None] = lambda done, all_: None,
) -> dict[str, MapShares]:
    """Reads a model on prompts with one needle.

    Args:
        model: a model whose attention can be read (``probes/attention_calls.py``).
        haystack: the text, in the model's tokens.
        options: see :class:`NoiseOptions`.
        on_progress: called with prompts done and prompts in all.

    Returns:
        The shares of ``map_pos``, and of ``map_neg`` and ``map_diff`` where the model has them.

    Raises:
        ConfigError: a length beyond the model's, or too short for a needle.
        UnsupportedError: a model whose attention cannot be read.
    """
    import numpy as np
    import torch

    from diffattn.model.loading import positions_of

    length = options.fitted(positions_of(model.config)).length
    assert length is not None
    # Each prompt has its own seed, so that a depth more or less does not change the others.
    prompts = [
        (
            depth,
            haystack.prompt(np.random.default_rng((options.seed, index, sample)), length=length, depth=depth),
        )
        for index, depth in enumerate(options.depths)
        for sample in range(options.samples)
    ]
    rows: dict[str, list[Tensor]] = {}
    for start in range(0, len(prompts), options.batch_size):
        batch = [prompt for _, prompt in prompts[start : start + options.batch_size]]
        for name, sums in span_sums(model, batch).items():
            rows.setdefault(name, []).append(sums)
        on_progress(start + len(batch), len(prompts))
    return {name: _summary(torch.cat(sums), len(options.depths)) for name, sums in rows.items()}


def span_sums(model: PreTrainedModel, prompts: Sequence[NeedlePrompt]) -> dict[str, Tensor]:
    """Returns the attention of the last token of each prompt, per map: (prompts, layers, heads, spans) in float64.

    A noise map that several output heads share counts once.

    Prompts have one length. Only the last row of a map is ever made.
    """
    import torch

    from diffattn.probes.attention_calls import served_by

    device = model.device
    ids = torch.tensor([prompt.ids for prompt in prompts], device=device)
    ends = torch.tensor([[prompt.spans[name][1] for name in SPANS] for prompt in prompts], device=device)
    found: dict[str, list[Tensor]] = {}

    def read(call: LayerCall) -> None:
        last = range(call.queries[0].shape[1] - 1, call.queries[0].shape[1])
        maps = call.maps(last)
        named = {"map_pos": maps[0]}
        if len(maps) > 1:
            named |= {"map_neg": maps[1], "map_diff": call.difference(maps, last)}
        for name, weights in named.items():
            # Spans are contiguous, so each span's sum is a difference of two cumulative sums.
            total = weights[:, :, 0].double().cumsum(-1)
            total = torch.cat([torch.zeros_like(total[..., :1]), total], dim=-1)
            upto = total.gather(-1, ends[:, None].expand(-1, total.shape[1], -1))
            found.setdefault(name, []).append(upto.diff(dim=-1, prepend=torch.zeros_like(upto[..., :1])))

    with torch.no_grad(), served_by(model, read):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return {name: torch.stack(layers, dim=1).cpu() for name, layers in found.items()}


def _summary(sums: Tensor, depths: int) -> MapShares:
    """Returns the shares of one map from the sums over its spans."""
    answer, noise = SPANS.index("answer"), [SPANS.index(name) for name in NOISE]
    shares = sums.mean(dim=(1, 2))
    shares = shares / shares.sum(dim=-1, keepdim=True)
    # Average over prompts first, divide after: where a head's maps nearly cancel, single row sums are close to zero.
    by_head = sums.mean(dim=0)
    by_head = by_head / by_head.sum(dim=-1, keepdim=True)
    heads = {"answer": by_head[..., answer].tolist(), "noise": by_head[..., noise].sum(dim=-1).tolist()}
    return MapShares(shares.unflatten(0, (depths, -1)).tolist(), heads)


def _named_maps(subject: StudiedModel, options: NoiseOptions) -> Iterator[tuple[str, MapShares]]:
    """Yields the shares of each map, with the words that go before its panels' names."""
    from diffattn.data.needles import Haystack

    haystack = Haystack(subject.documents, subject.tokenizer)
    found = measure_noise(subject.model, haystack, options, on_progress=subject.on_progress)
    # First the map that weights the values, which every model has; then the two maps of a differential model.
    *parts, used = found
    yield "", found[used]
    for name in parts:
        yield f"{name}: ", found[name]


def _by_depth(subject: StudiedModel, options: NoiseOptions) -> Iterator[Point]:
    """Yields the shares of the answer and of noise at each depth."""
    import numpy as np

    columns = {"answer": [SPANS.index("answer")], "noise": [SPANS.index(name) for name in NOISE]}
    for name, found in _named_maps(subject, options):
        shares = np.array(found.shares)
        for what, spans in columns.items():
            for depth, values in zip(options.depths, shares[..., spans].sum(-1), strict=True):
                yield Point(f"{name}{what}", depth, values.tolist())


def _by_head(subject: StudiedModel, options: NoiseOptions) -> Iterator[Point]:
    """Yields the mean shares of the answer and of noise in each layer and head."""
    for name, found in _named_maps(subject, options):
        for what, layers in found.by_head.items():
            for layer, heads in enumerate(layers):
                for head, share in enumerate(heads):
                    yield Point(f"{name}{what}", head, [share], layer)


_SOURCE = "arXiv 2410.05258v2, section 3.4 and Table 3"
STUDY = Study(
    name="noise",
    title="Attention to the answer and to noise",
    sentence="Measure how much attention goes to a hidden answer, and how much to other text.",
    source=_SOURCE,
    options=NoiseOptions,
    measure=_by_depth,
    axes=Axes(x="depth of the needle", y="share of attention", by="", logarithmic=False),
)
BY_HEAD = Study(
    name="noise_by_head",
    title="Attention to the answer and to noise, head by head",
    sentence="Measure the shares of eval noise for every layer and head.",
    source=_SOURCE,
    options=NoiseOptions,
    measure=_by_head,
    axes=Axes(x="head", y="share of attention", by="layer", logarithmic=False),
)
