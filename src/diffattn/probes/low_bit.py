"""Low-bit attention: the loss where attention logits are quantised, to see what their outliers cost.

Absmax, dynamically: the logits of each head and query are rounded to ``2^(bits − 1) − 1`` steps on either side of zero
of the largest magnitude among its visible keys; 16 bits leave them as the model's numbers. What is behind the softmax
stays as it is.

Source: arXiv 2410.05258v2, section 3.7 and Figure 8 (16, 8, 6 and 4 bits), which does not say how wide a group shares
one scale; ours is one row of one head's map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from diffattn.errors import ConfigError
from diffattn.probes.options import MOST_SAMPLES, StudyOptions, fitting_length
from diffattn.probes.study import Point, StudiedModel, Study
from diffattn.results.study import Axes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from diffattn.probes.attention_calls import LayerCall

BITS = (16, 8, 6, 4)


@dataclass(frozen=True, kw_only=True)
class LowBitOptions(StudyOptions):
    """The options of ``diffattn eval low_bit``."""

    bits: tuple[int, ...] = BITS
    """Numbers of bits to try; 16 leaves the logits as they are."""
    context: int | None = None
    """Tokens that are read at once. Default: 1024, or what the models can read where that is less."""
    samples: int = 32
    """Blocks of --context tokens that are read."""

    def __post_init__(self) -> None:
        self.check_bounds(samples=(1, MOST_SAMPLES))

    def fitted(self, positions: int | None) -> LowBitOptions:
        """Returns the options with a context that fits the models."""
        return replace(self, context=fitting_length(self.context, positions))


class LowBit(NamedTuple):
    """The quality of a model whose logits have one number of bits."""

    loss: list[float]
    """Held-out loss of each block, in nats per token."""
    accuracy: list[float]
    """Share of the tokens of each block that the model takes for the likeliest."""


def quantise_rows(logits: Tensor, bits: int) -> Tensor:
    """Returns each row rounded to ``2^(bits − 1) − 1`` steps of its largest magnitude; −∞ stays.

    >>> import torch
    >>> quantise_rows(torch.tensor([7.0, -3.4, 0.4]), 4)
    tensor([ 7., -3.,  0.])
    """
    import torch

    seen = logits > -torch.inf
    largest = logits.abs().masked_fill(~seen, 0.0).amax(dim=-1, keepdim=True)
    step = largest / (2 ** (bits - 1) - 1)
    # A row of zeros has no step.
    rounded = torch.where(step > 0, (logits / step).round() * step, logits)
    return torch.where(seen, rounded, logits)


def low_bit_attention(call: LayerCall, bits: int) -> Tensor:
    """Returns the output heads (B, T, H, V) of a layer whose attention logits are quantised, in float32."""
    import torch

    parts, value = [], call.value.float().permute(0, 2, 1, 3)
    groups = value.shape[1]
    for rows in call.row_blocks():
        maps = tuple(
            quantise_rows(call.logits(which, rows), bits).softmax(dim=-1).nan_to_num_(0.0)
            for which in range(len(call.queries))
        )
        grouped = call.difference(maps, rows).unflatten(1, (groups, -1)).flatten(2, 3) @ value
        parts.append(grouped.unflatten(2, (-1, len(rows))).flatten(1, 2))
    return torch.cat(parts, dim=2).transpose(1, 2)


def measure_low_bit(
    model: PreTrainedModel,
    blocks: Sequence[Tensor],
    *,
    bits: Sequence[int] = BITS,
    on_progress: Callable[[int, int], None] = lambda done, all_: None,
) -> dict[int, LowBit]:
    """Measures loss and next-token accuracy at each number of bits, block by block, so that models can be paired.

    Args:
        model: a model whose attention can be read.
        blocks: token ids (B, T).
        bits: 2 to 15 are quantised; 16 is the model as it is.
        on_progress: called with passes done and passes in all.

    Raises:
        ConfigError: a number of bits out of range.
        UnsupportedError: a model whose attention cannot be read.
    """
    import torch
    import torch.nn.functional as F

    from diffattn.probes.attention_calls import served_by

    for number in bits:
        if not 2 <= number <= 16:
            wanted = "2 to 16, of which 16 leaves the logits as they are"
            raise ConfigError(f"bits is {number}", wanted, "change --bits")
    device = model.device
    found = {number: LowBit([], []) for number in bits}
    for index, number in enumerate(bits):

        def serve(call: LayerCall, number: int = number) -> Tensor | None:
            return None if number == 16 else low_bit_attention(call, number)

        with torch.no_grad(), served_by(model, serve):
            for done, block in enumerate(blocks, 1):
                ids = block.to(device)
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                targets = ids[:, 1:]
                found[number].loss.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
                found[number].accuracy.append((logits.argmax(dim=-1) == targets).float().mean().item())
                on_progress(index * len(blocks) + done, len(bits) * len(blocks))
    return found


def _measure(subject: StudiedModel, options: LowBitOptions) -> Iterator[Point]:
    """Yields the loss and the accuracy at each number of bits."""
    assert options.context is not None
    blocks = [block[None] for block in subject.first_blocks(options.samples, options.context)]
    found = measure_low_bit(subject.model, blocks, bits=options.bits, on_progress=subject.on_progress)
    for bits, entry in found.items():
        yield Point("loss, nats per token", bits, entry.loss)
    for bits, entry in found.items():
        yield Point("next-token accuracy", bits, entry.accuracy)


STUDY = Study(
    name="low_bit",
    title="Low-bit attention logits",
    sentence="Measure the loss where attention logits have 16, 8, 6 or 4 bits.",
    source="arXiv 2410.05258v2, section 3.7 and Figure 8",
    options=LowBitOptions,
    measure=_measure,
    axes=Axes(x="bits of the attention logits", y="", by="", logarithmic=False),
)
