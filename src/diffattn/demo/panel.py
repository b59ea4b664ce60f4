"""The planner's numbers for the question whether differential attention costs twice the memory, by size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffattn.plan.cost import count_parameters, match_parameters
from diffattn.plan.estimate import Estimate, estimate
from diffattn.plan.rule import PAPER_VOCABULARY, shape_about
from diffattn.plan.setting import Setting
from diffattn.plan.shape import ModelShape
from diffattn.variants import BASELINE

CONTEXT = 4096
SIZES = tuple(
    int(digits * 10**power) for power in range(6, 11) for digits in (1, 1.5, 2, 3, 5, 7) if digits * 10**power <= 7e10
)
"""Parameters of the softmax model, from 1M to 70B."""
DIFFERENTIAL = ("diff_v1", "diff_v2")
CLAIMED_SHARE = 0.622
"""The share of a softmax model's parameters with which a V1 of 6.8B is said to have the loss of one of 11B."""
# Where the written maps are, of which differential attention has twice as many.
_WRITTEN = "materialised"


def panel() -> dict[str, Any]:
    """Returns rows of bytes by size, each of softmax, of V1 and V2 as large, and of a V1 of ``CLAIMED_SHARE`` of it.

    A row's models have ``parameters``, ``weights`` and ``cache`` in inference, ``decoding`` and ``training``, the peaks
    of both, and ``written``, the peak of training where whole maps are written to memory; all in bytes.
    """
    return {
        "context": CONTEXT,
        "share": CLAIMED_SHARE,
        "source": "arXiv 2410.05258v2, Figure 3a: a V1 of 6.8B has the loss of a softmax model of 11B",
        "rows": [_row(size) for size in SIZES],
    }


def _row(size: int) -> dict[str, Any]:
    equal = {attention: _bytes(size, attention) for attention in (BASELINE, *DIFFERENTIAL)}
    return {"size": size, "equal": equal, "smaller": _bytes(CLAIMED_SHARE * size, DIFFERENTIAL[0])}


def _bytes(parameters: float, attention: str) -> Mapping[str, int]:
    shape = match_parameters(_shape(parameters), attention)
    found = estimate(shape, attention, Setting(context=CONTEXT))
    written = estimate(shape, attention, Setting(context=CONTEXT, backend=_WRITTEN))
    return {
        "parameters": found.parameters.total,
        "weights": found.decoding.memory.weights,
        "cache": found.decoding.memory.cache,
        "decoding": found.decoding.memory.total,
        "training": _training(found),
        "written": _training(written),
    }


def _shape(parameters: float) -> ModelShape:
    """Returns the rule's shape, with a feed-forward network of such a width that it has as many parameters."""
    shape = shape_about(parameters, vocab_size=_vocabulary(parameters), context=CONTEXT)
    # A channel has three rows of weights in each layer.
    missing = (parameters - count_parameters(shape, BASELINE).total) / (3 * shape.hidden_size * shape.num_layers)
    return replace(shape, intermediate_size=max(8, shape.intermediate_size + 8 * round(missing / 8)))


def _training(found: Estimate) -> int:
    assert found.training is not None, "16-bit weights are trained"
    return found.training.memory.total


def _vocabulary(parameters: float) -> int:
    """Returns the rows of an embedding that does not outgrow a model of this size."""
    return 4096 if parameters < 2e6 else 8192 if parameters < 2e7 else 32_768 if parameters < 5e8 else PAPER_VOCABULARY
