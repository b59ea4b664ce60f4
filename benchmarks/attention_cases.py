"""Ways to compute the attention of one layer: what `benchmarks.attention` measures.

The layer has 16 softmax heads of width 64. Inputs are views of what the models' projections or a cache hold, and
gradients are taken with respect to those views and λ: the cases do everything from there to the difference of the
maps times V, and no projection, rotary position or norm.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffattn import ModelShape, diff_attention
from diffattn.plan.cost import flops_per_token

HEADS, WIDTH = 16, 64
SHAPE = ModelShape(hidden_size=HEADS * WIDTH, num_layers=1, num_heads=HEADS, intermediate_size=8, vocab_size=8)
# Four query heads share a key head, so that four signal heads can share a noise head.
GROUPED = replace(SHAPE, num_kv_heads=HEADS // 4, signals_per_noise=4)
CONTEXTS = (512, 2048, 4096)
CACHED = 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PHASES = ("forward", "forward_backward", "decode")
TWIN = "softmax"


@dataclass(frozen=True)
class Problem:
    """``queries`` = ``keys`` and causal, or, in the phase "decode", 1 query over ``keys`` cached tokens. Batch 1."""

    phase: str
    dtype: str
    queries: int
    keys: int

    @property
    def pairs(self) -> int:
        """Query-key pairs of one head."""
        return self.keys if self.phase == "decode" else self.queries * (self.queries + 1) // 2


@dataclass(frozen=True)
class Entry:
    """One way to compute the attention of one layer.

    ``attention`` and ``backend`` name its FLOPs in ``diffattn.plan.cost``. ``split`` maps q (1, T, queries, 64), k and
    v (1, S, groups, 1024 / groups) to the views that ``compute`` takes before λ. ``gate`` is the test that shows that
    this computes the variant. ``at_most`` and ``aim``, by phase: the limit to its ratio to softmax, and the aim.
    ``beside`` names another case to which it has a ratio, ``beside_at_most`` the limits to that. ``up_to`` limits the
    context of forms that are here for comparison, so that a run takes minutes. ``shape`` is the softmax model's.
    """

    name: str
    attention: str
    backend: str
    split: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
    compute: Callable[..., Tensor]
    gate: str
    queries: int = HEADS
    groups: int = HEADS
    phases: tuple[str, ...] = PHASES
    up_to: int = max(CONTEXTS)
    at_most: dict[str, float] = field(default_factory=dict)
    aim: dict[str, float] = field(default_factory=dict)
    beside: str | None = None
    beside_at_most: dict[str, float] = field(default_factory=dict)
    shape: ModelShape = SHAPE

    @property
    def width(self) -> int:
        """Of a key or value head of the cache."""
        return self.shape.num_kv_heads * WIDTH // self.groups


def whole(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return q, k, v


def halves(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """q1, k1, q2, k2, v: query heads in adjacent pairs; V1's keys are [k1, k2], V2's serve both maps."""
    q1, q2 = q.unflatten(2, (-1, 2)).unbind(3)
    k1, k2 = k.chunk(2, dim=-1) if k.shape[-1] > q.shape[-1] else (k, k)
    return q1, k1, q2, k2, v


def quarters(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The same where each noise head stands behind its four signal heads."""
    groups = q.unflatten(2, (-1, 5))
    k1, k2 = k.chunk(2, dim=-1) if k.shape[-1] > q.shape[-1] else (k, k)
    return groups[:, :, :, :4].flatten(2, 3), k1, groups[:, :, :, 4], k2, v


def softmax(q: Tensor, k: Tensor, v: Tensor, lam: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # One query sees every key; PyTorch's causal mask is top-left and would show it one.
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1).transpose(1, 2)


