"""Checks that an exported model computes what the torch model does, up to float32 rounding that is measured here.

Two float32 computations of one function differ, by an amount that depends on the model: V1 divides by the RMS of a
difference. So the torch model is computed in float64 too. Its own float32 logits are some distance from these; the
exported model may be at most :data:`FACTOR` times as far. Every other difference, a λ that is off by a thousandth or a
mask that is off by one, is beyond that.

Quantised weights are another function, so their bound is the error that the torch model makes with weights that are
rounded here, to the nearest of as many steps in each block: the exported model, whose activations are rounded too, may
make at most :data:`QUANTIZED_FACTOR` times that.

The logits are those of random tokens and of text, in batches with and without padding on the left, given to the
exported model in pieces, so that every length of new tokens meets every length of a cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from diffattn.errors import ConfigError, DiffattnError
from diffattn.export.run import Ids, OnnxDecoder
from diffattn.model.modeling import DiffTransformerForCausalLM
from diffattn.model.transformers_private import attention_implementation

# How many times the largest distance of torch's float32 from float64, over all logits; 0.9 to 1.5 is usual.
FACTOR = 4.0
# How many times the RMS error of the logits of rounded weights; 1.0 to 1.6 is usual, most with 8 bits, where the
# rounding of activations counts.
QUANTIZED_FACTOR = 3.0
NEW_TOKENS = 32
# The attention implementation that every transformers model runs, and whose call the graph holds.
STANDARD = "sdpa"
# Rows, the pieces in which their tokens are given, and how many of those of the last row are padding.
CASES: tuple[tuple[int, tuple[int, ...], int], ...] = (
    (1, (1, 1, 1, 2), 0),
    (1, (29,), 0),
    (2, (11, 1, 5), 0),
    (3, (13, 7, 1, 1), 8),
    (5, (3, 1, 1, 1, 1), 4),
)
PROMPTS = (
    "The", "Once upon a time there was", "In the year of the great storm, the harbour", "My fellow citizens,",
    "1, 2, 3, 4,", "def add(a, b):\n    return", "Water boils at", "It is not the size of a model that matters, but",
    "She opened the letter, read it twice, and", "To whom it may concern:\n\n", "The capital of France is",
    "¿Dónde está",
)  # fmt: skip


class OnnxCheckError(DiffattnError):
    """An exported model that computes something else than the model that it was exported from."""


@dataclass(frozen=True)
class QuantizedReport:
    """A quantised model beside the float32 torch model: RMS errors as shares of the logits' standard deviation."""

    bits: int
    """Bits of a weight in the layers' matrices."""
    largest_difference: float
    """The largest difference of a logit."""
    error: float
    """The RMS error of the exported model's logits."""
    rounded_error: float
    """The RMS error of the torch model's logits with rounded weights."""
    bound: float
    """The largest ``error`` that passes."""
    identical_texts: int
    """Greedy texts that are the torch model's."""


@dataclass(frozen=True)
class CheckReport:
    """The differences of an exported model's logits from the torch model's."""

    positions: int
    """Tokens whose logits were compared."""
    largest_difference: float
    """The largest difference of a logit between the two float32 models."""
    error: float
    """The exported model's largest distance from the torch model in float64."""
    torch_error: float
    """The largest distance of the torch model in float32 from the same in float64."""
    bound: float
    """The largest ``error`` that passes."""
    texts: int
    """Greedy texts that were compared."""
    identical_texts: int
    """Those of them that are the torch model's."""
    quantized: QuantizedReport | None = None
    """The numbers of the quantised graph, where there is one."""

    @property
    def passed(self) -> bool:
        """True where the float32 graph is within rounding, and the quantised one too."""
        # A NaN is not below anything.
        quantized = self.quantized is None or self.quantized.error <= self.quantized.bound
        return self.error <= self.bound and quantized

    def lines(self) -> list[str]:
        """Returns the report as lines for a person."""
        lines = [
            f"largest difference of logits {self.largest_difference:.2e} over {self.positions} tokens",
            f"from float64: exported {self.error:.2e}, torch in float32 {self.torch_error:.2e}; "
            f"at most {self.bound:.2e} is rounding",
            f"{self.identical_texts} of {self.texts} greedy texts of {NEW_TOKENS} tokens are identical",
        ]
        if (quantized := self.quantized) is not None:
            lines.append(
                f"{quantized.bits} bits: RMS error {quantized.error:.2%} of the logits' standard deviation, torch with "
                f"rounded weights {quantized.rounded_error:.2%}; at most {quantized.bound:.2%} is rounding; "
                f"{quantized.identical_texts} of {self.texts} greedy texts identical"
            )
        return lines


