"""The options with which models are built, loaded and asked for a text, and the range of each number; without torch.

A number's check and the words of its error are made from the same row, so that no message can state another range.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any, Literal

MATCHES = ("parameters", "shape")
Dtype = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The number format and the device with which :func:`diffattn.model.loading.load` loads a model."""

    dtype: Dtype = "auto"
    """Number format of the weights; auto takes that of the file."""
    device: Device = "auto"
    """Device to run on: the processor (cpu) or a GPU (cuda); auto takes the GPU where there is one."""


# Below it, logits divided by a temperature leave float32, and the likeliest token is drawn in any case.
GREEDY_BELOW = 1e-5


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers from ``lowest`` to ``highest``, both among them; ``above``: the lowest itself is not.

    >>> str(Range(lowest=0, highest=1, above=True)), Range(lowest=1, highest=9, whole=True).read(3.0)
    ('a number above 0 and up to 1', 3)
    """

    lowest: float
    highest: float
    whole: bool = False
    above: bool = False

    def __str__(self) -> str:
        what = "a whole number" if self.whole else "a number"
        if self.above:
            return f"{what} above {self.lowest:,} and up to {self.highest:,}"
        return f"{what} from {self.lowest:,} to {self.highest:,}"

    def read(self, value: Any) -> Any:
        """The value as an ``int`` where whole numbers are wanted, else as a ``float``.

        Raises:
            ValueError: no number of this range; its text is the range.
        """
        # True is no number, and 3.0 is a whole one for every client that knows only floats.
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(str(self))
        # Compared as it is: a number of 400 digits is no float.
        given: Any = value
        inside = self.lowest < given if self.above else self.lowest <= given
        if not inside or not given <= self.highest or (self.whole and given != math.floor(given)):
            raise ValueError(str(self))
        return int(given) if self.whole else float(given)


_COUNT = 2**31 - 1
_LARGEST_SEED = 2**63 - 1
_EITHER = {
    "top_p": Range(lowest=0, highest=1, above=True),
    "top_k": Range(lowest=0, highest=_COUNT, whole=True),
    "min_p": Range(lowest=0, highest=1),
    "repetition_penalty": Range(lowest=0.01, highest=100),
}
# The fields of a request to the server; those of OpenAI's interface have the ranges of its reference.
REQUEST = _EITHER | {
    "max_tokens": Range(lowest=1, highest=_COUNT, whole=True),
    "max_completion_tokens": Range(lowest=1, highest=_COUNT, whole=True),
    "temperature": Range(lowest=0, highest=2),
    "seed": Range(lowest=-_LARGEST_SEED - 1, highest=_LARGEST_SEED, whole=True),
    "frequency_penalty": Range(lowest=-2, highest=2),
    "presence_penalty": Range(lowest=-2, highest=2),
    "logit_bias": Range(lowest=-100, highest=100),
    "n": Range(lowest=1, highest=128, whole=True),
    "best_of": Range(lowest=1, highest=128, whole=True),
    "logprobs": Range(lowest=0, highest=20, whole=True),
    "top_logprobs": Range(lowest=0, highest=20, whole=True),
}
# The options of ``diffattn generate``.
DECODING = _EITHER | {
    "max_new_tokens": Range(lowest=1, highest=_COUNT, whole=True),
    "temperature": Range(lowest=0, highest=100),
    "seed": Range(lowest=0, highest=_LARGEST_SEED, whole=True),
    "num_beams": Range(lowest=1, highest=1024, whole=True),
}