def diffllama(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    """Signal heads in the first half of q and k, noise heads in the second, and one call for each half of v's heads."""
    o = torch.cat([softmax(q, k, half.repeat(1, 1, 2, 1)) for half in v.chunk(2, dim=2)], dim=-1)
    signal, noise = o.chunk(2, dim=2)
    return signal - lam * noise


def unequal(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    """One call whose values are twice as wide as its keys, which some kernels of a GPU serve, with nothing padded."""
    groups = v.shape[2]
    queries = torch.stack([x.unflatten(2, (groups, -1)) for x in (q1, q2)], dim=3).flatten(2, 4)
    keys = torch.stack([k1, k2], dim=3).flatten(2, 3)
    q, k, v = (x.transpose(1, 2) for x in (queries, keys, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True).transpose(1, 2)
    signal, noise = o.unflatten(2, (groups, 2, -1)).unbind(3)
    return (signal - lam * noise).flatten(2, 3).to(v.dtype)


fused, standard = (partial(diff_attention, backend=name) for name in ("fused_cpu", "standard"))
FUSED = "tests/ops/cpu/test_operator.py::test_forward_and_gradients"
SHARED = "tests/ops/test_shared_noise.py::test_output_and_gradients"
STANDARD = "tests/ops/test_standard.py::test_output_and_gradients"
HERE = "tests/benchmarks/test_attention.py::test_every_case_is_the_definition"
# Standard calls join the halves of V1's cached keys, which the models never do: no "decode" for the slower forms.
SLOWER: dict[str, Any] = {"phases": PHASES[:2], "up_to": 2048}
ENTRIES = (
    Entry(TWIN, "softmax", "fused_cpu", whole, softmax, HERE),
    Entry(
        "v1_fused",
        "diff_v1",
        "fused_cpu",
        halves,
        fused,
        FUSED,
        groups=HEADS // 2,
        at_most={"forward": 1.15, "forward_backward": 1.0, "decode": 1.0, "memory": 1.1},
        aim={"forward": 0.9, "forward_backward": 0.75},
    ),
    Entry(
        "v2_fused",
        "diff_v2",
        "fused_cpu",
        halves,
        fused,
        FUSED,
        queries=2 * HEADS,
        at_most={"forward": 1.75, "forward_backward": 1.6, "memory": 1.1},
        aim={"forward": 1.4, "forward_backward": 1.3},
    ),
    Entry("v1_grouped_fused", "diff_v1", "fused_cpu", halves, fused, FUSED, groups=HEADS // 8, shape=GROUPED),
    Entry(
        "gda_fused",
        "diff_gda",
        "fused_cpu",
        quarters,
        fused,
        SHARED,
        queries=HEADS // 2 + HEADS // 8,
        groups=HEADS // 8,
        beside="v1_grouped_fused",
        beside_at_most={"forward": 0.9},
        shape=GROUPED,
    ),
    Entry("v1_standard", "diff_v1", "standard", halves, standard, STANDARD, groups=HEADS // 2, **SLOWER),
    Entry("v2_standard", "diff_v2", "standard", halves, standard, STANDARD, queries=2 * HEADS, **SLOWER),
    Entry("v1_unequal", "diff_v1", "unequal", halves, unequal, HERE, groups=HEADS // 2, **SLOWER),
    Entry("v1_diffllama", "diff_v1", "four_calls", whole, diffllama, HERE, **SLOWER),
)


class Call:
    """The tensors of one case of a problem; calling it gives the seconds of one run."""

    def __init__(self, entry: Entry, problem: Problem) -> None:
        self.compute, self.training = entry.compute, problem.phase == "forward_backward"
        dtype, width = DTYPES[problem.dtype], entry.width
        torch.manual_seed(0)
        if problem.phase == "decode":
            # As a cache of transformers holds them: (batch, groups, sequence, width).
            k, v = (torch.randn(1, entry.groups, problem.keys, width).to(dtype).transpose(1, 2) for _ in "kv")
        else:
            k, v = (torch.randn(1, problem.keys, entry.groups, width).to(dtype) for _ in "kv")
        q = torch.randn(1, problem.queries, entry.queries, WIDTH).to(dtype)
        # V1 has one λ per layer, V2 one per token and output head; both are float32.
        lam = torch.rand(1, problem.queries, HEADS) if entry.attention == "diff_v2" else torch.rand(())
        split = entry.split(q, k, v)
        # V2's keys stay one tensor where they are two arguments.
        views = {id(x): x.detach().requires_grad_(self.training) for x in split}
        lam = lam.requires_grad_(self.training)
        self.arguments = (*(views[id(x)] for x in split), lam)
        self.inputs = (*views.values(), *([] if entry.name == TWIN else [lam]))
        self.output = self.forward()
        # (batch, sequence, heads, width) whatever the output's strides: so it comes from the output projection.
        self.d_output = torch.randn(self.output.shape).to(dtype)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.compute(*self.arguments)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """The gradients of ``inputs``."""
        output = self.compute(*self.arguments)
        return torch.autograd.grad(output, self.inputs, self.d_output)

    def run(self) -> None:
        self.forward_backward() if self.training else self.forward()

    def __call__(self) -> float:
        began = time.perf_counter()
        self.run()
        return time.perf_counter() - began

    @property
    def output_and_gradient_bytes(self) -> int:
        """What every implementation has to allocate; V2 has twice the queries, hence twice their gradient."""
        return sum(x.numel() * x.element_size() for x in (self.output, *self.inputs))


def executed_flops(entry: Entry, problem: Problem) -> int:
    """FLOPs of the pairs that a query sees, by the table of ``diffattn.plan.cost``."""
    phase = "training" if problem.phase == "forward_backward" else "forward"
    # A query sees (context + 1) / 2 keys on average: 2 keys at context 3, 1 at context 1; all else cancels.
    two, one = (
        flops_per_token(entry.shape, entry.attention, context=context, phase=phase, backend=entry.backend).executed
        for context in (3, 1)
    )
    return (two - one) * problem.pairs