@dataclass(frozen=True)
class Expected:
    """The torch model's answers in float32: the logits of each case, and the greedy texts behind the prompts."""

    prompts: list[Ids]
    cases: list[tuple[Ids, Ids, tuple[int, ...]]]
    logits: list[npt.NDArray[Any]]
    texts: Ids

    @classmethod
    def of(cls, model: DiffTransformerForCausalLM, tokenizer: PreTrainedTokenizerBase | None = None) -> Expected:
        """Asks a model in float32 on the CPU for its answers.

        Args:
            model: the model, which comes back as it was.
            tokenizer: encodes prompts of text. Default: random tokens in their place.

        Raises:
            ConfigError: the model is in another dtype.
        """
        if model.dtype != torch.float32:
            raise ConfigError(
                f"the model is {model.dtype}", "float32, as the exported one is", "load it with dtype=torch.float32"
            )
        prompts = _prompts(model.config.vocab_size, tokenizer)
        cases = _cases(model, prompts)
        with attention_implementation(model, STANDARD):
            logits = [_torch_logits(model, *case) for case in cases]
            return cls(prompts, cases, logits, _greedy(model, *_padded(prompts)))


def check_float32(model: DiffTransformerForCausalLM, path: str | Path, expected: Expected | None = None) -> CheckReport:
    """Compares a float32 export with the torch model.

    Args:
        model: a model in float32 on the CPU; it is computed in float64 too and comes back as it was.
        path: the exported folder, or its ``model.onnx``.
        expected: the model's answers, where they are known already.

    Raises:
        ConfigError: the model is in another dtype.
    """
    expected = expected or Expected.of(model)
    decoder = OnnxDecoder(path)
    with attention_implementation(model, STANDARD):
        try:
            exact = [_torch_logits(model.double(), *case) for case in expected.cases]
        finally:
            model.float()
    actual = [_onnx_logits(decoder, *case) for case in expected.cases]
    torch_error = _largest(expected.logits, exact)
    return CheckReport(
        positions=sum(len(logits) for logits in exact),
        largest_difference=_largest(actual, expected.logits),
        error=_largest(actual, exact),
        torch_error=torch_error,
        bound=FACTOR * torch_error,
        texts=len(expected.prompts),
        identical_texts=_identical(decoder, expected),
    )


def check_quantized(
    model: DiffTransformerForCausalLM,
    path: str | Path,
    bits: int,
    float32: CheckReport,
    expected: Expected | None = None,
    *,
    block_size: int = 32,
) -> CheckReport:
    """Returns the report ``float32`` of a graph together with that of its quantised form at ``path``."""
    expected = expected or Expected.of(model)
    decoder = OnnxDecoder(path)
    with attention_implementation(model, STANDARD), _rounded_weights(model, bits, block_size):
        rounded = np.concatenate([_torch_logits(model, *case) for case in expected.cases])
    wanted = np.concatenate(expected.logits)
    actual = np.concatenate([_onnx_logits(decoder, *case) for case in expected.cases])
    rounded_error = _relative(rounded, wanted)
    return replace(
        float32,
        quantized=QuantizedReport(
            bits=bits,
            largest_difference=float(np.abs(actual - wanted).max()),
            error=_relative(actual, wanted),
            rounded_error=rounded_error,
            bound=QUANTIZED_FACTOR * rounded_error,
            identical_texts=_identical(decoder, expected),
        ),
    )


@contextlib.contextmanager
def _rounded_weights(model: DiffTransformerForCausalLM, bits: int, block_size: int) -> Iterator[None]:
    """Rounds the matrices that are quantised, as ``diffattn.export.quantize`` does by default, while this lasts."""
    before = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not name.endswith("lambda_proj"):
            # A tied head is the embedding's own parameter.
            table = isinstance(module, nn.Embedding) or name == "lm_head"
            before[module.weight] = module.weight.data, 8 if table else bits
    try:
        for parameter, (weight, width) in before.items():
            parameter.data = _rounded(weight, width, block_size)
        yield
    finally:
        for parameter, (weight, _) in before.items():
            parameter.data = weight


