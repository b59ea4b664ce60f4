"""The result of a comparison of variants: the content of ``result.json``, and the curves that its page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffattn.results.base import Result
from diffattn.results.interval import Interval
from diffattn.variants import BASELINE


@dataclass(frozen=True, kw_only=True)
class VariantResult(Result):
    """One variant of a comparison: its size, its losses and what it costs."""

    parameters: int
    """Parameters of the model, each tensor counted once."""
    attention_parameters: int
    """Parameters of the attention layers: W_Q, W_K, W_V, W_O, λ and the gain of the norm."""
    intermediate_size: int
    """Width of the feed-forward network, in channels."""
    val_loss: Sequence[float]
    """Held-out loss in nats per token that is asked for, one for each seed."""
    bits_per_byte: Sequence[float | None] | None
    """Held-out loss in bits per byte of text, one for each seed; None for encoders."""
    attention_backend: str
    """The backend that served the attention, such as ``fused_cpu`` or ``standard``."""
    train_tokens_per_second: float
    """Tokens of a training step over its median time, in tokens per second; the median over seeds."""
    train_peak_bytes: float
    """Largest number of bytes of tensors that were alive within one training step."""
    cache_bytes_per_token: float | None
    """Bytes of keys and values of all layers for each token, in float32; None for encoders, which have no cache."""
    model_flops_per_token: float
    """FLOPs of training for each token, by the definition of the variant; a multiply-add counts as 2."""
    executed_flops_per_token: float
    """FLOPs of training for each token that the backend executes."""
    checkpoint_bytes: int
    """Bytes of ``model.safetensors``."""
    load_seconds: float
    """Seconds that ``from_pretrained`` takes, the median of three."""
    first_token_seconds: float
    """Seconds from 32 tokens of prompt to the next token, of an encoder to their logits; the median of three."""


@dataclass(frozen=True, kw_only=True)
class PairResult(Result):
    """A variant against the model that it is compared with, over the seeds that both have."""

    val_loss_difference: Interval
    """Held-out loss of the variant minus that of its baseline, seed by seed, in nats per token; negative is better."""
    verdict: str
    """One sentence that says what the interval allows: lower, higher, or no difference seen."""
    parameters_ratio: float
    """Parameters of the variant over those of its baseline."""

    @property
    def baseline(self) -> str:
        """The name of the model that the variant is compared with."""
        return BASELINE


@dataclass(frozen=True, kw_only=True)
class ComparisonResult(Result):
    """The content of the ``result.json`` of a comparison."""

    variants: Mapping[str, VariantResult]
    """The results of each variant, by its name, in the order in which they were asked for."""
    pairs: Mapping[str, PairResult]
    """Each variant but softmax against softmax, by the variant's name; empty where softmax was not trained."""
    recipe: Mapping[str, object]
    """The settings of training, and the shape, the context in tokens and how parameters were matched."""
    versions: Mapping[str, object]
    """The releases of what ran, and the machine."""
    data: Mapping[str, object]
    """Facts of the text: its digest, its tokens, its tokenizer."""
    seeds: Sequence[int]
    """The seeds, in the order of the losses."""
    command: str
    """The command that made the result."""


@dataclass(frozen=True)
class CurvePoint(Result):
    """One point of a loss curve."""

    tokens: int
    """Training tokens up to this point."""
    loss: float | None
    """Loss in nats per token; None or not a number where the run has none here."""


@dataclass(frozen=True, kw_only=True)
class LossCurve(Result):
    """The loss of one run against its training tokens."""

    attention: str
    """The variant."""
    seed: int
    """The seed of the run."""
    train: Sequence[CurvePoint]
    """The training loss of each step."""
    validation: Sequence[CurvePoint]
    """The held-out loss of each evaluation on the way; the last one, on all held-out text, is not among them."""