def _rounded(weight: Tensor, bits: int, block_size: int) -> Tensor:
    """Rounds each block of a row to the nearest of 2^bits steps, of which the largest magnitude is the last."""
    columns = weight.shape[1]
    blocks = F.pad(weight, (0, -columns % block_size)).unflatten(1, (-1, block_size))
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = extreme / -(2 ** (bits - 1))
    steps = (blocks / torch.where(scale == 0, 1.0, scale)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (steps * scale).flatten(1)[:, :columns].contiguous()


def _relative(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return float(np.sqrt(np.mean((actual - expected) ** 2)) / expected.std())


def _prompts(vocab_size: int, tokenizer: PreTrainedTokenizerBase | None) -> list[Ids]:
    """Returns twelve rows of tokens of several lengths."""
    if tokenizer is not None:
        return [np.array(tokenizer(text)["input_ids"], np.int64) for text in PROMPTS]
    random = np.random.default_rng(7)
    return [random.integers(0, vocab_size, length) for length in random.integers(1, 17, len(PROMPTS))]


def _cases(model: DiffTransformerForCausalLM, prompts: list[Ids]) -> list[tuple[Ids, Ids, tuple[int, ...]]]:
    """Returns tokens (B, S), their mask, and the pieces in which they are given, for each case."""
    random = np.random.default_rng(11)
    cases = []
    for rows, pieces, padding in CASES:
        mask = np.ones((rows, sum(pieces)), np.int64)
        mask[-1, :padding] = 0
        cases.append((random.integers(0, model.config.vocab_size, mask.shape), mask, pieces))
    ids, mask = _padded(prompts)
    cases.append((ids, mask, (ids.shape[1] - 2, 1, 1)))
    return cases


def _padded(prompts: list[Ids]) -> tuple[Ids, Ids]:
    """Returns tokens (B, S) with padding on the left, at least 3 long, and their mask."""
    length = max(3, *map(len, prompts))
    ids, mask = (np.zeros((len(prompts), length), np.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = prompt, 1
    return ids, mask


def _positions(mask: Ids) -> Ids:
    return np.maximum(mask.cumsum(axis=1) - 1, 0)


@torch.no_grad()
def _torch_logits(model: DiffTransformerForCausalLM, ids: Ids, mask: Ids, pieces: Any) -> npt.NDArray[Any]:
    """Returns logits (tokens, V) of all tokens that are no padding, from one pass."""
    given = (torch.from_numpy(values) for values in (ids, mask, _positions(mask)))
    return model(*given, use_cache=False).logits.numpy()[mask == 1]


def _onnx_logits(decoder: OnnxDecoder, ids: Ids, mask: Ids, pieces: Sequence[int]) -> npt.NDArray[Any]:
    """Returns the same logits of the exported model, piece by piece through the cache where there is one."""
    if not decoder.has_cache:
        return decoder.logits(ids, mask)[0][mask == 1]
    outputs, cache, start = [], None, 0
    for piece in pieces:
        end = start + piece
        logits, cache = decoder.logits(ids[:, start:end], mask[:, :end], cache)
        outputs.append(logits)
        start = end
    return np.concatenate(outputs, axis=1)[mask == 1]


@torch.no_grad()
def _greedy(model: DiffTransformerForCausalLM, ids: Ids, mask: Ids) -> Ids:
    """Returns the likeliest next tokens (B, NEW_TOKENS) of the torch model, whatever ends a text."""
    cache, chosen, new = DynamicCache(config=model.config), [], ids
    for _ in range(NEW_TOKENS):
        positions = _positions(mask)[:, -new.shape[1] :]
        given = (torch.from_numpy(values) for values in (new, mask, positions))
        new = model(*given, past_key_values=cache, logits_to_keep=1).logits.argmax(-1).numpy()
        chosen.append(new)
        mask = np.concatenate([mask, np.ones_like(new)], axis=1)
    return np.concatenate(chosen, axis=1)


def _identical(decoder: OnnxDecoder, expected: Expected) -> int:
    ids, mask = _padded(expected.prompts)
    written = decoder.generate(ids, NEW_TOKENS, attention_mask=mask)[:, ids.shape[1] :]
    return int((written == expected.texts).all(axis=1).sum())


def _largest(actual: Sequence[npt.NDArray[Any]], expected: Sequence[npt.NDArray[Any]]) -> float:
    return float(max(np.abs(x - y).max() for x, y in zip(actual, expected, strict=True)))
